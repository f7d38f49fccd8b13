"""Atomic replacement of two files: a new root, and the timestamp signed with its keys.

The kernel renames one file at a time. Both files are therefore first written into one journal file,
whose appearance is the commit. The next process that takes the repository's lock completes an
interrupted replacement.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedcore.errors import ReleaseError
from fedcore.files import name_exists, read_if_exists, sync_folder, write_atomic, write_json

_NAME = ".pending.json"
_MAX_BYTES = 4_000_000  # bytes: a root and a timestamp


def commit(repository: Path, files: dict[str, bytes]) -> None:
    """Commits metadata files, which then come into force in order, even after a crash.

    Args:
        repository: The repository, locked by the caller.
        files: JSON by file name within ``metadata``.
    """
    metadata = repository / "metadata"
    write_json(metadata / _NAME, {name: raw.decode() for name, raw in files.items()})
    finish(repository)


def is_pending(repository: Path) -> bool:
    """Returns whether committed files are still to be put into force."""
    return name_exists(repository / "metadata" / _NAME)


def finish(repository: Path) -> None:
    """Completes an interrupted `commit`; does nothing if there is none.

    Raises:
        ReleaseError: the journal file is damaged.
        DiskFull: the disk is full; the replacement can be completed later.
    """
    metadata = repository / "metadata"
    path = metadata / _NAME
    raw = read_if_exists(path, max_bytes=_MAX_BYTES, what="pending metadata")
    if raw is None:
        return
    try:
        files = {str(name): str(text).encode() for name, text in json.loads(raw).items()}
        if not all(name == "timestamp.json" or name.endswith(".root.json") for name in files):
            raise ValueError("it lists other files")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ReleaseError(
            f"{path}: its contents are not the root and timestamp that a rotation wrote "
            f"({error}); the disk may be failing. Nothing was published; restore the repository "
            "from a copy, and rotate again."
        ) from error
    for name, content in files.items():
        write_atomic(metadata / Path(name).name, content)
    path.unlink()
    sync_folder(metadata)
