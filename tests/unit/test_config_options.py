"""The values of --ducks and the other options: each is taken or refused with one clear line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from duck.config import (
    CHOICES,
    Ducks,
    Network,
    Options,
    group_address,
    is_loopback,
    split_address,
)
from duck.errors import ConfigError


def test_defaults() -> None:
    options = Options()
    assert options.ducks == "local:2"
    assert Ducks.parse(options.ducks) == Ducks(2)
    assert all(getattr(options, name) in ready for name, (ready, _) in CHOICES.items())


@pytest.mark.parametrize(
    ("option", "value"),
    [(name, value) for name, (ready, _) in CHOICES.items() for value in ready],
)
def test_what_works(option: str, value: str) -> None:
    assert getattr(Options(**{option: value}), option) == value


@pytest.mark.parametrize(
    ("option", "value"),
    [(name, value) for name, (_, planned) in CHOICES.items() for value in planned],
)
def test_what_comes_later(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{option} {value} is not built yet"):
        Options(**{option: value})


@pytest.mark.parametrize("option", CHOICES)
@pytest.mark.parametrize("value", ["pigeon", "", None, 5])
def test_what_nobody_knows(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{option} .*want one of"):
        Options(**{option: value})  # type: ignore[arg-type]


def test_loopback_needs_local_ducks() -> None:
    assert Options(transport="loopback", ducks="local:3").transport == "loopback"
    with pytest.raises(ConfigError, match="inside this process"):
        Options(transport="loopback", ducks="127.0.0.1:4000")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("local:1", Ducks(1)),
        ("local:64", Ducks(64)),
        ("pond:4000", Ducks(None, ("pond:4000",), ("",))),
        ("a:1, b:2", Ducks(None, ("a:1", "b:2"), ("", ""))),
        ("[::1]:4000", Ducks(None, ("[::1]:4000",), ("",))),
    ],
)
def test_ducks(text: str, found: Ducks) -> None:
    assert Ducks.parse(text) == found
    assert found.count == (found.local or len(found.addresses))


@pytest.mark.parametrize(
    "text",
    [
        "", "local", "local:", "local:0", "local:65", "local:-1", "local:two", "local:²",
        "local:1.5", "pond", "pond:", ":4000", "pond:65536", "pond:4000,", "pond:port", "a:1,a:1",
        "a:1,,b:2",
    ],
)  # fmt: skip
def test_ducks_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ducks.parse(text)
    assert "\n" not in str(caught.value)


def test_labels_name_ducks_as_the_user_does(tmp_path: Path) -> None:
    assert Ducks.parse("a:1,b:2").labels == ("duck 0 (a:1)", "duck 1 (b:2)")
    flock = tmp_path / "flock.toml"
    flock.write_text(
        '[[duck]]\nname = "grey"\naddress = "a:1"\n[[duck]]\naddress = "b:2"\nweight = 1\n'
    )
    ducks = Ducks.parse(str(flock))
    assert ducks.addresses == ("a:1", "b:2")
    assert ducks.labels == ("duck 0 (grey, a:1)", "duck 1 (b:2)")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", r"no \[\[duck\]\]"),
        ("duck = 5", r"no \[\[duck\]\]"),
        ("duck = [5]", "must be a table"),
        ("host = 5", r"\[host\] must be a table"),
        ("[[duck]\n", "flock.toml"),
        ("[[duck]]\nname = 'a'", "wants address"),
        ("[[duck]]\naddress = 4000", "wants address"),
        (
            "[[duck]]\naddress = 'pond'",
            r"flock.toml: \[\[duck\]\] 0: address 'pond': want HOST:PORT",
        ),
        ("[[duck]]\naddress = 'a:0'", r"flock.toml: \[\[duck\]\] 0: .* a port of 1..65535"),
        ("[[duck]]\naddress = 'a:1'\n[[duck]]\naddress = 'a:1'", "appears twice"),
        ("[[duck]]\naddress = 'a:1'\nport = 5", "has port; known are"),
        ("pond = 1\n[[duck]]\naddress = 'a:1'", "has pond; known are"),
        ("[host]\nhens = 1\n[[duck]]\naddress = 'a:1'", "has hens; known are"),
        ("[host]\ninterface = 5\n[[duck]]\naddress = 'a:1'", "interface must be a text, or a list"),
        ("[host]\ninterface = ['a', 'a']\n[[duck]]\naddress = 'a:1'", "interface names one twice"),
        ("[host]\ngroups = ['239.1.2.3']\n[[duck]]\naddress = 'a:1'", "1 groups for 0 interfaces"),
        (
            "[host]\ninterface = 'a'\ngroups = 'pond'\n[[duck]]\naddress = 'a:1'",
            r"flock.toml: \[host\] group 'pond': want an IPv4 multicast address",
        ),
        ("[host]\nmtu = 100\n[[duck]]\naddress = 'a:1'", "mtu 100: want 576 to 9216"),
        ("[host]\nmtu = true\n[[duck]]\naddress = 'a:1'", "mtu True: want 576"),
        ("[host]\nkey_file = 5\n[[duck]]\naddress = 'a:1'", "key_file must be a path"),
        ("[host]\nkey_file = ''\n[[duck]]\naddress = 'a:1'", "key_file must be a path"),
        ("[[duck]]\naddress = '\udce4:1'", "flock.toml"),  # not UTF-8
    ],
)
def test_flock_files_that_cannot_be_used(tmp_path: Path, text: str, told: str) -> None:
    flock = tmp_path / "flock.toml"
    flock.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=told):
        Ducks.parse(str(flock))


def test_the_hosts_network(tmp_path: Path) -> None:
    flock = tmp_path / "flock.toml"
    flock.write_text(
        '[host]\ninterface = ["eth0", "eth1"]\ngroups = ["239.1.2.3", "239.1.2.4:5000"]\n'
        'mtu = 9000\n[[duck]]\naddress = "a:1"\n'
    )
    network = Ducks.parse(str(flock)).network
    assert network == Network(("eth0", "eth1"), ("239.1.2.3", "239.1.2.4:5000"), 9000)
    assert [group_address(group) for group in network.groups] == [
        ("239.1.2.3", 0), ("239.1.2.4", 5000)
    ]  # fmt: skip
    flock.write_text('[host]\ninterface = "eth0"\n[[duck]]\naddress = "a:1"\n')
    assert Ducks.parse(str(flock)).network == Network(("eth0",))
    assert Ducks.parse("a:1").network == Network()


@pytest.mark.parametrize(
    "text",
    [
        "", "pond", "10.0.0.1", "224.0.0.251", "240.0.0.1", "239.1.2", "239.1.2.3:",
        "239.1.2.3:0", "239.1.2.3:65536", "239.1.2.3:port", "ff02::1", "239.1.2.3:5000:1",
    ],
)  # fmt: skip
def test_groups_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"want an IPv4 multicast address of 224\.0\.1\.0"):
        group_address(text)


def test_where_the_key_is(tmp_path: Path) -> None:
    flock = tmp_path / "flock.toml"
    flock.write_text('[host]\nkey_file = "pond.key"\n[[duck]]\naddress = "a:1"\n')
    assert Options(ducks=str(flock)).key_path() == tmp_path / "pond.key"
    assert Options(ducks=str(flock), key_file="other.key").key_path() == Path("other.key")
    flock.write_text('[host]\nkey_file = "/etc/pond.key"\n[[duck]]\naddress = "a:1"\n')
    assert Options(ducks=str(flock)).key_path() == Path("/etc/pond.key")
    flock.write_text('[host]\nkey_file = "~/pond.key"\n[[duck]]\naddress = "a:1"\n')
    assert Options(ducks=str(flock)).key_path() == Path.home() / "pond.key"
    assert Options().key_path() is None


def test_flock_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        Ducks.parse(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml: it is a folder"):
        Ducks.parse(str(tmp_path / "folder.toml"))
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(ConfigError, match=r"pipe\.toml: it is a pipe, want a regular file"):
        Ducks.parse(str(tmp_path / "pipe.toml"))
    (tmp_path / "latin.toml").write_bytes(b"# \xe4\n")
    with pytest.raises(ConfigError, match=r"latin\.toml: 'utf-8' codec"):
        Ducks.parse(str(tmp_path / "latin.toml"))


def test_split_address() -> None:
    assert split_address("127.0.0.1:0") == ("127.0.0.1", 0)
    assert split_address("[fe80::1]:65535") == ("fe80::1", 65535)


def test_what_only_this_machine_reaches() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.3.4.5", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "pond", "127.0.0.1.evil", ""]))


@pytest.mark.parametrize("ducks", [5, None, ["h:1"], "\0.toml"])
def test_ducks_of_the_wrong_kind(ducks: Any) -> None:
    with pytest.raises(ConfigError, match="--ducks"):
        Options(ducks=ducks)


@pytest.mark.parametrize("length", ["5", 5.0, True])
def test_a_length_is_a_whole_number(length: Any) -> None:
    with pytest.raises(ConfigError, match=r"--max-len .*: want a whole number"):
        Options(max_len=length)


FLOCK = "".join(f'[[duck]]\naddress = "pond:{n}"\n' for n in (1, 2)) + "{}\n"


def test_a_flock_file_that_begins_with_a_mark(tmp_path: Path) -> None:
    """As some editors write UTF-8."""
    file = tmp_path / "flock.toml"
    file.write_text(FLOCK.format(""), encoding="utf-8-sig")
    assert Ducks.parse(str(file)).addresses == ("pond:1", "pond:2")


@pytest.mark.parametrize(
    "weight", ["0", "-1", "inf", "nan", "true", '"2"', "[]", "1e300", "1e-300", "9" * 400]
)
def test_weights_that_are_none(tmp_path: Path, weight: str) -> None:
    file = tmp_path / "flock.toml"
    file.write_text(FLOCK.format(f"weight = {weight}"))
    with pytest.raises(ConfigError, match=r"flock.toml: \[\[duck\]\] 1: weight .*: want a number"):
        Ducks.parse(str(file))


def test_weights(tmp_path: Path) -> None:
    """They count as soon as one duck has one, unless equal slices are asked for."""
    file = tmp_path / "flock.toml"
    file.write_text(FLOCK.format("weight = 2.5"))
    for placement, weights in (("auto", (1, 2.5)), ("weighted", (1, 2.5)), ("equal", (1, 1))):
        assert Options(ducks=str(file), placement=placement).weights() == weights
    file.write_text(FLOCK.format(""))
    for ducks in (str(file), "local:2", "a:1,b:2"):
        assert Options(ducks=ducks).weights() == Options(ducks=ducks, placement="equal").weights()
        assert Options(ducks=ducks).weights() == (1, 1)
        with pytest.raises(ConfigError, match="--placement weighted needs weights"):
            Options(ducks=ducks, placement="weighted").weights()
