"""Encrypts bytes with a passphrase, for stored keys and backups.

::

    magic 17 | salt 16 | nonce 12 | AES-256-GCM ciphertext and tag

The key is scrypt(passphrase, salt) with N = 2^17, r = 8, p = 1: 128 MiB and about half a second
for each guess (the first scrypt setting in OWASP's password storage cheat sheet).
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
"""Least characters: a shorter passphrase can be guessed however slow one guess is."""
OVERHEAD_BYTES = len(MAGIC) + 16 + 12 + 16
_SALT, _NONCE = 16, 12
_COST = 1 << 17  # N


def is_encrypted(raw: bytes) -> bool:
    """Returns whether bytes begin as the output of `encrypt` does."""
    return raw.startswith(MAGIC)


def encrypt(data: bytes, passphrase: str) -> bytes:
    """Encrypts and authenticates ``data`` with a passphrase.

    Raises:
        ConfigError: the passphrase is shorter than `MIN_PASSPHRASE`.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(
            f"passphrase: got {len(passphrase)} characters, expected {MIN_PASSPHRASE} or more. "
            "Nothing was written; choose a longer one, e.g. five random words."
        )
    head = MAGIC + os.urandom(_SALT)
    nonce = os.urandom(_NONCE)
    return head + nonce + AESGCM(_derive(passphrase, head)).encrypt(nonce, data, head)


def decrypt(raw: bytes, passphrase: str, *, where: str) -> bytes:
    """Decrypts the output of `encrypt`.

    Raises:
        TrustError: the bytes are not sealed, altered or cut short, or the passphrase is wrong.
    """
    head, rest = raw[: len(MAGIC) + _SALT], raw[len(MAGIC) + _SALT :]
    try:
        if not is_encrypted(raw) or len(raw) < OVERHEAD_BYTES:
            raise InvalidTag
        return AESGCM(_derive(passphrase, head)).decrypt(rest[:_NONCE], rest[_NONCE:], head)
    except InvalidTag:
        raise TrustError(
            f"{where}: decryption failed: the passphrase is wrong, or the file was altered or "
            "truncated. Nothing was changed; try again with the right passphrase, or with "
            "another copy."
        ) from None


def _derive(passphrase: str, head: bytes) -> bytes:
    secret = unicodedata.normalize("NFC", passphrase).encode()  # keyboards encode accents variously
    return Scrypt(salt=head[len(MAGIC) :], length=32, n=_COST, r=8, p=1).derive(secret)
