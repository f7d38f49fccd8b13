"""What both sides of the delivery service agree on: names of calls, limits, and valid requests."""

from __future__ import annotations

import re

from fedcore.observability.foreign import foreign

SERVICE = "fedcore.delivery.v1.Delivery"
PORT_OFFSET = 2
"""A kit has the server's port for training; wake-up streams are on the next one, releases on the
one after that, unless both sides set another."""
CHUNK_BYTES = 1 << 14
"""Bytes of a file in one message, 16 KiB, as in a TLS record: a cut loses what it is in."""
MAX_REASON = 500
"""Most characters of a reason in a device's report."""
MAX_REQUEST_BYTES = 8192
"""Most bytes of a request: counts of 72 features in 32 bins take less."""

_VERSION = "[1-9][0-9]{0,18}"
_METADATA = re.compile(rf"timestamp[.]json|{_VERSION}[.](root|targets|snapshot|releases)[.]json")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def method(name: str) -> str:
    """Returns the path of one of the service's calls."""
    return f"/{SERVICE}/{name}"


def reason_text(text: str) -> str:
    """Returns a reason on one line of at most `MAX_REASON` characters, without unprintable ones."""
    return foreign(text, MAX_REASON - 40)[:MAX_REASON]  # a cut text says how long it was


def is_metadata_name(name: str) -> bool:
    """Returns whether a repository may have a metadata file of this name."""
    return _METADATA.fullmatch(name) is not None


def is_sha256(text: str) -> bool:
    """Returns whether a text is a SHA-256 digest in lower-case hexadecimal."""
    return _SHA256.fullmatch(text) is not None
