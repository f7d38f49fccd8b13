"""python-tuf's cache of verified metadata: ``trust/metadata``. It may be wiped."""

from __future__ import annotations

import os
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    Metadata,
    Timestamp,
)

from fedcore.errors import DataError
from fedcore.files import open_regular, read_bytes, sync_folder

_AFTER = "Nothing was installed; the previous version keeps serving."
_METADATA = "metadata that this device has verified"
_REMOVE = f"{_AFTER} Remove it and run again; the signed metadata is then fetched again."
_MAX_CACHED_BYTES = 16_384  # bytes: what python-tuf's updater allows a timestamp


def check_cache(metadata: Path) -> None:
    """Checks that the folder which python-tuf reads contains only files and folders.

    Raises:
        DataError: it contains something else, such as a pipe, on which python-tuf would hang.
    """
    for path in (metadata, *metadata.rglob("*")):
        if path.exists() and not (path.is_dir() or path.is_file()):
            os.close(open_regular(path, what=_METADATA, otherwise=_REMOVE))


def cached_timestamp(metadata: Path) -> Timestamp | None:
    """Returns the newest verified timestamp; None if the file is missing or unreadable."""
    try:
        raw = read_bytes(metadata / "timestamp.json", max_bytes=_MAX_CACHED_BYTES, what="it")
        cached: Metadata[Timestamp] = Metadata.from_bytes(raw)
    except (DataError, tuf.RepositoryError, ValueError):
        return None
    return cached.signed if isinstance(cached.signed, Timestamp) else None


def make_durable(folder: Path) -> None:
    """Syncs a folder to disk: python-tuf renames files without fsync, so a power cut loses them."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = open_regular(path, what=_METADATA, otherwise=_REMOVE)
            os.fsync(descriptor)
            os.close(descriptor)
    sync_folder(folder.parent)
