"""TLS 1.3 for the control plane, over memory: bytes in, bytes out, no socket.

Both ends show a certificate. Its issuer is a CA whose private key is derived from the cluster key:
whoever has the cluster key makes the same CA, and nobody else can. There is nothing to hand out, to
renew or to revoke: every process makes itself a fresh certificate when it starts, and forgets it
when it ends. A certificate is a host's or a duck's (its extended key usage: TLS clients are hosts,
servers are ducks), so what one role shows does not pass for the other. No name is checked: to be of
the cluster is the identity.

The certificates' validity begins before any clock and does not end: ducks without a battery for
theirs start in 1970, and a certificate that dies with its process needs no date.
"""

from __future__ import annotations

import datetime
import secrets
import ssl
import tempfile
from enum import Enum
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from duck import wire
from duck.errors import WireError
from duck.keys import ClusterKey

_ALWAYS = (datetime.datetime(1950, 1, 2), datetime.datetime(9999, 12, 31, 23, 59, 59))
_CA = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "duck cluster")])
_READ_BYTES = 1 << 16
# A handshake's record, where in it the kind of message is, and the client's first (RFC 8446).
_RECORD, _HANDSHAKE, _CLIENT_HELLO = 22, 5, 1


class Role(Enum):
    """Which end of a control connection a certificate is for."""

    HOST = "host"
    DUCK = "duck"


# --- certificates


def ca_key(key: ClusterKey) -> Ed25519PrivateKey:
    """The CA's private key: the same on every machine that has the cluster key."""
    return Ed25519PrivateKey.from_private_bytes(key.derive("ca ed25519"))


def _certificate(
    subject: x509.Name, public: Ed25519PublicKey, ca: Ed25519PrivateKey, serial: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(
            issuer_name=_CA,
            subject_name=subject,
            public_key=public,
            serial_number=serial,
            not_valid_before=_ALWAYS[0],
            not_valid_after=_ALWAYS[1],
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False
        )
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates,
        crl_sign=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def ca_certificate(ca: Ed25519PrivateKey) -> x509.Certificate:
    """The CA's own certificate; Ed25519 signs the same text the same way, so all have the same."""
    return (
        _certificate(_CA, ca.public_key(), ca, serial=1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(ca, None)
    )


def leaf_certificate(
    ca: Ed25519PrivateKey, public: Ed25519PublicKey, role: Role
) -> x509.Certificate:
    """A certificate for one process."""
    usage = {
        Role.HOST: ExtendedKeyUsageOID.CLIENT_AUTH, Role.DUCK: ExtendedKeyUsageOID.SERVER_AUTH,
    }[role]  # fmt: skip
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"duck {role.value}")])
    return (
        _certificate(subject, public, ca, x509.random_serial_number())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        .sign(ca, None)
    )


def _context(key: ClusterKey, role: Role) -> ssl.SSLContext:
    """TLS 1.3 only, both sides verified, nothing resumed."""
    ca, own = ca_key(key), Ed25519PrivateKey.generate()
    server = role is Role.DUCK
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_certificate(ca).public_bytes(Encoding.DER))
    if server:
        context.num_tickets = 0  # every session shows its certificate
    # The ssl module takes a key from a file only: it is there for a moment, encrypted under a
    # password that never leaves this function, in a folder that nobody else may enter.
    password = secrets.token_bytes(32).hex().encode()
    pem = leaf_certificate(ca, own.public_key(), role).public_bytes(Encoding.PEM)
    pem += own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password))
    with tempfile.TemporaryDirectory(prefix="duck-") as folder:
        path = Path(folder, "leaf.pem")
        path.write_bytes(pem)
        context.load_cert_chain(path, password=password)
    return context


class Credentials:
    """What one process shows and believes in its role; made once, good for all its connections."""

    def __init__(self, key: ClusterKey, role: Role) -> None:
        self.key, self.role = key, role
        self.context = _context(key, role)

    def connection(self) -> Tls:
        """One end of a new connection."""
        return Tls(self)


# --- one connection


class Tls:
    """One end of a TLS connection.

    After every call, what `to_send` gives belongs on the wire; also after one that raised, which is
    how the peer hears why.
    """

    def __init__(self, own: Credentials) -> None:
        self._own = own
        server = own.role is Role.DUCK
        self._peer = "host" if server else "duck"
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = own.context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        self.ready = False
        self._broken = False
        self._unsent: list[bytes] = []  # said before the handshake was over
        self._begin: bytearray | None = bytearray()  # until it is long enough to be judged
        self._shake_hands()

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take what came; what the peer said with it.

        Raises:
            WireError: the peer has no certificate of this cluster and role, or speaks no TLS 1.3.
        """
        if self._begin is not None:
            self._begin += data
            if len(self._begin) < wire.TELLING_BYTES:
                return b""
            if not self._is_judged(self._begin):
                return b""
            if not wire.looks_like_tls(self._begin):
                self._broken = True
                if wire.first_words(self._begin) or not wire.looks_like_control(self._begin):
                    raise wire.Foreign(wire.shown(self._begin))
                raise WireError(
                    f"the {self._peer} uses no key, this {self._own.role.value} does: "
                    "give both the same --key-file"
                )
            data, self._begin = self._begin, None
        self._incoming.write(data)
        if not self.ready:
            self._shake_hands()
        if not self.ready:
            return b""
        pieces = []
        try:
            while piece := self._object.read(_READ_BYTES):
                pieces.append(piece)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except ssl.SSLError as error:
            raise self._wrong(error) from None
        return b"".join(pieces)

    def _is_judged(self, begin: bytearray) -> bool:
        """Whether these first bytes tell what the peer speaks.

        Raises:
            Foreign: nothing of ours.
        """
        if not wire.looks_like_tls(begin):
            return bool(wire.first_words(begin)) or len(begin) >= wire.OPENING_BYTES
        if len(begin) <= _HANDSHAKE:
            return False
        own = self._own.role is Role.HOST and begin[0] == _RECORD
        if own and begin[_HANDSHAKE] == _CLIENT_HELLO:  # which only we say
            self._broken = True
            raise wire.Foreign(wire.ECHO)
        return True

    def write(self, data: bytes) -> None:
        """Say something: now, or once the handshake is over; nothing on a broken connection."""
        if self._broken:
            return
        if self.ready:
            self._object.write(data)
        else:
            self._unsent.append(data)

    def to_send(self) -> bytes:
        return self._outgoing.read()

    def _shake_hands(self) -> None:
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return
        except ssl.SSLError as error:
            raise self._wrong(error) from None
        self.ready = True
        for data in self._unsent:
            self._object.write(data)
        self._unsent.clear()

    def _wrong(self, error: ssl.SSLError) -> WireError:
        """Why it failed, in words that say what to change."""
        self._broken = True
        reason = (error.reason or str(error)).lower().replace("_", " ")
        if isinstance(error, ssl.SSLCertVerificationError) or "alert" in reason:
            return WireError(
                f"the {self._peer} has another key than this {self._own.role.value}, whose key is "
                f"{self._own.key.fingerprint}: copy the same key file to both ({reason})"
            )
        return WireError(f"no TLS 1.3 with this {self._peer}: {reason}")
