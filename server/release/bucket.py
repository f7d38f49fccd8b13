"""A prefix in an object store, reached by the fsspec plugin for its address.

Objects appear as a whole in such a store. Credentials come from the environment or from the
plugin's own configuration; they are neither stored nor shown here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fedcore.config.addresses import check_bucket
from fedcore.errors import ConfigError, ReleaseError, ResourceError
from fedcore.observability.foreign import foreign

_PART_BYTES = 50 << 20  # an object of twice as much is uploaded in parts of this size
_PLUGINS = {"s3": "s3", "s3a": "s3"}
"""The extra of fedcore that brings the plugin for a kind of address."""
_UNKNOWN = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
_KEPT = "What the bucket had before is still there; run `fedcore release push` again."


@dataclass(frozen=True)
class StoredObject:
    """One object, as the store describes it."""

    length: int
    etag: str = ""
    """The store's fingerprint of the content; empty if it gives none."""

    def surely_holds(self, data: bytes) -> bool:
        """Returns whether the fingerprint shows that the object is ``data``."""
        return self.length == len(data) and self.etag in _fingerprints(data)


class ConditionFailed(Exception):
    """An object is another one than the condition of a write expected."""


@dataclass(frozen=True)
class Bucket:
    """The objects below an address."""

    url: str
    _files: Any = field(repr=False)
    _root: str = field(repr=False)

    def listing(self, folder: str) -> dict[str, StoredObject]:
        """Lists all objects below ``folder``, by name within the bucket's prefix."""
        with self._errors("list"):
            found = self._files.find(f"{self._root}/{folder}", detail=True)
        start = f"{self._root}/"
        return {
            path.removeprefix(start): _described(info)
            for path, info in found.items()
            if path.startswith(start)
        }

    def describe(self, name: str) -> StoredObject | None:
        """Asks the store about one object; returns None if there is none."""
        with self._errors("read"):
            try:
                return _described(self._files.info(self._path(name)))
            except FileNotFoundError:
                return None

    def read(self, name: str, stored: StoredObject, *, max_bytes: int) -> bytes | None:
        """Reads an object; returns None if it is gone, or longer than ``max_bytes``."""
        if stored.length > max_bytes:
            return None
        if not stored.length:
            return b""  # a store refuses a range of nothing
        with self._errors("read"):
            try:
                return bytes(self._files.cat_file(self._path(name), start=0, end=stored.length))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes, *, kept: bool) -> None:
        """Writes an object; ``kept`` tells caches that it will never change."""
        with self._errors("write to"):
            self._put(name, data, self._told(kept))

    def replace(self, name: str, data: bytes, before: StoredObject | None) -> None:
        """Writes an object that is still ``before``, where the store can check that.

        Raises:
            ConditionFailed: it is another one by now.
        """
        told = self._told(kept=False)
        condition: dict[str, str] = {}
        if told and before is None:  # S3, and stores that speak its protocol
            condition = {"IfNoneMatch": "*"}
        elif told and before is not None and before.etag:
            condition = {"IfMatch": f'"{before.etag}"'}
        with self._errors("write to"):
            try:
                self._put(name, data, {**told, **condition})
            except Exception as error:
                if condition and _is_unsupported(error):
                    self._put(name, data, told)
                elif condition and _is_conflict(error):
                    raise ConditionFailed from error
                else:
                    raise

    def holds(self, name: str, stored: StoredObject | None, data: bytes) -> bool:
        """Returns whether an object is ``data``; reads it if its fingerprint does not tell."""
        if stored is None or stored.length != len(data):
            return False
        return stored.surely_holds(data) or self.read(name, stored, max_bytes=len(data)) == data

    def _put(self, name: str, data: bytes, options: dict[str, Any]) -> None:
        self._files.pipe_file(self._path(name), data, **options)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _told(self, kept: bool) -> dict[str, Any]:
        """Returns the options of a write that S3 alone has."""
        if urlsplit(self.url).scheme not in _PLUGINS:
            return {}
        cached = "public, max-age=31536000, immutable" if kept else "no-cache"
        return {"CacheControl": cached, "chunksize": _PART_BYTES}

    @contextmanager
    def _errors(self, doing: str) -> Iterator[None]:
        """Turns what a plugin raises into an error of fedcore; a plugin may raise anything."""
        try:
            yield
        except (ReleaseError, ConditionFailed):
            raise
        except FileNotFoundError as error:
            raise ReleaseError(
                f"{self.url}: there is no such bucket. Nothing was pushed; create it first, or "
                "check the address and the region."
            ) from error
        except Exception as error:
            raise ReleaseError(
                f"{self.url}: cannot {doing} this bucket: {_reason(error)} {_KEPT}"
            ) from error


def open_bucket(url: str) -> Bucket:
    """Opens a bucket by its address, such as ``s3://releases/fleet``; connects on first use.

    Raises:
        ConfigError: it is no address of a bucket.
        ResourceError: the plugin for such addresses is not installed.
    """
    if fault := check_bucket(url):
        raise ConfigError(f"{fault} Nothing was pushed.")
    scheme = urlsplit(url).scheme
    extra = _PLUGINS.get(scheme)
    try:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        remedy = f"`pip install 'fedcore[{extra}]'`" if extra else foreign(error, 100)
        raise ResourceError(
            f"{url}: the fsspec plugin for {scheme}:// is not installed. Nothing was pushed; "
            f"install it: {remedy}."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{url}: fsspec has no plugin for {scheme}:// ({foreign(error, 100)}). Nothing was "
            "pushed; name a bucket, such as s3://releases/fleet."
        ) from error
    return Bucket(url.rstrip("/"), files, root.rstrip("/"))


def _described(info: dict[str, Any]) -> StoredObject:
    etag = info.get("ETag")
    return StoredObject(
        int(info.get("size") or 0), etag.strip('"') if isinstance(etag, str) else ""
    )


def _fingerprints(data: bytes) -> set[str]:
    """Returns the fingerprints that S3 gives ``data``: of one upload, and of one in parts."""
    whole = hashlib.md5(data, usedforsecurity=False)
    parts = [
        hashlib.md5(data[start : start + _PART_BYTES], usedforsecurity=False).digest()
        for start in range(0, len(data), _PART_BYTES)
    ]
    joined = hashlib.md5(b"".join(parts), usedforsecurity=False)
    return {whole.hexdigest(), f"{joined.hexdigest()}-{len(parts)}"}


def _reason(error: Exception) -> str:
    kind, said = type(error).__name__, foreign(error, 200).rstrip(".")
    if isinstance(error, PermissionError):
        return (
            f"access is denied ({said}). Check the credentials, and that they may list, read and "
            "write there."
        )
    if kind in _UNKNOWN:
        return (
            f"there are no credentials ({said}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE."
        )
    return f"{kind}: {said}."


def _codes(error: BaseException) -> str:
    """Returns the texts of an error and its causes, which hold the store's own error code."""
    texts = []
    one: BaseException | None = error
    while one is not None:
        texts.append(f"{type(one).__name__} {one}")
        one = one.__cause__
    return " ".join(texts)


def _is_conflict(error: Exception) -> bool:
    found = _codes(error)
    return any(code in found for code in ("PreconditionFailed", "ConditionalRequestConflict"))


def _is_unsupported(error: Exception) -> bool:
    return "NotImplemented" in _codes(error)
