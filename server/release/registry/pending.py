"""Two files that come into force together: a new root, and the timestamp that its keys sign.

The kernel renames one file at a time. So both are first written to one file, whose own appearance
is the step that counts; whoever next takes the repository's lock finishes what was begun.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedcore.errors import ReleaseError
from fedcore.files import is_there, read_if_there, sync_folder, write_atomic, write_json

_NAME = ".pending.json"
_MAX_BYTES = 4_000_000  # bytes: a root and a timestamp


def begin(repository: Path, files: dict[str, bytes]) -> None:
    """Puts metadata files into force, in this order; once this has begun, it will be done.

    Args:
        repository: Locked by the caller.
        files: JSON by file name within ``metadata``.
    """
    metadata = repository / "metadata"
    write_json(metadata / _NAME, {name: raw.decode() for name, raw in files.items()})
    finish(repository)


def is_begun(repository: Path) -> bool:
    """Whether something is still to be put into force."""
    return is_there(repository / "metadata" / _NAME)


def finish(repository: Path) -> None:
    """Finishes what `begin` began, where it was interrupted.

    Raises:
        ReleaseError: the file does not hold what was written there.
        DiskFull: there was no room; it can be finished later.
    """
    metadata = repository / "metadata"
    path = metadata / _NAME
    raw = read_if_there(path, max_bytes=_MAX_BYTES, what="metadata that comes into force")
    if raw is None:
        return
    try:
        files = {str(name): str(text).encode() for name, text in json.loads(raw).items()}
        if not all(name == "timestamp.json" or name.endswith(".root.json") for name in files):
            raise ValueError("it names other files")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ReleaseError(
            f"{path}: it does not hold the root and timestamp that a rotation wrote ({error}); the "
            "disk may be failing. Nothing was published; restore the repository from a copy, and "
            "rotate again."
        ) from error
    for name, content in files.items():
        write_atomic(metadata / Path(name).name, content)
    path.unlink()
    sync_folder(metadata)
