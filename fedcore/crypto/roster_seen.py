"""The highest roster version that a server has used, stored to detect rollbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from fedcore.config.section import Section
from fedcore.errors import RollbackRefused, TrustError
from fedcore.files import read_if_exists, write_atomic

SEEN = "roster.seen"
_MAX_SEEN_BYTES = 1 << 10


class Seen(Section):
    """``roster.seen``: the newest roster that a server has had in force."""

    format: Literal["fedcore.seen/1"] = "fedcore.seen/1"
    version: Annotated[int, Field(ge=1)]
    signer: Annotated[int, Field(ge=0)] = 0
    """Number of the key that signed it; 0 for the authority's own."""
    lost: bool = False
    """Whether a backup restored an older list, whose later changes can reach the same version."""
    restored: AwareDatetime | None = None
    """When the backup with the list was made; revocations since then are unknown."""


NOTHING_SEEN = Seen.model_construct(version=0)
"""State of a server that has had no roster in force."""


def read_seen(path: Path) -> Seen:
    """Reads ``roster.seen``; returns `NOTHING_SEEN` if it does not exist.

    Raises:
        RollbackRefused: the list that was in force is lost, see `record_lost_version`.
        TrustError: the file is malformed.
    """
    raw = read_if_exists(
        path,
        max_bytes=_MAX_SEEN_BYTES,
        what="the version of the roster",
        otherwise="Nothing was started; check that roster.json is the newest, then remove this.",
    )
    if raw is None:
        return NOTHING_SEEN
    try:
        seen = Seen.model_validate_json(raw)
    except ValidationError:
        raise TrustError(
            f"{path}: this file does not state which version of the roster was in force. Nothing "
            "was started; check that roster.json is the newest, then remove this."
        ) from None
    if seen.lost:
        raise RollbackRefused(
            f"{path}: version {seen.version} of the roster was in force, and a backup restored "
            "an older one, which may admit revoked members again. A server refuses to start with "
            f"it (exit code {RollbackRefused.exit_code}); revoke again everyone revoked since, "
            "then remove this file."
        )
    return seen


def seen_version(path: Path) -> int:
    """Returns the highest roster version in ``roster.seen``; 0 if the file does not exist.

    Raises:
        TrustError: `read_seen` rejects the file.
    """
    return read_seen(path).version


def write_seen(path: Path, seen: Seen) -> None:
    """Writes ``roster.seen``, atomically."""
    write_atomic(path, seen.model_dump_json().encode() + b"\n", mode=0o600)


def record_lost_version(path: Path, version: int) -> None:
    """Makes a server reject every roster if it has seen a newer one than ``version``.

    This lasts until an operator removes the file. Otherwise changes to the restored, older list
    would increase its version until it passes for the newest.
    """
    try:
        seen = read_seen(path)
    except TrustError:  # a server already refuses to start with this file
        return
    if seen.version > version:
        write_seen(path, seen.model_copy(update={"lost": True}))
