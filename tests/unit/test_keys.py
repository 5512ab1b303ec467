"""The cluster key: HKDF against RFC 5869's own numbers, and files that are keys or are refused."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest

from duck.errors import ConfigError
from duck.keys import KEY_BYTES, ClusterKey, hkdf

KEY = ClusterKey(bytes(range(32)))


@pytest.mark.parametrize(
    ("key", "salt", "info", "expected"),
    [  # RFC 5869, A.1 to A.3
        (
            "0b" * 22, bytes(range(0x0D)).hex(), bytes(range(0xF0, 0xFA)).hex(),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(0x50)).hex(), bytes(range(0x60, 0xB0)).hex(),
            bytes(range(0xB0, 0x100)).hex(),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb"
            "41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
        ),
        (
            "0b" * 22, "", "",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)  # fmt: skip
def test_hkdf_gives_the_numbers_of_rfc_5869(key: str, salt: str, info: str, expected: str) -> None:
    ikm, salted, purpose = (bytes.fromhex(text) for text in (key, salt, info))
    found = hkdf(ikm, salt=salted, info=purpose, nbytes=len(expected) // 2)
    assert found.hex() == expected


def test_every_purpose_and_salt_and_key_gives_other_bytes() -> None:
    other = ClusterKey(bytes(range(1, 33)))
    found = {
        key.derive(purpose, salt)
        for key in (KEY, other)
        for purpose in ("a", "b", "a b")
        for salt in (b"", b"x", b"xa")
    }
    assert len(found) == 18
    assert all(len(value) == 32 for value in found)


def test_a_key_shows_only_its_fingerprint() -> None:
    assert repr(KEY) == f"ClusterKey({KEY.fingerprint})"
    assert len(KEY.fingerprint) == 8
    assert KEY.fingerprint != ClusterKey(bytes(range(1, 33))).fingerprint


def test_a_made_key_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "pond.key"
    made = ClusterKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ClusterKey.read(path).derive("x") == made.derive("x")
    assert ClusterKey.create(tmp_path / "other.key").derive("x") != made.derive("x")


def test_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        ClusterKey.create(tmp_path / "pond.key")
    finally:
        os.umask(before)
    ClusterKey.read(tmp_path / "pond.key")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "pond.key"
    ClusterKey.create(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        ClusterKey.create(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["none/pond.key", "x" * 300, "a\0b"])
def test_where_no_key_can_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot write the key"):
        ClusterKey.create(tmp_path / name)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o777])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pond.key"
    ClusterKey.create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}") as caught:
        ClusterKey.read(path)
    assert "\n" not in str(caught.value)
    path.chmod(0o600)
    ClusterKey.read(path)


RANDOM = base64.b64encode(os.urandom(KEY_BYTES))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "0 bytes of key"),
        (base64.b64encode(os.urandom(31)), "31 bytes of key"),
        (base64.b64encode(os.urandom(33)), "33 bytes of key"),
        (base64.b64encode(bytes(32)), "not random"),
        (b"A" * 43, "holds no key"),
        (RANDOM[:20] + b"\n" + RANDOM[20:], "holds no key"),
        (RANDOM + b"\nmore", "holds no key"),
        (RANDOM.replace(RANDOM[:1], b"!", 1), "holds no key"),
        (b"\xff\xfe" + RANDOM, "holds no key"),
        (RANDOM * 1000, "holds no key"),
        (b"-----BEGIN PRIVATE KEY-----", "holds no key"),
        (os.urandom(32).hex().encode(), "48 bytes of key"),
    ],
)
def test_files_that_are_no_key(tmp_path: Path, text: bytes, told: str) -> None:
    path = tmp_path / "pond.key"
    path.write_bytes(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=told) as caught:
        ClusterKey.read(path)
    assert "\n" not in str(caught.value)
    assert (
        text.decode("latin1")[:20] not in str(caught.value) or not text
    )  # what it holds is secret


def test_space_around_a_key_is_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "pond.key"
    path.write_bytes(b"  " + RANDOM + b"\r\n\n")
    path.chmod(0o600)
    assert ClusterKey.read(path).derive("x") == ClusterKey(base64.b64decode(RANDOM)).derive("x")


def test_no_file_is_no_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*duck key"):
        ClusterKey.read(tmp_path / "none.key")
    with pytest.raises(ConfigError, match="it is a folder, want a regular file"):
        ClusterKey.read(tmp_path)
    with pytest.raises(ConfigError, match="it is a device, want"):
        ClusterKey.read(Path(os.devnull))
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ConfigError, match="pipe: it is a pipe, want a regular file; make one"):
        ClusterKey.read(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="key-file"):
        ClusterKey.read(Path("a\0b"))
