"""TLS over memory: who is let in, who is not, and what each is told; no socket, no clock."""

from __future__ import annotations

import contextlib
import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from duck import wire
from duck.errors import WireError
from duck.keys import ClusterKey
from duck.transports import tls
from duck.transports.tls import Credentials, Role, Tls

KEY, OTHER = ClusterKey(bytes(range(32))), ClusterKey(bytes(range(1, 33)))
HOST, DUCK = Credentials(KEY, Role.HOST), Credentials(KEY, Role.DUCK)


class Hostile(Credentials):
    """Shows what it is told to (or nothing), and believes anything."""

    def __init__(self, role: Role, chain: bytes = b"", folder: Path = Path()) -> None:
        self.key, self.role = OTHER, role
        self.context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if role is Role.DUCK else ssl.PROTOCOL_TLS_CLIENT
        )
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        if chain:
            path = folder / "chain.pem"
            path.write_bytes(chain)
            self.context.load_cert_chain(path)


class Ends:
    """Both ends of a connection; `turn` carries what each has to say, `said` is what came out."""

    def __init__(self, host: Credentials, duck: Credentials) -> None:
        self.host, self.duck = Tls(host), Tls(duck)
        self.said: dict[Tls, bytes] = {self.host: b"", self.duck: b""}
        self.errors: dict[Tls, str] = {}

    def turn(self, cut: int = 1 << 20) -> None:
        for _ in range(50):
            moved = False
            for one, other in ((self.host, self.duck), (self.duck, self.host)):
                data = one.to_send()
                for start in range(0, len(data), cut):
                    moved = True
                    if other in self.errors:
                        break
                    try:
                        self.said[other] += other.feed(data[start : start + cut])
                    except WireError as error:
                        self.errors[other] = str(error)
            if not moved:
                return
        raise AssertionError("they go on for ever")


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_both_are_of_the_cluster(cut: int) -> None:
    ends = Ends(HOST, DUCK)
    ends.host.write(b"hello")  # before the handshake is over
    assert not ends.host.ready
    ends.turn(cut)
    assert ends.host.ready
    assert ends.duck.ready
    assert ends.said[ends.duck] == b"hello"
    ends.duck.write(b"x" * 300_000)
    ends.turn(1 << 16)
    assert ends.said[ends.host] == b"x" * 300_000
    assert ends.duck._object.version() == "TLSv1.3"
    assert not ends.errors


def test_nothing_can_be_read_on_the_way() -> None:
    ends = Ends(HOST, DUCK)
    ends.turn()
    ends.host.write(b"the pond is warm today")
    assert b"the pond" not in ends.host.to_send()


def test_another_process_of_the_same_cluster() -> None:
    """Each made its own certificate, on a machine that never heard of the other."""
    again = ClusterKey(bytes(range(32)))
    ends = Ends(Credentials(again, Role.HOST), DUCK)
    ends.turn()
    assert ends.host.ready
    assert not ends.errors


@pytest.mark.parametrize("wrong", [Role.HOST, Role.DUCK])
def test_another_key(wrong: Role) -> None:
    host = Credentials(OTHER, Role.HOST) if wrong is Role.HOST else HOST
    ends = Ends(host, Credentials(OTHER, Role.DUCK) if wrong is Role.DUCK else DUCK)
    ends.host.write(b"secret")
    ends.turn()
    for end, words in (
        (ends.host, "the duck has another key than this host, whose key is"),
        (ends.duck, "the host has another key than this duck, whose key is"),
    ):
        assert words in ends.errors[end]
        assert f"{end._own.key.fingerprint}: copy the same key file to both" in ends.errors[end]
    assert not any(ends.said.values())


def _showing(role: Role, folder: Path, *chain: x509.Certificate, own: Ed25519PrivateKey) -> Ends:
    """A connection whose one end shows these certificates."""
    pem = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    pem += own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    end = Hostile(role, pem, folder)
    return Ends(HOST, end) if role is Role.DUCK else Ends(end, DUCK)


@pytest.mark.parametrize("role", Role)
def test_one_role_does_not_pass_for_the_other(role: Role, tmp_path: Path) -> None:
    """A duck's certificate, though of this cluster, does not let a host in, nor the other way."""
    ca, own = tls.ca_key(KEY), Ed25519PrivateKey.generate()
    mine = _showing(role, tmp_path, tls.leaf_certificate(ca, own.public_key(), role), own=own)
    mine.turn()
    assert not mine.errors  # else the rest shows nothing
    other = Role.HOST if role is Role.DUCK else Role.DUCK
    pose = tls.leaf_certificate(ca, own.public_key(), other)
    posing = _showing(role, tmp_path, pose, own=own)
    posing.host.write(b"secret")
    posing.turn()
    assert posing.errors[posing.host if role is Role.DUCK else posing.duck]
    assert not any(posing.said.values())


def test_a_certificate_of_a_ca_that_only_has_the_same_name(tmp_path: Path) -> None:
    own = Ed25519PrivateKey.generate()
    forged = tls.leaf_certificate(Ed25519PrivateKey.generate(), own.public_key(), Role.HOST)
    ends = _showing(Role.HOST, tmp_path, forged, own=own)
    ends.host.write(b"secret")
    ends.turn()
    assert ends.errors[ends.duck]
    assert not any(ends.said.values())


def test_a_leaf_cannot_issue_certificates(tmp_path: Path) -> None:
    ca, middle, own = tls.ca_key(KEY), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    stolen = tls.leaf_certificate(ca, middle.public_key(), Role.HOST)
    made = tls.leaf_certificate(middle, own.public_key(), Role.HOST)
    ends = _showing(Role.HOST, tmp_path, made, stolen, own=own)
    ends.turn()
    assert ends.errors[ends.duck]


def test_a_peer_without_a_certificate() -> None:
    ends = Ends(Hostile(Role.HOST), DUCK)
    ends.host.write(b"let me in")
    ends.turn()
    assert "did not return a certificate" in ends.errors[ends.duck]
    assert not any(ends.said.values())


def test_an_older_tls() -> None:
    host = Hostile(Role.HOST)
    host.context.maximum_version = ssl.TLSVersion.TLSv1_2
    ends = Ends(host, DUCK)
    ends.turn()
    assert "no TLS 1.3 with this host: unsupported protocol" in ends.errors[ends.duck]


def test_a_duck_that_answers_in_the_clear() -> None:
    host = Tls(HOST)
    assert host.feed(b"\x16") == b""  # too little to tell
    with pytest.raises(WireError, match="the duck uses no key, this host does: give both the same"):
        host.feed(b"\0\0\0\x81")


def test_tls_and_control_messages_begin_differently() -> None:
    assert wire.looks_like_tls(Tls(HOST).to_send())
    ends = Ends(HOST, Credentials(OTHER, Role.DUCK))
    ends.duck.feed(ends.host.to_send())
    assert wire.looks_like_tls(ends.duck.to_send())
    # A control message's length, for all greetings that are: see the comment there.
    assert not any(wire.looks_like_tls(size.to_bytes(4, "little")) for size in range(66_000))
    assert not wire.looks_like_tls(b"GET / HTTP/1.1")
    assert not wire.looks_like_tls(b"SSH-2.0")


@given(st.binary(min_size=3, max_size=2000), st.booleans())
def test_any_bytes_are_refused_or_waited_for(data: bytes, begins_well: bool) -> None:
    data = b"\x16\x03\x01" + data if begins_well else data
    for context in (HOST, DUCK):
        end = Tls(context)
        with contextlib.suppress(WireError):
            assert end.feed(data) == b""
        assert not end.ready


@given(st.data())
def test_a_handshake_with_one_wrong_byte(data: st.DataObject) -> None:
    """It fails on one side at least, and nothing that was said gets through."""
    ends = Ends(HOST, DUCK)
    ends.host.write(b"secret")
    hello = bytearray(ends.host.to_send())
    # From the record's body on: its outer version is not part of what is signed.
    at = data.draw(st.integers(5, len(hello) - 1))
    hello[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        ends.duck.feed(hello)
    except WireError as error:
        ends.errors[ends.duck] = str(error)
    ends.turn()
    assert not ends.duck.ready
    assert not ends.said[ends.duck]


def test_the_ca_is_the_same_everywhere_and_always_valid() -> None:
    one, two = (tls.ca_certificate(tls.ca_key(ClusterKey(bytes(range(32))))) for _ in range(2))
    assert one == two
    assert one != tls.ca_certificate(tls.ca_key(OTHER))
    unset_clock = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    leaf = tls.leaf_certificate(
        tls.ca_key(KEY), Ed25519PrivateKey.generate().public_key(), Role.DUCK
    )
    for certificate in (one, leaf):
        assert certificate.not_valid_before_utc < unset_clock
        assert certificate.not_valid_after_utc.year == 9999


def test_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written = []
    real = Path.write_bytes

    def spy(path: Path, data: bytes) -> int:
        written.append((path, data, path.parent.stat().st_mode & 0o777))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", spy)
    Credentials(KEY, Role.DUCK)
    ((path, data, mode),) = written
    assert path.is_relative_to(tmp_path)
    assert mode == 0o700
    assert b"ENCRYPTED PRIVATE KEY" in data
    assert list(tmp_path.iterdir()) == []
