"""Which named data a charge was made on: by name for good, and by content across names.

A name's charges add up whatever becomes of its files. Two names that ever held a file of the same
content count as one: data that are copied, moved or renamed take what was spent on them along. The
contents of each name, as they were at its charges, lie in ``contents.json``; where that is lost, or
is not what a charge was made on, the name counts against all data.
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

from fedcore.config.run import Section
from fedcore.errors import DataError, PrivacyError
from fedcore.files import open_regular, read_if_there, sha256_hex, write_atomic

CONTENTS = "contents.json"
MAX_FILES, MAX_BYTES = 200_000, 1 << 40
"""Most files of a data set, and most bytes in them: what is larger is not named."""
_MAX_CONTENTS_BYTES = 256 << 20
_DIGEST_CHARACTERS = 16
"""Two files whose digests begin alike count as the same: 64 bits err one way only."""
_PIECE_BYTES = 1 << 20
_LABEL = re.compile(r"([A-Za-z0-9._-]{1,64}):([0-9]{1,9}):([0-9a-f]{64})")
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Contents(Section):
    """``contents.json``: the digests of the files that each name ever held, in order of coming."""

    format: Literal["fedcore.contents/1"] = "fedcore.contents/1"
    names: dict[str, tuple[Digest, ...]] = Field(default_factory=dict)


def read_contents(folder: Path) -> Contents:
    """The contents that a device has seen; none where it has seen none, or cannot tell."""
    path = folder / CONTENTS
    try:
        raw = read_if_there(path, max_bytes=_MAX_CONTENTS_BYTES, what="the contents of data sets")
        return Contents() if raw is None else Contents.model_validate_json(raw)
    except (DataError, ValidationError):
        return Contents()  # every name in it is in doubt then, and counts against all data


def note_contents(folder: Path, name: str, data: Path) -> str:
    """Looks at the files of a data set, writes down what is new, and gives its label.

    Args:
        folder: The device's own.
        name: Of the data set.
        data: Where its files are; links are followed.

    Returns:
        What a charge on these data is marked with; empty where there are no files to tell them by.

    Raises:
        PrivacyError: there are more files, or bytes in them, than can be looked at.
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
    """Names the data, and what they were when this was written; empty where nothing is known."""
    if not digests:
        return ""
    return f"{name}:{len(digests)}:{sha256_hex(' '.join(digests).encode())}"


def digests_of(name: str, data: Path) -> Iterator[str]:
    """A digest of each file that is not empty, wherever below ``data`` it lies."""
    files = left = 0
    for path, found in _files(data):
        files, left = files + 1, left + found.st_size
        if files > MAX_FILES or left > MAX_BYTES:
            raise PrivacyError(
                f"{data}: the data set {name!r} has more than {MAX_FILES} files or {MAX_BYTES} "
                "bytes, too many to tell whether they are another's. Nothing was trained; take it "
                "out of datasets in the owner's file, and the device's own budget holds for it."
            )
        if found.st_size:
            yield _digest(
                str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
            )


def _files(data: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files in the order of their names; a folder that links lead to twice is seen once."""
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
                continue  # a link to nowhere, or it went away
            except OSError as error:  # a link to itself, a folder that may not be looked into
                _unreadable(error)
                continue
            if stat.S_ISREG(found.st_mode):
                yield path, found


def _unreadable(error: OSError) -> None:
    raise DataError(
        f"{error.filename}: this folder of a data set cannot be read ({error.strerror}). Nothing "
        "was trained; let this user read it."
    )


@lru_cache(maxsize=MAX_FILES)
def _digest(path: str, size: int, mtime_ns: int, ctime_ns: int, inode: int) -> str:
    """The beginning of the SHA-256 of a file, a piece at a time, once a process and file.

    What else names the file here tells one that was changed: nobody but the machine's owner can
    set the time of a file's last change of state.
    """
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(Path(path), what="a file of a data set"), "rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise DataError(
            f"{path}: this file of a data set cannot be read ({error.strerror}). Nothing was "
            "trained; let this user read it."
        ) from None
    return digest.hexdigest()[:_DIGEST_CHARACTERS]


def name_in(label: str) -> str:
    """The name in a label; empty where it is none."""
    found = _LABEL.fullmatch(label)
    return found[1] if found else ""


def counted_with(name: str, labels: Collection[str], contents: Contents) -> set[str] | None:
    """The names whose charges count against data of the name ``name``, itself among them.

    Args:
        name: Empty for data without a name.
        labels: Of all charges.
        contents: What each name ever held.

    Returns:
        The names; None for all charges there are, whatever their label.
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
    """Whether the contents are known that a charge with this label was made on."""
    found = _LABEL.fullmatch(label)
    if found is None:
        return False
    digests = names.get(found[1], ())[: int(found[2])]
    return label_of(found[1], digests) == label
