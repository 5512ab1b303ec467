"""What a user may ask of an Engine, checked once; the command line's options, by their names."""

from __future__ import annotations

import ipaddress
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duck.errors import ConfigError
from duck.files import open_regular

# name -> the values that work; and the ones that are planned, so that a refusal can say so.
CHOICES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transport": (("auto", "loopback", "shm", "tcp", "multicast"), ()),
    "placement": (("auto", "equal", "weighted"), ("whole",)),
    "schedule": (("auto", "serial", "batch", "wave", "pingpong"), ()),
    "draft": (("auto", "mtp", "off"), ()),
    "early": (("auto", "on", "off"), ()),
    "device": (("auto", "cpu", "cuda"), ()),
    "dtype": (("auto", "float32", "bfloat16"), ()),
    "kv": (("auto", "bf16", "fp8"), ()),
    "indexer": (("auto", "exact", "fp8"), ()),
    "graphs": (("auto", "on", "off"), ()),
    "answers": (("auto", "f32"), ()),
    "experts": (("exact", "int8", "int4"), ()),
}
MAX_LOCAL_DUCKS = 64
# Of slices, by their widths; no two machines differ as much as these.
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
WANT_WEIGHT = "want a number above 0, from 0.000001 to 1000000"
# Packets that every IPv4 network carries, and the largest jumbo frames that switches have.
MIN_MTU, MAX_MTU = 576, 9216
DEMO = Path(__file__).parent / "demo"


def model_folder(path: str | Path) -> Path:
    """The folder of a MODEL argument; "demo" is the model that ships with the package.

    Raises:
        ConfigError: no path, or one that may not be looked into.
    """
    if str(path) == "demo":
        return DEMO
    folder = Path(path)
    if not str(path):
        raise ConfigError('MODEL is empty: give a model folder, or "demo"')
    try:
        (folder / "config.json").is_file()
    except OSError as error:
        raise ConfigError(
            f"cannot read the model folder {str(folder)[:200]}: {error.strerror}"
        ) from error
    return folder


def output_file(flag: str, name: str, *, beside: bool = False) -> Path:
    """The file of an option, which can be written: checked before the work is done.

    beside: it is written as `files.whole` does, which needs a new file in its folder.

    Raises:
        ConfigError: it cannot.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"--{flag} {name!r} is no file: give the path of a file to write")
    try:
        return _output_file(flag, name, beside)
    except OSError as error:  # a name that is too long, a folder that nobody may look into
        raise ConfigError(f"--{flag} {name[:60]!r}: {error.strerror}") from error


def picture_file(flag: str, name: str) -> Path:
    """As `output_file`, for a PNG.

    Raises:
        ConfigError: it cannot be written, or its name is another kind's.
    """
    path = output_file(flag, name, beside=True)
    if path.suffix.lower() != ".png":
        raise ConfigError(
            f"--{flag} {name[:60]!r}: pictures are PNG: give a name that ends in .png"
        )
    return path


def _output_file(flag: str, name: str, beside: bool) -> Path:
    path = Path(name)
    if path.is_dir():
        raise ConfigError(f"--{flag} {name!r} is no file: give the path of a file to write")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--{flag} {name!r} is no file: give the path of a file to write")
    if not path.parent.is_dir():
        raise ConfigError(f"--{flag} {name}: no such folder: {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--{flag} {name}: may not be written")
    folder = Path(os.path.realpath(path)).parent
    if beside and not os.access(folder, os.W_OK):
        raise ConfigError(f"--{flag} {name}: no new file may be written to {folder}")
    return path


@dataclass(frozen=True)
class Options:
    """How to run a model; every value is checked here, into ConfigError."""

    ducks: str = "local:2"  # local:N, HOST:PORT,HOST:PORT, or a flock.toml
    transport: str = "auto"  # shm when we start the ducks, else tcp; loopback: all in this process
    placement: str = "auto"  # weighted if the flock.toml has weights, else equal
    schedule: str = "auto"  # auto: by measured times
    draft: str = "auto"  # auto: while it pays; mtp: whenever the model has an MTP layer
    early: str = "auto"  # whether a wave's sure lane starts while its guess is being made
    device: str = "auto"  # cuda when there is one
    dtype: str = "auto"  # float32 on the CPU, bfloat16 on CUDA
    kv: str = "auto"  # what cached latents are held in; auto: dtype
    indexer: str = "auto"  # of sparse attention: exact in float32, fp8 (as served) in bfloat16
    max_len: int | None = None  # tokens a session may hold; None: the model's context, if it fits
    answers: str = "auto"  # f32: partial sums travel in float32 although asks travel in bfloat16
    experts: str = "exact"  # int8, int4: rounded, for speed and memory; never chosen by itself
    key_file: str | Path | None = None  # the cluster's key; else [host] key_file of a flock.toml
    # Whether a layer's work on few rows is recorded once and replayed; auto: on GPUs. On a CPU the
    # same steps run over the same buffers, nothing is recorded, and nothing is gained.
    graphs: str = "auto"
    trace: str | None = None  # the file to write what happened when to
    memory_trace: str | None = None  # the file to write what memory is taken when to

    def __post_init__(self) -> None:
        for name, (ready, planned) in CHOICES.items():
            value = getattr(self, name)
            if value in planned:
                raise ConfigError(
                    f"--{name} {value} is not built yet; this version has {', '.join(ready)}"
                )
            if value not in ready:
                raise ConfigError(f"--{name} {value!r}: want one of {', '.join(ready)}")
        if self.trace is not None:
            output_file("trace", self.trace, beside=True)
        if self.memory_trace is not None:
            output_file("memory-trace", self.memory_trace)
            both = [Path(path).resolve() for path in (self.trace, self.memory_trace) if path]
            if len(both) == 2 and both[0] == both[1]:
                raise ConfigError(f"--trace and --memory-trace {self.trace}: want two files")
        if not isinstance(self.ducks, str):
            raise ConfigError(f"--ducks {self.ducks!r}: want a text, as local:2 or HOST:PORT")
        if self.max_len is not None and type(self.max_len) is not int:
            raise ConfigError(f"--max-len {self.max_len!r}: want a whole number")
        flock = Ducks.parse(self.ducks)
        if self.transport == "loopback" and flock.local is None:
            raise ConfigError(
                f"--transport loopback runs the ducks inside this process; --ducks {self.ducks} "
                "names other machines: use --transport tcp, or --ducks local:N"
            )
        if self.transport == "loopback" and self.key_file is not None:
            raise ConfigError(
                "--transport loopback has the ducks inside this process, and no wire to seal: "
                "leave out --key-file, or choose another transport"
            )

    def weights(self) -> tuple[float, ...]:
        """One number a duck: its slice is as wide as this is among all of them.

        Raises:
            ConfigError: weighted slices are asked for, and nobody has said how wide.
        """
        ducks = Ducks.parse(self.ducks)
        if self.placement == "weighted" and not ducks.weights:
            raise ConfigError(
                "--placement weighted needs weights: use a flock.toml for --ducks, with a "
                '"weight = 2", say, in each [[duck]]'
            )
        if self.placement == "equal" or not ducks.weights:
            return (1.0,) * ducks.count
        return ducks.weights

    def key_path(self) -> Path | None:
        """The file of the cluster's key, if one is given."""
        if self.key_file is None:
            return Ducks.parse(self.ducks).key_file
        return Path(self.key_file)

    def key_named(self) -> str:
        """Where that file was named, for errors."""
        return "--key-file" if self.key_file is not None else f"{self.ducks}: [host] key_file"


@dataclass(frozen=True)
class Network:
    """What a flock.toml says of the host's network; for the multicast transport."""

    # Names of the interfaces that multicasts go out of; none: whichever ducks are reached through.
    interfaces: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()  # one for each interface; none: chosen anew for each session
    mtu: int | None = None  # bytes a packet may have; None: found out

    @classmethod
    def parse(cls, path: Path, host: dict[str, Any]) -> Network:
        """Read the [host] table.

        Raises:
            ConfigError: a value that cannot be.
        """
        interfaces = _names(path, "interface", host.get("interface", []))
        groups = _names(path, "groups", host.get("groups", []))
        mtu = host.get("mtu")
        if groups and len(groups) != len(interfaces):
            raise ConfigError(
                f"{path}: [host] {len(groups)} groups for {len(interfaces)} interfaces: "
                'want one for each: interface = ["eth0"], groups = ["239.1.2.3"]'
            )
        try:
            for group in groups:
                group_address(group)
        except ConfigError as error:
            raise ConfigError(f"{path}: [host] {error}") from None
        if mtu is not None and (type(mtu) is not int or not MIN_MTU <= mtu <= MAX_MTU):
            raise ConfigError(f"{path}: [host] mtu {mtu!r}: want {MIN_MTU} to {MAX_MTU} bytes")
        return cls(interfaces, groups, mtu)


def _names(path: Path, key: str, value: Any) -> tuple[str, ...]:
    """One text or a list of texts, each once."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(name, str) and name for name in found):
        raise ConfigError(f"{path}: [host] {key} must be a text, or a list of texts")
    if len(set(found)) != len(found):
        raise ConfigError(f"{path}: [host] {key} names one twice")
    return tuple(found)


def group_address(text: str) -> tuple[str, int]:
    """GROUP or GROUP:PORT as a pair; port 0 if it is not given.

    Raises:
        ConfigError: no multicast address that can be used.
    """
    host, colon, port = text.partition(":")
    try:
        group = int(ipaddress.IPv4Address(host))
    except ValueError:
        group = 0
    # 224.0.0.x is for routers and never leaves a link's own protocols (RFC 5771).
    if (
        not 0xE0000100 <= group <= 0xEFFFFFFF
        or (colon and not (_is_number(port) and 0 < int(port) < 65536))
    ):  # fmt: skip
        raise ConfigError(
            f"group {text[:60]!r}: want an IPv4 multicast address of 224.0.1.0 to 239.255.255.255, "
            "perhaps with a port: 239.1.2.3 or 239.1.2.3:5000"
        )
    return host, int(port or 0)


@dataclass(frozen=True)
class Ducks:
    """Which ducks: `local` of them started by us, or running ones by address."""

    local: int | None
    addresses: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    key_file: Path | None = None
    network: Network = Network()
    weights: tuple[float, ...] = ()  # how wide each duck's slice is; none: nobody has said

    @classmethod
    def parse(cls, text: str) -> Ducks:
        """Read the value of --ducks.

        Raises:
            ConfigError: none of local:N, HOST:PORT[,HOST:PORT...] and FILE.toml.
        """
        if text.startswith("local:"):
            count = text.removeprefix("local:")
            if not (_is_number(count) and 1 <= int(count) <= MAX_LOCAL_DUCKS):
                raise ConfigError(
                    f"--ducks {text[:80]}: want local:N with N of 1..{MAX_LOCAL_DUCKS}"
                )
            return cls(int(count))
        if text.endswith(".toml"):
            return cls._from_file(Path(text))
        addresses = tuple(part.strip() for part in text.split(","))
        try:
            for address in addresses:
                split_address(address, lowest=1)
        except ConfigError as error:
            raise ConfigError(
                f"--ducks {text[:80]}: want local:N, HOST:PORT,HOST:PORT or FILE.toml ({error})"
            ) from None
        if len(set(addresses)) != len(addresses):
            raise ConfigError(f"--ducks {text}: an address appears twice")
        return cls(None, addresses, ("",) * len(addresses))

    @classmethod
    def _from_file(cls, path: Path) -> Ducks:
        try:
            with open_regular(path) as file:
                document = tomllib.loads(file.read().decode("utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"--ducks {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # no path, no UTF-8, or no TOML
            raise ConfigError(f"--ducks {path}: {error}") from error
        _known(path, "the file", document, {"host", "duck"})
        host = document.get("host", {})
        entries = document.get("duck", [])
        if not isinstance(host, dict):
            raise ConfigError(f"{path}: [host] must be a table")
        _known(path, "[host]", host, {"interface", "groups", "mtu", "key_file"})
        network = Network.parse(path, host)
        key_file = host.get("key_file")
        if key_file is not None and (not isinstance(key_file, str) or not key_file):
            raise ConfigError(f'{path}: [host] key_file must be a path: key_file = "pond.key"')
        if not isinstance(entries, list) or not entries:
            raise ConfigError(
                f"{path}: no [[duck]] in it; want one for each duck, with its address"
            )
        addresses, names, weights = [], [], []
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise ConfigError(f"{path}: [[duck]] {number} must be a table")
            _known(path, f"[[duck]] {number}", entry, {"name", "address", "weight"})
            address, name = entry.get("address"), entry.get("name", "")
            if not isinstance(address, str) or not isinstance(name, str):
                raise ConfigError(f'{path}: [[duck]] {number} wants address = "HOST:PORT"')
            weight = entry.get("weight", 1)
            if type(weight) not in (int, float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise ConfigError(f"{path}: [[duck]] {number}: weight {weight!r}: {WANT_WEIGHT}")
            try:
                split_address(address, lowest=1)
            except ConfigError as error:
                raise ConfigError(f"{path}: [[duck]] {number}: {error}") from None
            addresses.append(address)
            names.append(name)
            weights.append(float(weight))
        if len(set(addresses)) != len(addresses):
            raise ConfigError(f"{path}: an address appears twice")
        # A relative path is one beside the file that names it.
        key = path.parent / Path(key_file).expanduser() if key_file else None
        said = any("weight" in entry for entry in entries)
        return cls(
            None, tuple(addresses), tuple(names), key, network, tuple(weights) if said else ()
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """How errors name the ducks that have addresses."""
        pairs = zip(self.names, self.addresses, strict=True)
        return tuple(
            f"duck {number} ({name + ', ' if name else ''}{address})"
            for number, (name, address) in enumerate(pairs)
        )

    @property
    def short_names(self) -> tuple[str, ...]:
        """How traces name the ducks."""
        names = self.names or ("",) * self.count
        return tuple(f"duck {number} {name}".strip() for number, name in enumerate(names))

    @property
    def count(self) -> int:
        return len(self.addresses) if self.local is None else self.local


def _known(path: Path, where: str, table: dict[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise ConfigError(
            f"{path}: {where} has {', '.join(unknown)}; known are {', '.join(sorted(allowed))}"
        )


def split_address(text: str, lowest: int = 0) -> tuple[str, int]:
    """HOST:PORT as a pair, with [..] around an IPv6 host.

    lowest: the first port that will do; 0 is one to listen on, and cannot be connected to.

    Raises:
        ConfigError: anything else.
    """
    host, _, port = text.rpartition(":")
    if not host or not _is_number(port) or not lowest <= int(port) <= 65535:
        raise ConfigError(f"address {text[:80]!r}: want HOST:PORT with a port of {lowest}..65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
