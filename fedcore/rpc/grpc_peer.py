"""Who is at the other end of a gRPC connection: the public key in its verified certificate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedcore.crypto.certificates import peer_public
from fedcore.errors import TrustError


def peer_key(context: Any) -> bytes | None:
    """Returns the peer's public key in PEM; None without a valid certificate.

    Args:
        context: The ``ServicerContext`` of a call over mutual TLS, which has verified the chain.
    """
    return _public_of(context.auth_context().get("x509_pem_cert", (b"",))[0])


@lru_cache(maxsize=1024)
def _public_of(pem: bytes) -> bytes | None:
    """Returns the public key in a certificate, cached; None if it is malformed."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        return peer_public(certificate.public_bytes(Encoding.DER))
    except (ValueError, TrustError):
        return None
