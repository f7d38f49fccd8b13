"""What a server remembers of the rosters that it has had in force."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, ValidationError

from fedcore.config.run import Section
from fedcore.errors import RollbackRefused, TrustError
from fedcore.files import read_if_there, write_atomic

SEEN = "roster.seen"
_MAX_SEEN_BYTES = 1 << 10


class Seen(Section):
    """``roster.seen``: what a server remembers of the lists that it has had in force."""

    format: Literal["fedcore.seen/1"] = "fedcore.seen/1"
    version: Annotated[int, Field(ge=1)]
    signer: Annotated[int, Field(ge=0)] = 0
    """Number of the key that signed it; 0 for the authority's own."""
    lost: bool = False
    """Whether a backup brought back an older list: later changes of that reach the version, too."""
    restored: AwareDatetime | None = None
    """When the backup was made that the list came from; nobody knows who was revoked since."""


NOTHING_SEEN = Seen.model_construct(version=0)
"""Of a server that had none in force."""


def read_seen(path: Path) -> Seen:
    """What ``roster.seen`` says; nothing where there is none.

    Raises:
        RollbackRefused: the list that was in force is lost, see `note_lost`.
        TrustError: it says nothing of the kind.
    """
    raw = read_if_there(
        path,
        max_bytes=_MAX_SEEN_BYTES,
        what="the version of the roster",
        otherwise="Nothing was started; see that roster.json is the newest, and remove this.",
    )
    if raw is None:
        return NOTHING_SEEN
    try:
        seen = Seen.model_validate_json(raw)
    except ValidationError:
        raise TrustError(
            f"{path}: this does not tell which version of the roster was in force. Nothing was "
            "started; see that roster.json is the newest, and remove this file."
        ) from None
    if seen.lost:
        raise RollbackRefused(
            f"{path}: version {seen.version} of the roster was in force, and a backup brought back "
            "an older one, which may let revoked members in again. No server starts with it (exit "
            f"code {RollbackRefused.exit_code}); revoke again who was revoked since, and remove "
            "this file then."
        )
    return seen


def seen_version(path: Path) -> int:
    """The highest version that was in force by what ``roster.seen`` says; 0 where there is none.

    Raises:
        TrustError: as `read_seen`.
    """
    return read_seen(path).version


def write_seen(path: Path, seen: Seen) -> None:
    """Remembers it, atomically."""
    write_atomic(path, seen.model_dump_json().encode() + b"\n", mode=0o600)


def note_lost(path: Path, version: int) -> None:
    """Has every roster refused by a server that has seen a newer one than ``version``.

    That is until somebody removes the file: the older list's own changes count on from an older
    version, and would pass for the newest before long.
    """
    try:
        seen = read_seen(path)
    except TrustError:  # a server refuses to start with it as it is
        return
    if seen.version > version:
        write_seen(path, seen.model_copy(update={"lost": True}))
