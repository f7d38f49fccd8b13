"""Sealing bytes under a passphrase, for keys and backups at rest.

::

    magic 17 | salt 16 | nonce 12 | AES-256-GCM ciphertext and tag

The key is scrypt(passphrase, salt) with N = 2^17, r = 8, p = 1: 128 MiB and about half a second
for each guess (the setting that OWASP's password storage sheet names first).
"""

from __future__ import annotations

import os
import unicodedata

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedcore.errors import ConfigError, TrustError

MAGIC = b"fedcore sealed 1\n"
MIN_PASSPHRASE = 12
"""Characters: fewer can be guessed however slow one guess is."""
OVERHEAD_BYTES = len(MAGIC) + 16 + 12 + 16
_SALT, _NONCE = 16, 12
_COST = 1 << 17  # N


def is_sealed(raw: bytes) -> bool:
    """Whether bytes are what `seal` makes, to judge by their beginning."""
    return raw.startswith(MAGIC)


def seal(data: bytes, passphrase: str) -> bytes:
    """Encrypts and authenticates ``data``.

    Raises:
        ConfigError: the passphrase is shorter than `MIN_PASSPHRASE`.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(
            f"passphrase: it has {len(passphrase)} characters, expected {MIN_PASSPHRASE} or more. "
            "Nothing was written; choose a longer one, such as five random words."
        )
    head = MAGIC + os.urandom(_SALT)
    nonce = os.urandom(_NONCE)
    return head + nonce + AESGCM(_derive(passphrase, head)).encrypt(nonce, data, head)


def unseal(raw: bytes, passphrase: str, *, where: str) -> bytes:
    """What was sealed.

    Raises:
        TrustError: it is not sealed, was altered or cut, or the passphrase is another.
    """
    head, rest = raw[: len(MAGIC) + _SALT], raw[len(MAGIC) + _SALT :]
    try:
        if not is_sealed(raw) or len(raw) < OVERHEAD_BYTES:
            raise InvalidTag
        return AESGCM(_derive(passphrase, head)).decrypt(rest[:_NONCE], rest[_NONCE:], head)
    except InvalidTag:
        raise TrustError(
            f"{where}: this cannot be opened: the passphrase is not the one it was sealed with, "
            "or the file was altered or cut short. Nothing was changed; try again with the right "
            "passphrase, or another copy."
        ) from None


def _derive(passphrase: str, head: bytes) -> bytes:
    secret = unicodedata.normalize("NFC", passphrase).encode()  # keyboards differ in how they type
    return Scrypt(salt=head[len(MAGIC) :], length=32, n=_COST, r=8, p=1).derive(secret)
