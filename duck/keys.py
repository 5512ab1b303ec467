"""The cluster key: 32 random bytes in a file that a host and all its ducks have, and HKDF over it.

Whoever has the file may be a host or a duck of this cluster; whoever lacks it may be nothing. The
key itself never travels and encrypts nothing: everything in use is derived from it, each for one
purpose (docs/security.md). Pure but for the file.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from duck.errors import ConfigError
from duck.files import open_regular

KEY_BYTES = 32
# A file is read no further than this: a key is 44 characters and the end of the line.
_FILE_BYTES = 200
# 32 random bytes have about 30 different values; so few is no accident, it is somebody's zeros.
_DIFFERENT = 12
# In front of every purpose: a key of another program, or of a later scheme, gives other bytes.
_SCHEME = "duck v1 "


def hkdf(key: bytes, *, salt: bytes, info: bytes, nbytes: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869), extract and expand."""
    return HKDF(SHA256(), nbytes, salt, info).derive(key)


class ClusterKey:
    """What a host and its ducks share; its bytes show in no repr and no log."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == KEY_BYTES
        self._secret = secret

    def __repr__(self) -> str:
        return f"ClusterKey({self.fingerprint})"

    def derive(self, purpose: str, salt: bytes = b"", nbytes: int = 32) -> bytes:
        """Bytes for one purpose; nothing about the key or other purposes follows from them."""
        return hkdf(self._secret, salt=salt, info=(_SCHEME + purpose).encode(), nbytes=nbytes)

    @property
    def fingerprint(self) -> str:
        """Eight hex digits by which people tell keys apart; no secret."""
        return self.derive("fingerprint", nbytes=4).hex()

    @classmethod
    def create(cls, path: Path) -> ClusterKey:
        """A new random key, written to a new file that only its owner may read.

        Raises:
            ConfigError: the file exists already, or cannot be written.
        """
        secret = secrets.token_bytes(KEY_BYTES)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ConfigError(
                f"{path} exists already, and a key that is overwritten locks its ducks out: "
                "give another name, or remove it first"
            ) from None
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot write the key to {path}: {why}") from error
        with os.fdopen(handle, "wb") as file:
            file.write(base64.b64encode(secret) + b"\n")
            file.flush()
            os.fsync(handle)
        return cls(secret)

    @classmethod
    def read(cls, path: Path, named: str = "--key-file") -> ClusterKey:
        """The key in a file.

        named: where the path was given, for errors.

        Raises:
            ConfigError: no such file, others may read it, or it holds no key.
        """
        try:
            with open_regular(path) as file:
                # Of the open file, so that it cannot be exchanged in between.
                found = os.fstat(file.fileno())
                if os.name == "posix" and found.st_mode & 0o077:
                    raise ConfigError(
                        f"{named} {path} may be read or changed by others "
                        f"(mode {stat.S_IMODE(found.st_mode):04o}): chmod 600 {path}"
                    )
                text = file.read(_FILE_BYTES)
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{named} {path}: {why}; make one with: duck key {path}") from error
        return cls(_secret_in(text, f"{named} {path}"))


def _secret_in(text: bytes, what: str) -> bytes:
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except binascii.Error:
        raise ConfigError(
            f"{what} holds no key: want one line of base64, as duck key writes it"
        ) from None
    if len(secret) != KEY_BYTES:
        raise ConfigError(
            f"{what} holds {len(secret)} bytes of key, want {KEY_BYTES}: "
            "make one with: duck key FILE"
        )
    if len(set(secret)) < _DIFFERENT:
        raise ConfigError(f"{what} holds bytes that are not random: make one with: duck key FILE")
    return secret
