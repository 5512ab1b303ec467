"""A network of namespaces: a host, its ducks and the switches between them, on one machine.

Every machine is a network namespace with a cable (veth) to a switch (a bridge in a namespace of its
own). The kernel cuts every train of datagrams before it enters a cable, so that each packet of an
Ethernet is one here, and is lost alone. Nothing outside these namespaces is touched; all of them
are gone when the pond is closed, and with them whatever runs inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CLONE_NEWNET = 0x40000000
_PONDS = itertools.count()


def why_not() -> str:
    """Why namespaces cannot be made here; "" if they can."""
    if sys.platform != "linux" or os.geteuid():
        return "needs root on Linux, for network namespaces"
    for tool in ("ip", "nft"):
        if not shutil.which(tool):
            return f"needs {tool} (packages iproute2 and nftables)"
    probe = f"duck-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"cannot make network namespaces: {made.stderr.strip()}"
    try:
        rules = "table bridge t { chain c { type filter hook forward priority 0; }; }"
        loads = subprocess.run(
            ["ip", "netns", "exec", probe, "nft", rules], capture_output=True, text=True
        )
        return "" if not loads.returncode else f"no bridge filter: {loads.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False)


class Pond:
    """A host and so many ducks.

    Args:
        ducks: how many machines besides the host.
        nics: so many interfaces e0, e1, ... has the host, each on a switch of its own; the ducks
            are spread over them in turn.
        mtu: of all cables.
    """

    def __init__(self, ducks: int, *, nics: int = 1, mtu: int = 1500) -> None:
        self._prefix = f"duck-{os.getpid()}-{next(_PONDS)}"
        self.ducks, self.nics = ducks, nics
        self.processes: list[subprocess.Popen[str]] = []
        self._made: list[str] = []
        try:
            self._dig(mtu)
        except BaseException:
            self.close()
            raise

    def _dig(self, mtu: int) -> None:
        switches = [self._namespace(f"switch{nic}") for nic in range(self.nics)]
        machines = [self._namespace(f"m{number}") for number in range(self.ducks + 1)]
        for switch in switches:
            _ip(
                "link set lo up",
                "link add br0 type bridge mcast_snooping 0 stp_state 0",
                "link set br0 up",
                inside=switch,
            )
        host, *rest = machines
        cables = [(host, nic, f"e{nic}", 0) for nic in range(self.nics)]
        cables += [(ns, number % self.nics, "e0", number + 1) for number, ns in enumerate(rest)]
        _ip(*(
            f"link add {name} netns {ns} type veth peer name p{number} netns {switches[nic]}"
            for ns, nic, name, number in cables
        ))  # fmt: skip
        for ns, nic, name, number in cables:
            _ip(
                "link set lo up",
                f"address add {self.address(number, nic)}/24 dev {name}",
                f"link set {name} mtu {mtu} gso_max_segs 1 up",
                inside=ns,
            )
            _ip(
                f"link set p{number} master br0 mtu {mtu} gso_max_segs 1 up",
                inside=switches[nic],
            )

    def _namespace(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        _ip(f"netns add {full}")
        self._made.append(full)
        return full

    def address(self, machine: int, nic: int = 0) -> str:
        """Machine 0 is the host, machine n + 1 is duck n."""
        return f"10.77.{nic}.{machine + 1}"

    def addresses(self) -> list[str]:
        """HOST:PORT of every duck."""
        return [
            f"{self.address(number + 1, number % self.nics)}:4000" for number in range(self.ducks)
        ]

    def set_mtu(self, mtu: int, ducks: Sequence[int] | None = None) -> None:
        """Of some ducks' cables, or of all and the host's."""
        machines = [0, *(n + 1 for n in range(self.ducks))]
        for machine in machines if ducks is None else [duck + 1 for duck in ducks]:
            nics = range(self.nics) if machine == 0 else [(machine - 1) % self.nics]
            for nic in nics:
                name = f"e{nic}" if machine == 0 else "e0"
                _ip(f"link set {name} mtu {mtu}", inside=f"{self._prefix}-m{machine}")
                _ip(f"link set p{machine} mtu {mtu}", inside=f"{self._prefix}-switch{nic}")

    def filter(self, *rules: str) -> None:
        """From now on these rules hold for what the switches forward; no rules: all passes."""
        text = "table bridge duck\ndelete table bridge duck\n"
        if rules:
            text += (
                "table bridge duck { chain forward {\n"
                "type filter hook forward priority 0; policy accept;\n"
                + "\n".join(rules)
                + "\n}\n}\n"
            )
        for nic in range(self.nics):
            self.run(f"switch{nic}", ["nft", "-f", "-"], text)

    def lose(self, percent: float) -> None:
        """So many of a hundred packets do not arrive, each for itself; TCP's too."""
        drop = f"ether type ip numgen random mod 10000 < {round(percent * 100)} drop"
        self.filter(*([drop] if percent else []))

    def plug(self, duck: int, state: str) -> None:
        """Pull a duck's cable out of its switch ("down"), or put it back ("up")."""
        nic = duck % self.nics
        _ip(f"link set p{duck + 1} {state}", inside=f"{self._prefix}-switch{nic}")

    def run(self, where: str, command: Sequence[str], text: str = "") -> str:
        """A command in a namespace; its output."""
        done = subprocess.run(
            ["ip", "netns", "exec", f"{self._prefix}-{where}", *command],
            input=text, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout

    def start(self, machine: int, *words: str) -> subprocess.Popen[str]:
        """A Python process on a machine; its standard input is a pipe that closes with us."""
        command = ["ip", "netns", "exec", f"{self._prefix}-m{machine}", sys.executable, *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def start_ducks(self, *words: str) -> None:
        """The same command on every duck, with its --listen; waits until all of them listen."""
        for number, address in enumerate(self.addresses()):
            self.start(number + 1, *words, "--listen", address)
        for process in self.processes[-self.ducks :]:
            self._wait_for_one(process)

    def start_fake_ducks(self, *options: str) -> None:
        """A process on every duck that answers at once; waits until all of them listen.

        options: of fake_node.py.
        """
        ducks = [
            f"{self._prefix}-m{number + 1}={address}"
            for number, address in enumerate(self.addresses())
        ]
        process = self.start(0, "-m", "tests.network.fake_node", *options, *ducks)
        for _ in ducks:
            self._wait_for_one(process)

    @staticmethod
    def _wait_for_one(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"a duck ended before it listened: {process.wait(10)}"
        assert json.loads(line)["event"] == "listening"

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """What this thread opens meanwhile belongs to the host's network."""
        with Path("/proc/thread-self/ns/net").open() as before:
            enter(f"{self._prefix}-m0")
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def close(self) -> None:
        """End what was started, and take all namespaces down."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has forked
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        self._made.clear()
        self.processes.clear()


def _ip(*commands: str, inside: str = "") -> None:
    where = ["-n", inside] if inside else []
    done = subprocess.run(
        ["ip", *where, "-batch", "-"],
        input="\n".join(commands) + "\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"ip {inside}: {commands}: {done.stderr}")


def enter(namespace: str) -> None:
    """What this thread opens from now on belongs to that network."""
    with Path(f"/run/netns/{namespace}").open() as file:
        _set_namespace(file.fileno())


def _set_namespace(file: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(file, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
