"""Private and public keys: an identity is one ECDSA key on P-384, Flower's curve for nodes.

The same key authenticates a node with Flower, is in the node's TLS certificate, and signs its
updates. It is generated on the machine that uses it and never sent.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fedcore.errors import CertificateRefused
from fedcore.files import (
    ABANDONED_S,
    read_bytes,
    remove_unfinished,
    sha256_hex,
    write_atomic,
)

MAX_KEY_BYTES = 4096  # bytes: a P-384 key as PKCS#8 PEM has 306, its public part 215


def new_key() -> EllipticCurvePrivateKey:
    """Returns a new private key on P-384, from the operating system's randomness."""
    return generate_private_key(SECP384R1())


def private_bytes(key: EllipticCurvePrivateKey) -> bytes:
    """Returns a private key as unencrypted PKCS#8 PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def save_key(path: Path, key: EllipticCurvePrivateKey) -> None:
    """Writes a private key as PKCS#8 PEM, atomically, readable only by its owner.

    Raises:
        DiskFull: the disk has no room; ``path`` is unchanged.
        ResourceError: the path is not writable.
    """
    remove_unfinished(path.parent, path.name, idle_s=ABANDONED_S)  # a key that nobody would miss
    write_atomic(path, private_bytes(key), mode=0o600)


def load_key(path: Path) -> EllipticCurvePrivateKey:
    """Reads a private key that only its owner can read.

    Raises:
        DataError: the file is missing or unreadable.
        CertificateRefused: other users may read the file, or it contains no P-384 key.
    """
    raw = read_bytes(path, max_bytes=MAX_KEY_BYTES, what="a private key", otherwise=_NO_KEY)
    mode = stat.S_IMODE(path.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        raise CertificateRefused(
            f"{path}: this private key has mode {mode:04o}, expected 0600: others may have read "
            "it. It was not used; if you are sure that nobody has, run `chmod 600` on it, "
            "otherwise have this identity revoked and enrol again."
        )
    return parse_key(raw, where=str(path))


_NO_KEY = (
    "This identity cannot be proved without it. Restore it from a copy. Otherwise, a member "
    "enrols again (`fedcore client enrol` in another folder), and a server gets a new key with "
    "`fedcore provision server --replace`, or its old one with `fedcore provision restore`."
)


def parse_key(raw: bytes, *, where: str) -> EllipticCurvePrivateKey:
    """Returns the private key in PKCS#8 PEM bytes; raises `CertificateRefused` for other bytes."""
    try:
        key = load_pem_private_key(raw, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise CertificateRefused(
            f"{where}: expected an ECDSA private key on P-384 (PKCS#8 PEM, no password), found "
            "something else. It was not used; restore the key from a copy, or enrol again."
        )
    return key


def public_bytes(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> bytes:
    """Returns the public key as SubjectPublicKeyInfo PEM, byte for byte as Flower registers it.

    ``openssl x509 -in CERTIFICATE -noout -pubkey`` prints the same bytes.
    """
    public = key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def parse_public(raw: bytes, *, where: str = "public key") -> EllipticCurvePublicKey:
    """Returns the public key in PEM bytes; raises `CertificateRefused` unless it is on P-384."""
    try:
        key = load_pem_public_key(raw) if len(raw) <= MAX_KEY_BYTES else None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise CertificateRefused(
            f"{where}: expected an ECDSA public key on P-384 (PEM), found something else. It was "
            "not used; every fedcore identity is a key of this type."
        )
    return key


def fingerprint(public: bytes) -> str:
    """Returns the SHA-256 of a public key in PEM, in hexadecimal: a short name of an identity."""
    return sha256_hex(public)
