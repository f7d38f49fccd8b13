from __future__ import annotations

import unicodedata

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from fedcore.crypto.sealing import MIN_PASSPHRASE, OVERHEAD_BYTES, decrypt, encrypt, is_encrypted
from fedcore.errors import ConfigError, TrustError

PASSPHRASE = "fünf zufällige Wörter"


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return encrypt(b"secret" * 10, PASSPHRASE)


def test_what_is_sealed_comes_back(sealed: bytes) -> None:
    assert is_encrypted(sealed)
    assert len(sealed) == 60 + OVERHEAD_BYTES
    assert b"secret" not in sealed
    decomposed = unicodedata.normalize("NFD", PASSPHRASE)  # as another keyboard types it
    assert decomposed != PASSPHRASE
    assert decrypt(sealed, decomposed, where="file") == b"secret" * 10


def test_a_guess_costs_what_is_said(sealed: bytes) -> None:
    """128 MiB: scrypt needs 128 * N * r bytes."""
    key = Scrypt(salt=sealed[17:33], length=32, n=1 << 17, r=8, p=1).derive(PASSPHRASE.encode())
    text = AESGCM(key).decrypt(sealed[33:45], sealed[45:], sealed[:33])
    assert text == b"secret" * 10


def test_no_two_are_alike(sealed: bytes) -> None:
    assert encrypt(b"secret" * 10, PASSPHRASE)[17:45] != sealed[17:45]


def test_another_passphrase_opens_nothing(sealed: bytes) -> None:
    with pytest.raises(TrustError, match="file: decryption failed: the passphrase is wrong"):
        decrypt(sealed, PASSPHRASE + " ", where="file")


@pytest.mark.parametrize("place", [20, 40, 50, -1], ids=["salt", "nonce", "text", "tag"])
def test_no_changed_byte_goes_unnoticed(sealed: bytes, place: int) -> None:
    changed = bytearray(sealed)
    changed[place] ^= 1
    with pytest.raises(TrustError, match="altered or truncated"):
        decrypt(bytes(changed), PASSPHRASE, where="file")


def test_what_is_not_sealed_is_not_tried(sealed: bytes) -> None:
    for raw in (b"", b"garbage", sealed[:-30][:60], b"x" + sealed[1:]):
        with pytest.raises(TrustError, match="decryption failed"):
            decrypt(raw, PASSPHRASE, where="file")
    assert not is_encrypted(b"-----BEGIN PRIVATE KEY-----")


def test_a_short_passphrase_is_refused() -> None:
    assert MIN_PASSPHRASE == 12
    with pytest.raises(ConfigError, match="got 11 characters, expected 12 or more"):
        encrypt(b"", "12345678901")
