"""Addresses that settings name, checked before anything connects to them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_BUCKET = re.compile(r"[a-z][a-z0-9+.-]*://[!-~]+")
_NO_BUCKETS = ("http", "https", "file", "local")


def check_bucket(url: str) -> str:
    """Returns what is wrong with the address of a bucket; empty if nothing is.

    An address with credentials is not repeated, as errors end up in logs.
    """
    if not _BUCKET.fullmatch(url):
        return (
            "The address of a bucket: expected one such as s3://releases/fleet, in printable ASCII."
        )
    try:
        parts = urlsplit(url)
    except ValueError:
        return "The address of a bucket: expected one such as s3://releases/fleet."
    if "@" in url or parts.query or parts.fragment:  # a password may hold a slash
        return (
            "The address of a bucket has an @, a query or a fragment, and is not repeated here: "
            "expected one such as s3://releases/fleet. Credentials come from the environment or "
            "from the plugin's own configuration."
        )
    if parts.scheme in _NO_BUCKETS:
        return (
            f"{url}: expected the address of a bucket to write to, such as s3://releases/fleet; "
            "devices read it by https."
        )
    if "::" in url or not parts.netloc:
        return f"{url}: expected the address of one bucket, such as s3://releases/fleet."
    return ""
