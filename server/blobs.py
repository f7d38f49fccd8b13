"""Large values by their digests, in files of one folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import DataError
from fedcore.files import disk_errors, read_bytes, sync_folder

_NEW = ".new"
Bytes = NDArray[np.uint8]


def as_bytes(values: bytes | NDArray[Any]) -> Bytes:
    """The bytes of an array, or those of ``values`` themselves; nothing is copied."""
    if isinstance(values, bytes):
        return np.frombuffer(values, np.uint8)
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


class Blobs:
    """Values are written once, durably, under their SHA-256; equal ones share a file."""

    def __init__(self, folder: Path) -> None:
        """Keeps to ``folder``, which is made."""
        self._folder = folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, values: Bytes) -> str:
        """Writes a value and returns its digest; it survives a power cut from then on.

        Raises:
            DiskFull: there was no room; nothing half-written is left.
        """
        digest = hashlib.sha256(values.data).hexdigest()
        path = self._folder / digest
        if path.is_file() and _digest_of(path) == digest:
            return digest
        temporary = path.with_suffix(_NEW)
        with disk_errors(path):
            try:
                with temporary.open("wb", buffering=0) as stream:
                    written = 0
                    while written < len(values):  # a disk that fills up takes a part first
                        written += stream.write(values[written:].data)
                    os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(self._folder)
        return digest

    def get(self, digest: str, size: int) -> bytes:
        """The value of ``size`` bytes that was written under ``digest``.

        Raises:
            DataError: it is not there, or not what was written.
        """
        path = self._folder / digest
        raw = read_bytes(path, max_bytes=size, what="a value of the journal")
        if hashlib.sha256(raw).hexdigest() != digest:
            raise DataError(
                f"{path}: its bytes do not match the digest that it is named by: it is damaged, "
                "and was not used."
            )
        return raw

    def keep_only(self, digests: Collection[str]) -> None:
        """Removes every other value, and what was half-written when a process died."""
        with disk_errors(self._folder):
            for path in self._folder.iterdir():
                if path.name not in digests:
                    path.unlink()


def _digest_of(path: Path) -> str:
    """In small pieces: what is there need not fit into memory beside what is written."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
