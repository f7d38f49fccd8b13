"""Which named data set a charge was made on, tracked by its name and by the content of its files.

The charges of a name add up, however its files change. Two names that ever had a file of the same
content count as one data set, so copied, moved or renamed data keep their privacy cost.
``contents.json`` records the file digests of each name at its charges. If it is lost, or does not
match a charge, the charges of that name count against all data.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from fedcore.config.section import Section
from fedcore.errors import DataError, PrivacyError
from fedcore.files import open_regular, read_if_exists, sha256_hex, write_atomic

CONTENTS = "contents.json"
MAX_FILES, MAX_BYTES = 200_000, 1 << 40
"""Most files and bytes of a named data set; training on a larger one is refused."""
_MAX_CONTENTS_BYTES = 256 << 20
_DIGEST_CHARACTERS = 16
"""Length of truncated digests. A collision of 64 bits only makes two data sets count as one."""
_PIECE_BYTES = 1 << 20
_LABEL = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9]{1,9}):([0-9a-f]{64})")
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Contents(Section):
    """``contents.json``: digests of all files each name ever had, in the order of discovery."""

    format: Literal["fedcore.contents/1"] = "fedcore.contents/1"
    names: dict[str, tuple[Digest, ...]] = Field(default_factory=dict)


def read_contents(folder: Path) -> Contents:
    """Reads ``contents.json`` in the device's folder; empty if it is missing or unreadable."""
    path = folder / CONTENTS
    try:
        raw = read_if_exists(path, max_bytes=_MAX_CONTENTS_BYTES, what="the contents of data sets")
        return Contents() if raw is None else Contents.model_validate_json(raw)
    except (DataError, ValidationError):
        return Contents()  # safe: every name then counts against all data


def record_contents(folder: Path, name: str, data: Path) -> str:
    """Adds new files of a data set to ``contents.json``, and returns the data set's label.

    Args:
        folder: The device's folder.
        name: The data set's name.
        data: Folder of its files; symbolic links are followed.

    Returns:
        The label for charges on these data; empty if no file was ever found.

    Raises:
        PrivacyError: there are more than `MAX_FILES` files or `MAX_BYTES`.
        DataError: a file cannot be read.
        DiskFull: there is no room.
    """
    held = read_contents(folder)
    known = dict.fromkeys(held.names.get(name, ()))
    before = len(known)
    known |= dict.fromkeys(digests_of(name, data))
    if len(known) > before:
        names = {**held.names, name: tuple(known)}
        raw = Contents(names=names).model_dump_json().encode() + b"\n"
        write_atomic(folder / CONTENTS, raw, mode=0o600)
    return label_of(name, tuple(known))


def label_of(name: str, digests: Collection[str]) -> str:
    """Returns a label: name, number of files and a digest of their digests; empty for no files."""
    if not digests:
        return ""
    return f"{name}:{len(digests)}:{sha256_hex(' '.join(digests).encode())}"


def digests_of(name: str, data: Path) -> Iterator[str]:
    """Yields a truncated SHA-256 of each non-empty file below ``data``.

    Args:
        name: The data set's name, for errors.
        data: Folder of its files; symbolic links are followed.

    Raises:
        PrivacyError: there are more than `MAX_FILES` files or `MAX_BYTES`.
        DataError: a file or folder cannot be read.
    """
    files = left = 0
    for path, found in _files(data):
        files, left = files + 1, left + found.st_size
        if files > MAX_FILES or left > MAX_BYTES:
            raise PrivacyError(
                f"{data}: the data set {name!r} has more than {MAX_FILES} files or {MAX_BYTES} "
                "bytes, too many to compare with other data sets. Nothing was trained; remove it "
                "from datasets in the owner's file, so that the device's own budget covers it."
            )
        if found.st_size:
            yield _digest(
                str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
            )


def _files(data: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yields regular files, sorted by name in each folder; visits a folder once, despite links."""
    seen: set[tuple[int, int]] = set()
    for at, folders, names in os.walk(data, followlinks=True, onerror=_unreadable):
        here = Path(at).stat()
        if (here.st_dev, here.st_ino) in seen:
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders.sort()
        for name in sorted(names):
            path = Path(at) / name
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # a dangling link, or removed meanwhile
            except OSError as error:  # a link to itself, or a folder without permission
                _unreadable(error)
                continue
            if stat.S_ISREG(found.st_mode):
                yield path, found


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: cannot read this folder of a data set ({error.strerror}). Nothing "
        "was trained; give this user read access."
    )


@lru_cache(maxsize=MAX_FILES)
def _digest(path: str, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    """Returns a file's truncated SHA-256, cached for the life of the process.

    Size, times and inode are part of the cache's key, so a changed file is read again: ctime cannot
    be set except by the machine's administrator.
    """
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(Path(path), what="a file of a data set"), "rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read this file of a data set ({error.strerror}). Nothing was "
            "trained; give this user read access."
        ) from None
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


def name_in(label: str) -> str:
    """Returns the name in a label; empty if the label is malformed or empty."""
    found = _LABEL.fullmatch(label)
    return found[1] if found else ""


def counted_with(name: str, labels: Collection[str], contents: Contents) -> set[str] | None:
    """Returns the names whose charges count against the data set ``name``, including itself.

    These are the names connected to it by shared files, directly or through other names, and every
    name with a charge whose contents are unknown.

    Args:
        name: The data set's name; empty for data without a name.
        labels: Labels of all charges.
        contents: File digests of each name.

    Returns:
        The names; None if every charge counts, whatever its label: ``name`` is empty, or its
        contents now or at a charge are unknown.
    """
    held = {one: set(digests) for one, digests in contents.names.items()}
    doubtful = {name_in(label) for label in labels if not _holds(label, contents.names)} - {""}
    if not held.get(name) or name in doubtful:
        return None
    found, new = {name} | doubtful, [name]
    while new:
        own = held[new.pop()]
        near = {one for one, other in held.items() if one not in found and own & other}
        found |= near
        new += near
    return found


def _holds(label: str, names: Mapping[str, tuple[str, ...]]) -> bool:
    """Returns whether ``names`` still lists the digests that a charge's label was made from."""
    found = _LABEL.fullmatch(label)
    if found is None:
        return False
    digests = names.get(found[1], ())[: int(found[2])]
    return label_of(found[1], digests) == label
