"""Copies a repository to a bucket, from which devices fetch it over HTTPS.

The folder stays the source of truth: a push only adds what the bucket lacks, repairs what differs,
and never goes back. Start with `push`.

Devices start at ``timestamp.json``, so it goes last: files first, then the metadata that names
them, then new roots, which the timestamp may need. A push that broke off has changed nothing for
devices, and another one goes on where it stopped. Nothing is ever removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    Metadata,
    Root,
    Timestamp,
)

from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, FedcoreError, ReleaseError
from fedcore.files import lock_file, read_bytes
from fedcore.observability.words import bytes_text, counted
from server.release.bucket import Bucket, ConditionFailed, StoredObject, open_bucket
from server.release.registry import repository as registry
from server.release.registry.keys import MAX_METADATA_BYTES, read_trusted_root

TIMESTAMP = "metadata/timestamp.json"
OnUpload = Callable[[str, int], None]
"""Called before each upload with the object's name and its size in bytes."""
_Read = Callable[[], bytes]


@dataclass(frozen=True)
class PushedRepository:
    """What a push found and did.

    Example::

        done = fedcore.push_release("releases", "keys", to="s3://bucket/fleet")
        done.uploaded, done.repaired
    """

    to: str
    """Address of the bucket."""
    version: int
    """Version of the timestamp that is in the bucket now."""
    files: int
    """How many objects are there as they were signed."""
    uploaded: tuple[str, ...]
    """Names of the objects that were written."""
    uploaded_bytes: int
    repaired: tuple[str, ...]
    """Those of them that were there with another content than what was signed."""
    unnamed: int
    """How many objects below ``targets`` no metadata in force names; a push leaves them."""


@dataclass(frozen=True)
class _BucketContent:
    """What a bucket is to hold: readers of unchanging files in the order of uploads."""

    files: dict[str, _Read]
    timestamp: bytes
    state: registry.RepositoryState
    roots: tuple[Root, ...]
    """All roots, from the newest on."""


def push(
    repository: Path, keys: Path, to: str, *, on_upload: OnUpload = lambda name, length: None
) -> PushedRepository:
    """Brings a bucket to the state of a repository.

    Each object is checked after its upload, and each that was there before it: by the store's
    fingerprint of its content where that tells, else by reading it.

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        to: Address of the bucket, such as ``s3://bucket/fleet``.
        on_upload: Called before each upload.

    Raises:
        ConfigError: ``to`` is no address of a bucket.
        ResourceError: the plugin for the address is not installed.
        ReleaseError: the repository or one of its files doesn't verify; the bucket has a newer
            version, or versions that this repository doesn't know; or it cannot be reached. For
            devices the bucket is as before.
    """
    bucket = open_bucket(to)
    with registry.locked(repository):
        pass  # refuses a folder without a repository, in which no lock may appear
    # Another push of this folder may have an older state in hand: one after the other.
    with lock_file(repository / ".push.lock"):
        content = _content(repository, keys)
        return _push(bucket, repository, content, on_upload)


def push_published(
    manifest: Manifest,
    repository: Path,
    keys: Path,
    to: str | None,
    advance: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Pushes a repository after a publication, see `push`.

    Args:
        manifest: What was published.
        repository: The folder of the repository.
        keys: The folder of keys.
        to: Address of the bucket; None to push nothing.
        advance: Called with a description of each upload.

    Returns:
        What was done, for people; empty if there is no bucket.

    Raises:
        ReleaseError: the push failed; the version stays published in the folder.
    """
    if to is None:
        return []

    def tell(name: str, length: int) -> None:
        advance(f"uploading {name}, {bytes_text(length)}")

    try:
        done = push(repository, keys, to, on_upload=tell)
    except FedcoreError as error:
        raise ReleaseError(
            f"{manifest.model} version {manifest.version} is published in {repository}, but was "
            f"not pushed: {error}"
        ) from error
    return [f"pushed {counted(len(done.uploaded), 'file')} to {done.to}"]


def check_push(repository: Path, keys: Path, to: str) -> None:
    """Checks, before a model exists, the conditions under which `push` would fail.

    Raises:
        FedcoreError: as `push` does. Nothing was written.
    """
    bucket = open_bucket(to)
    content = _content(repository, keys)
    _check_history(bucket, repository, content, bucket.listing("metadata"))


def _content(repository: Path, keys: Path) -> _BucketContent:
    with registry.locked(repository):
        trusted = read_trusted_root(keys)
        state = registry.read_state(repository, trusted)
        timestamp = _metadata(repository, TIMESTAMP)
    infos = [*state.releases.targets.values(), *state.targets.targets.values()]
    files: dict[str, _Read] = {
        f"targets/{info.get_prefixed_paths()[0]}": partial(registry.read_info, repository, info)
        for info in infos
    }
    parts = (
        ("targets", state.targets.version),
        ("releases", state.releases.version),
        ("snapshot", state.snapshot.version),
        *(("root", version) for version in range(1, state.root.version + 1)),
    )
    for role, version in parts:
        name = f"metadata/{version}.{role}.json"
        files[name] = partial(_metadata, repository, name)
    return _BucketContent(files, timestamp, state, tuple(_roots(repository, state.root)))


def _roots(repository: Path, newest: Root) -> Iterator[Root]:
    """Yields the roots from the newest on, as far as each vouches for the one after it."""
    root = newest
    yield root
    while root.version > 1:
        raw = _metadata(repository, f"metadata/{root.version - 1}.root.json")
        after = _metadata(repository, f"metadata/{root.version}.root.json")
        try:
            before: Metadata[Root] = Metadata.from_bytes(raw)
            signed: Metadata[Root] = Metadata.from_bytes(after)
            before.signed.verify_delegate("root", signed.signed_bytes, signed.signatures)
        except (RepositoryError, ValueError) as error:
            raise ReleaseError(
                f"{repository}: {root.version - 1}.root.json does not vouch for the next root "
                f"({error}). Nothing was pushed; restore the repository from a copy."
            ) from error
        root = before.signed
        yield root


def _metadata(repository: Path, name: str) -> bytes:
    try:
        return read_bytes(repository / name, max_bytes=MAX_METADATA_BYTES, what="signed metadata")
    except DataError as error:
        raise ReleaseError(
            f"{error} Nothing was pushed; restore the repository from a copy."
        ) from error


def _push(
    bucket: Bucket, repository: Path, content: _BucketContent, on_upload: OnUpload
) -> PushedRepository:
    there = bucket.listing("metadata") | bucket.listing("targets")
    before, altered = _check_history(bucket, repository, content, there)
    uploaded, repaired, total = list[str](), list[str](), 0
    for name, read in content.files.items():
        data, stored = read(), there.get(name)
        if bucket.holds(name, stored, data):
            continue
        on_upload(name, len(data))
        bucket.write(name, data, kept=True)
        _check_upload(bucket, name, data)
        uploaded.append(name)
        total += len(data)
        if stored is not None:
            repaired.append(name)
    if before is None or not bucket.holds(TIMESTAMP, before, content.timestamp):
        on_upload(TIMESTAMP, len(content.timestamp))
        try:
            bucket.replace(TIMESTAMP, content.timestamp, before)
        except ConditionFailed:
            raise _overtaken(bucket) from None
        _check_upload(bucket, TIMESTAMP, content.timestamp)
        uploaded.append(TIMESTAMP)
        total += len(content.timestamp)
        if altered:
            repaired.append(TIMESTAMP)
    unnamed = [name for name in there if name.startswith("targets/") and name not in content.files]
    return PushedRepository(
        to=bucket.url,
        version=content.state.timestamp.version,
        files=len(content.files) + 1,
        uploaded=tuple(uploaded),
        uploaded_bytes=total,
        repaired=tuple(repaired),
        unnamed=len(unnamed),
    )


def _check_upload(bucket: Bucket, name: str, data: bytes) -> None:
    """Checks by length and content that an object arrived as it was sent."""
    if bucket.holds(name, bucket.describe(name), data):
        return
    if name == TIMESTAMP:
        raise _overtaken(bucket)
    raise ReleaseError(
        f"{bucket.url}: {name} is not in the bucket as it was uploaded; something else writes "
        "there, or the store damages it. The timestamp was not replaced, so devices see what they "
        "saw before; find out who may write to the bucket, and push again."
    )


def _overtaken(bucket: Bucket) -> ReleaseError:
    return ReleaseError(
        f"{bucket.url}: another publisher replaced the timestamp during this push. Devices see the "
        "other one's; publish from one folder alone, and push again, which tells whether the "
        "bucket's versions are this folder's."
    )


def _check_history(
    bucket: Bucket, repository: Path, content: _BucketContent, there: dict[str, StoredObject]
) -> tuple[StoredObject | None, bool]:
    """Checks that the bucket's versions are earlier ones of this repository.

    Returns:
        The bucket's timestamp, and whether it is one that nobody signed.

    Raises:
        ReleaseError: the bucket has another repository, a newer version of this one, or versions
            that this folder doesn't know.
    """
    _check_roots(bucket, content, there)
    # Not from the listing: a write on the condition that it is unchanged follows.
    stored = bucket.describe(TIMESTAMP)
    raw = None if stored is None else bucket.read(TIMESTAMP, stored, max_bytes=MAX_METADATA_BYTES)
    if stored is None or raw == content.timestamp:
        return stored, False
    newest, *older = content.roots
    found = _timestamp(raw, newest)
    if found is None:
        # Signed by retired keys: a rotation takes its place, however high its version.
        return stored, not any(_timestamp(raw, root) for root in older)
    own = content.state.timestamp.version
    if found.version >= own:
        raise ReleaseError(
            f"{bucket.url}: it has version {found.version} of the timestamp, and {repository} has "
            f"{own}. Nothing was pushed, as devices never go back; push from the folder that was "
            "published to last, and publish from that one alone."
        )
    name = f"{found.snapshot_meta.version}.snapshot.json"
    try:
        found.snapshot_meta.verify_length_and_hashes(_metadata(repository, f"metadata/{name}"))
    except (ReleaseError, RepositoryError):
        raise ReleaseError(
            f"{bucket.url}: its releases are not earlier ones of {repository}, which does not "
            f"have the bucket's {name}: another copy of the repository was published to and "
            "pushed. Nothing was pushed, as that would withdraw what the other copy published; "
            "publish from one folder alone."
        ) from None
    return stored, False


def _check_roots(bucket: Bucket, content: _BucketContent, there: dict[str, StoredObject]) -> None:
    first = "metadata/1.root.json"
    stored, own = there.get(first), content.files[first]()
    if stored is not None and not bucket.holds(first, stored, own):
        raise ReleaseError(
            f"{bucket.url}: its {first} is another one, so another repository is there, or "
            "somebody altered it. Nothing was pushed; name another prefix, or remove that object "
            "if the bucket is meant for this repository."
        )
    newest = content.roots[0]
    name = f"metadata/{newest.version + 1}.root.json"
    if (stored := there.get(name)) is None:
        return
    raw = bucket.read(name, stored, max_bytes=MAX_METADATA_BYTES)
    try:
        later: Metadata[Root] = Metadata.from_bytes(raw or b"")
        newest.verify_delegate("root", later.signed_bytes, later.signatures)
    except (RepositoryError, ValueError):
        raise ReleaseError(
            f"{bucket.url}: {name} is not signed by the keys of root {newest.version}, and makes "
            "devices refuse the bucket. Nothing was pushed; remove that object, and find out who "
            "may write to the bucket."
        ) from None
    raise ReleaseError(
        f"{bucket.url}: it has a newer root, {name}: keys were rotated in another copy of the "
        "repository. Nothing was pushed; push from that copy, and publish from it alone."
    )


def _timestamp(raw: bytes | None, root: Root) -> Timestamp | None:
    """Returns a timestamp that a root's keys have signed; None if it is not one."""
    try:
        found: Metadata[Timestamp] = Metadata.from_bytes(raw or b"")
        root.verify_delegate("timestamp", found.signed_bytes, found.signatures)
    except (RepositoryError, ValueError):
        return None
    return found.signed if isinstance(found.signed, Timestamp) else None
