"""Trusted root of a device: the owner's root, or the newest one reached by signed rotations.

::

    trust/pinned.root.json    the newest root in the chain of rotations
    trust/roots.json          digests of all roots in the chain: `--root` may name any of them
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    Metadata,
    Root,
)

from fedcore.errors import ConfigError, DataError, TrustError
from fedcore.files import name_exists, read_bytes, read_if_exists, sha256_hex, write_atomic
from fedcore.observability.foreign import foreign

MAX_ROOT_BYTES = 512_000  # bytes: what python-tuf's updater allows a root
_MAX_KNOWN = 4096
_MAX_KNOWN_BYTES = 1 << 20
_AFTER = "Nothing was installed; the previous version keeps serving."


@dataclass(frozen=True)
class Anchor:
    """Root from which an update follows the chain of rotations."""

    raw: bytes = field(repr=False)
    root: Root = field(repr=False)
    pinned: bool
    """Whether an earlier update pinned it."""
    expected_sha256: str | None = None
    """SHA-256 of a newer root that the owner gives: the chain must lead to it."""


def anchor(trust: Path, given: bytes | None) -> Anchor:
    """Returns the root to start from: the pinned one, or before the first update the owner's.

    Args:
        trust: Folder of the trusted state.
        given: The owner's ``root.json``, or None.

    Raises:
        ConfigError: no root is pinned yet and none is given.
        TrustError: the given root is not valid, or neither in the chain nor newer than the pin.
        DataError: the pinned root is damaged.
    """
    if not name_exists(_pin(trust)):
        if given is None:
            raise ConfigError(
                f"{trust}: this device trusts no root yet. Nothing was fetched; pass the "
                "root.json created by `fedcore release init` with --root once."
            )
        return Anchor(given, parse_root(given), pinned=False)
    raw = read_bytes(_pin(trust), max_bytes=MAX_ROOT_BYTES, what="the pinned root")
    try:
        root = parse_root(raw)
    except TrustError as error:
        raise DataError(
            f"{_pin(trust)}: it differs from the root that was pinned; the disk may be failing. "
            f"{_AFTER} Restore it from a copy, or start another store with --root."
        ) from error
    if given is None or given == raw or sha256_hex(given) in _known(trust):
        return Anchor(raw, root, pinned=True)
    newer = parse_root(given)
    if newer.version <= root.version:
        raise _foreign(trust)
    return Anchor(raw, root, pinned=True, expected_sha256=sha256_hex(given))


def check_awaited(start: Anchor, trust: Path) -> None:
    """Raises `TrustError` if the chain of rotations does not contain the root the owner gave."""
    if start.expected_sha256 is not None and start.expected_sha256 not in _known(trust):
        raise _foreign(trust)


def pin(trust: Path, start: Anchor, newest: int, history: Path) -> None:
    """Pins the newest root of the chain, from which the next update starts.

    Args:
        trust: Folder of the trusted state.
        start: The root from which this update started.
        newest: Version of the newest root in the chain.
        history: python-tuf's folder of roots by version, each verified with the one before.
    """
    if start.pinned and newest == start.root.version:
        return
    later = range(start.root.version + 1, newest + 1)
    roots = [start.raw, *(_read(history / f"{version}.root.json") for version in later)]
    digests = dict.fromkeys([*_known(trust), *map(sha256_hex, roots)])
    kept = list(digests)[-_MAX_KNOWN:]
    write_atomic(_path(trust), (json.dumps({"sha256": kept}) + "\n").encode())
    write_atomic(_pin(trust), roots[-1])
    for path in history.glob("*.root.json"):  # no update needs roots before the pin
        version = path.name.partition(".")[0]
        if version.isdecimal() and int(version) < newest:
            path.unlink()


def parse_root(raw: bytes) -> Root:
    """Parses root metadata, and checks that its own keys have signed it.

    Raises:
        TrustError: it is not root metadata, or its signatures do not reach the threshold.
    """
    try:
        metadata: Metadata[Root] = Metadata.from_bytes(raw)
        if not isinstance(metadata.signed, Root):
            raise tuf.RepositoryError(f"metadata of type {metadata.signed.type!r}")
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    except (tuf.RepositoryError, ValueError) as error:
        raise TrustError(
            "--root: expected the root.json created by `fedcore release init`, got something "
            f"else ({foreign(error, 300)}). {_AFTER}"
        ) from error
    return metadata.signed


def rotated(before: Root, after: Root, roles: Iterable[str]) -> bool:
    """Returns whether ``after`` no longer trusts a key that ``before`` trusts for a role."""
    return any(set(before.roles[role].keyids) - set(after.roles[role].keyids) for role in roles)


def _foreign(trust: Path) -> TrustError:
    return TrustError(
        f"{_pin(trust)}: the given root is neither the one that this device has trusted since "
        f"its first update, nor a successor signed by it. {_AFTER} Leave --root out to keep "
        "trusting that root; to trust another, choose another store."
    )


def _known(trust: Path) -> list[str]:
    """Returns the SHA-256 digests of all roots in the chain up to the pinned one."""
    path = _path(trust)
    raw = read_if_exists(path, max_bytes=_MAX_KNOWN_BYTES, what="the digests of trusted roots")
    if raw is None:
        return []
    try:
        known = json.loads(raw)["sha256"]
        if not isinstance(known, list) or not all(isinstance(digest, str) for digest in known):
            raise TypeError("expected a list of digests")
    except (ValueError, TypeError, LookupError, RecursionError):
        raise DataError(
            f"{path}: its contents are not the digests that were written; the disk may be "
            f"failing. {_AFTER} Remove it, leave --root out, and run again."
        ) from None
    return known


def _read(path: Path) -> bytes:
    return read_bytes(path, max_bytes=MAX_ROOT_BYTES, what="a verified root")


def _pin(trust: Path) -> Path:
    return trust / "pinned.root.json"


def _path(trust: Path) -> Path:
    return trust / "roots.json"
