from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    private_key_to_bytes,
    public_key_to_bytes,
    uses_nist_ec_curve,
)

from fedcore.crypto.keys import (
    fingerprint,
    load_key,
    new_key,
    parse_public,
    private_bytes,
    public_bytes,
    save_key,
)
from fedcore.errors import CertificateRefused, DataError


def test_a_key_comes_back_and_belongs_to_its_owner_alone(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "kit" / "key.pem"
    save_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_bytes(load_key(path)) == public_bytes(key)
    assert public_bytes(new_key()) != public_bytes(key)


def test_the_encoding_is_flowers_own() -> None:
    key = new_key()
    public = key.public_key()
    assert public_bytes(key) == public_bytes(public) == public_key_to_bytes(public)
    assert private_bytes(key) == private_key_to_bytes(key)
    assert uses_nist_ec_curve(bytes_to_public_key(public_bytes(key)))
    assert parse_public(public_bytes(key)) == public


def test_a_fingerprint_is_the_digest_of_the_public_pem() -> None:
    public = public_bytes(new_key())
    assert fingerprint(public) == hashlib.sha256(public).hexdigest()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_key_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    save_key(tmp_path / "key.pem", new_key())
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(CertificateRefused, match=f"mode {mode:04o}, expected 0600"):
        load_key(tmp_path / "key.pem")


def other_keys() -> list[bytes]:
    pkcs8, clear = PrivateFormat.PKCS8, NoEncryption()
    return [
        b"",
        b"garbage",
        private_bytes(new_key())[:100],
        generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, pkcs8, clear),
        Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, pkcs8, clear),
        new_key().private_bytes(Encoding.PEM, pkcs8, BestAvailableEncryption(b"secret")),
        public_bytes(new_key()),
    ]


@pytest.mark.parametrize("raw", other_keys(), ids=range(7))
def test_what_is_no_p384_key_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(raw)
    path.chmod(0o600)
    with pytest.raises(CertificateRefused, match="expected an ECDSA private key on P-384"):
        load_key(path)


def test_a_key_has_a_limit_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist\..*from a copy.*provision server --repl"):
        load_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").write_bytes(b"x" * 4097)
    with pytest.raises(DataError, match="more than the 4096"):
        load_key(tmp_path / "key.pem")


def test_only_a_public_key_on_p384_is_an_identity() -> None:
    small = generate_private_key(SECP256R1()).public_key()
    assert isinstance(small, EllipticCurvePublicKey)
    pem = small.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for raw in (b"", b"garbage", pem, private_bytes(new_key()), public_bytes(new_key()) * 50):
        with pytest.raises(CertificateRefused, match="expected an ECDSA public key on P-384"):
            parse_public(raw)
