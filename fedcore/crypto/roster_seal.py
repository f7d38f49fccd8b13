"""Signs and verifies rosters, with a separate key that the authority's key delegates to.

A revocation must not wait for a passphrase, so the authority's own key does not sign rosters: it
signs, once, the key that does. That key is stored unencrypted in the authority's folder and stays
there; a server has the signed roster, and cannot change it.
"""

from __future__ import annotations

from typing import Annotated

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.hashes import SHA384
from pydantic import Field

from fedcore.config.section import Section
from fedcore.crypto.keys import parse_public, public_bytes
from fedcore.errors import SignatureInvalid

_ROSTER, _SIGNER = b"fedcore.roster/1\x00", b"fedcore.roster-signer/1\x00"
"""Signature domains: a signature for one purpose is invalid for another."""
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{2,512}$")]


class Signer(Section):
    """The public key that signs a project's rosters, delegated by the authority."""

    number: Annotated[int, Field(ge=1, le=1_000_000)]
    """Increases with each key; a server that has seen one rejects rosters of earlier keys."""
    public: Annotated[str, Field(max_length=4096)]
    """The public key as PEM."""
    delegation: Signature
    """Signature by the authority's key, over number and public key."""


def delegate(
    key: EllipticCurvePrivateKey, number: int, authority_key: EllipticCurvePrivateKey
) -> Signer:
    """Returns a signer: the authority signs its number and public key."""
    public = public_bytes(key).decode()
    signature = authority_key.sign(_delegated_to(number, public), ECDSA(SHA384())).hex()
    return Signer(number=number, public=public, delegation=signature)


def sign_content(content: bytes, key: EllipticCurvePrivateKey) -> str:
    """Returns the signature of a roster's content, in hexadecimal."""
    return key.sign(_ROSTER + content, ECDSA(SHA384())).hex()


def check_signed(
    content: bytes,
    signature: str | None,
    signer: Signer | None,
    authority: x509.Certificate,
    *,
    where: str,
) -> None:
    """Verifies that the authority, or a signer that it delegated to, signed a roster.

    Args:
        content: The roster without its signature.
        signature: The roster's signature; None if there is none.
        signer: The delegated signer; None for the authority itself.
        authority: The authority's certificate.
        where: The file, for errors.

    Raises:
        SignatureInvalid: the roster is unsigned, signed by another key, or changed since.
    """
    if signature is None:
        raise SignatureInvalid(
            f"{where}: this roster is not signed, so its revocations and update weights cannot "
            "be trusted. It was not used; if the project was created before rosters were signed, "
            "check that nobody has changed the roster, then sign it with `fedcore provision "
            "sign`."
        )
    public = authority.public_key()
    assert isinstance(public, EllipticCurvePublicKey)  # parsing rejects other certificates
    try:
        if signer is not None:
            delegated = _delegated_to(signer.number, signer.public)
            public.verify(bytes.fromhex(signer.delegation), delegated, ECDSA(SHA384()))
            public = parse_public(signer.public.encode(), where=where)
        public.verify(bytes.fromhex(signature), _ROSTER + content, ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise SignatureInvalid(
            f"{where}: the roster's signature is invalid: the roster was changed by hand, or "
            "signed by a key that the authority has not certified. It was not used; copy it "
            "again from the authority's folder, or restore that folder with `fedcore provision "
            "restore`."
        ) from None


def _delegated_to(number: int, public: str) -> bytes:
    return _SIGNER + f"{number}\x00{public}".encode()
