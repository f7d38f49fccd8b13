"""The signed TUF repository on disk: verified when read, and changed atomically.

::

    metadata/N.root.json, N.targets.json      delegations of trust; offline keys
    metadata/N.releases.json                  the published files; online key
    metadata/N.snapshot.json, timestamp.json  versions of the above in force; online keys
    targets/models/MODEL/VERSION/HASH.FILE    the files, named by their digests

Devices start at ``timestamp.json``. It is replaced last and atomically, so that a change takes
effect completely or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # implicit re-export
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    DelegatedRole,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from fedcore.artifacts.statements import stamp
from fedcore.errors import DataError, ReleaseError
from fedcore.files import lock_file, name_exists, read_bytes, remove_unfinished_below, write_atomic
from fedcore.observability.words import counted
from server.release.registry import pending
from server.release.registry.keys import MAX_METADATA_BYTES, Keys

OFFLINE_EXPIRY = timedelta(days=365)
"""Lifetime of root and targets: long, because each renewal needs the offline keys."""
RELEASES_EXPIRY = timedelta(days=30)
"""Lifetime of releases and snapshot: nothing that a stolen online key signs outlives a month."""
TIMESTAMP_EXPIRY = timedelta(days=7)
"""A device notices a frozen repository within a week; run `refresh` daily."""

RELEASE_FILES = ("golden.safetensors", "manifest.json", "model.onnx")
POINTER = "release.json"

Payload = TypeVar("Payload", Root, Targets, Snapshot, Timestamp)
_NAME = "[a-z0-9][a-z0-9_-]{0,63}"
_RELEASE = re.compile(rf"models/({_NAME})/([1-9][0-9]{{0,15}})/([a-z]+[.][a-z]+)")


@dataclass(frozen=True)
class RepositoryState:
    """The metadata in force, each part verified by its delegator."""

    root: Root
    targets: Targets
    releases: Targets
    snapshot: Snapshot
    timestamp: Timestamp


@contextmanager
def locked(repository: Path) -> Iterator[None]:
    """Locks the repository; first completes an interrupted rotation, and removes unfinished files.

    Waits for another holder. The kernel releases the lock when its process ends.

    Raises:
        ReleaseError: there is no repository in this folder.
    """
    if not (repository / "metadata").is_dir():
        raise ReleaseError(
            f"{repository}: there is no release repository here. Nothing was published; create "
            "one with `fedcore release init`."
        )
    with lock_file(repository / ".lock"):
        remove_unfinished_below(repository)
        pending.finish(repository)
        yield


def read_state(repository: Path, trusted_root: bytes) -> RepositoryState:
    """Reads the metadata in force and verifies it, starting from ``trusted_root``.

    Expiry isn't checked, so that expired metadata can be renewed.

    Raises:
        ReleaseError: a part is missing, damaged, or not signed by the right keys.
    """
    folder = repository / "metadata"
    try:
        root = _verified(Root, trusted_root, "root", None)
        while name_exists(path := folder / f"{root.version + 1}.root.json"):
            newer = _verified(Root, _read(path), "root", root)
            if newer.version != root.version + 1:
                raise RepositoryError(f"{path.name} says that it is version {newer.version}")
            root = newer
        timestamp = _verified(Timestamp, _read(folder / "timestamp.json"), "timestamp", root)
        snapshot = _verified_by_delegator(
            Snapshot, folder, "snapshot", timestamp.snapshot_meta, root
        )
        targets = _verified_by_delegator(
            Targets, folder, "targets", snapshot.meta["targets.json"], root
        )
        releases = _verified_by_delegator(
            Targets, folder, "releases", snapshot.meta["releases.json"], targets
        )
    except (RepositoryError, DataError, KeyError, ValueError) as error:
        raise ReleaseError(
            f"{repository}: this repository does not verify with the root in the folder of keys: "
            f"{type(error).__name__}: {error}. Nothing was published; pass the folder of keys "
            "that belongs to it, or restore it from a copy."
        ) from error
    return RepositoryState(root, targets, releases, snapshot, timestamp)


def trusted_keys(state: RepositoryState, keys: Keys, repository: Path) -> Keys:
    """Returns the subset of the keys that the repository trusts.

    Raises:
        ReleaseError: a role has no trusted key, or fewer than its threshold.
    """
    trusted = dict[str, tuple[CryptoSigner, ...]]()
    for role, signers in keys.signers.items():
        delegator = state.targets if role == "releases" else state.root
        required = delegator.get_delegated_role(role)
        trusted[role] = tuple(
            signer for signer in signers if signer.public_key.keyid in required.keyids
        )
        if not trusted[role]:
            raise ReleaseError(
                f"{repository}: its role {role!r} is signed by another key than the one given "
                f"({keys.ids(role)[0][:12]}). Nothing was published; pass the folder of keys "
                "that `fedcore release init` created for this repository."
            )
        if len(trusted[role]) < required.threshold:
            raise ReleaseError(
                f"{repository}: its role {role!r} needs {required.threshold} of its "
                f"{counted(len(required.keyids), 'key')}, and {len(trusted[role])} is given. "
                "Nothing was published; add more of their files to the folder of keys."
            )
    return Keys(trusted)


def may_publish(state: RepositoryState, path: str) -> bool:
    """Returns whether the online keys are trusted for a target path."""
    role = state.targets.get_delegated_role("releases")
    return isinstance(role, DelegatedRole) and role.is_delegated_path(path)


def release_of(path: str) -> tuple[str, int, str] | None:
    """Parses a target path into model, version and file; None if it isn't a release's path.

    A holder of an online key can sign any path, so paths are validated before use.
    """
    found = _RELEASE.fullmatch(path)
    return (found[1], int(found[2]), found[3]) if found else None


def is_pointer(path: str) -> bool:
    """Returns whether a target path is a model's pointer to its current release."""
    return re.fullmatch(rf"models/{_NAME}/{re.escape(POINTER)}", path) is not None


def releases(state: RepositoryState) -> Iterator[tuple[str, int, str]]:
    """Yields model, version and file of each published file."""
    return (found for path in state.releases.targets if (found := release_of(path)) is not None)


def read_target(repository: Path, state: RepositoryState, path: str) -> bytes:
    """Reads and verifies a published file.

    Raises:
        ReleaseError: it is missing or differs from what was signed.
    """
    return read_info(repository, state.releases.targets[path])


def read_info(repository: Path, info: TargetFile) -> bytes:
    """Reads and verifies a file that signed metadata describes.

    Raises:
        ReleaseError: it is missing or differs from what was signed.
    """
    try:
        raw = read_bytes(
            repository / "targets" / info.get_prefixed_paths()[0],
            max_bytes=info.length,
            what="a published file",
        )
        info.verify_length_and_hashes(raw)
    except (DataError, RepositoryError) as error:
        raise ReleaseError(
            f"{repository}: {info.path} differs from what was published: {error} Nothing was "
            "changed; restore the file from a copy of the repository."
        ) from error
    return raw


def add(
    repository: Path,
    state: RepositoryState,
    keys: Keys,
    files: Mapping[str, bytes],
    *,
    now: datetime,
    custom: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Publishes files under their target paths; without files, renews expiring metadata.

    Args:
        repository: Locked by the caller.
        state: The metadata, read under that lock.
        keys: The online keys.
        files: Bytes by target path.
        now: Time from which expiry is counted; UTC.
        custom: Signed custom metadata of some of the files, by target path.

    Raises:
        ReleaseError: the offline metadata has expired, or the file list is too large for devices.
        DiskFull: the disk is full. In both cases the previous release stays in force.
    """
    _replace_online(repository, state, keys, files, {}, now=now, custom=custom)


def renew_offline(repository: Path, state: RepositoryState, keys: Keys, *, now: datetime) -> None:
    """Renews root and targets for a year, and all metadata below them.

    Raises:
        DiskFull: the disk is full; the previous metadata stays in force.
    """
    root = Root.from_dict(state.root.to_dict())
    root.version, root.expires = root.version + 1, now + OFFLINE_EXPIRY
    root.unrecognized_fields |= stamp(now)
    targets = Targets.from_dict(state.targets.to_dict())
    targets.version, targets.expires = targets.version + 1, now + OFFLINE_EXPIRY
    # The new root has the same keys, so it may come into force before the rest.
    write_atomic(repository / "metadata" / f"{root.version}.root.json", sign(root, keys, "root"))
    renewed = RepositoryState(root, targets, state.releases, state.snapshot, state.timestamp)
    _replace_online(repository, renewed, keys, {}, {"targets": targets}, now=now)


def sign(payload: Payload, keys: Keys, role: str, *others: Keys) -> bytes:
    """Signs a payload and returns the metadata file.

    Args:
        payload: The content to sign.
        keys: The signing keys.
        role: The role whose keys sign.
        others: More keys that sign for this role: previous roots also sign a new root.
    """
    metadata: Metadata[Payload] = Metadata(payload)
    for signer in (*keys.signers[role], *(one for other in others for one in other.signers[role])):
        metadata.sign(signer, append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def _replace_online(
    repository: Path,
    state: RepositoryState,
    keys: Keys,
    files: Mapping[str, bytes],
    roles: Mapping[str, Targets],
    *,
    now: datetime,
    custom: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    for role, payload in (("root", state.root), ("targets", state.targets)):
        if payload.is_expired(now):
            raise ReleaseError(
                f"{repository}: the metadata of role {role!r} expired on "
                f"{payload.expires:%Y-%m-%d}, so devices would refuse any release. Nothing was "
                "published; renew it with `fedcore release refresh --offline`, which needs the "
                "offline keys."
            )
    infos = {path: TargetFile.from_data(path, data, ["sha256"]) for path, data in files.items()}
    for path, values in (custom or {}).items():
        infos[path].unrecognized_fields["custom"] = values
    releases = Targets(
        version=state.releases.version + 1,
        expires=now + RELEASES_EXPIRY,
        targets={**state.releases.targets, **infos},
    )
    replace(
        repository,
        keys,
        {**roles, "releases": releases},
        {f"targets/{infos[path].get_prefixed_paths()[0]}": data for path, data in files.items()},
        snapshot=Snapshot(
            version=state.snapshot.version + 1,
            expires=now + RELEASES_EXPIRY,
            meta=dict(state.snapshot.meta),
        ),
        timestamp_version=state.timestamp.version + 1,
        now=now,
    )


def replace(
    repository: Path,
    keys: Keys,
    roles: Mapping[str, Targets],
    files: Mapping[str, bytes],
    *,
    snapshot: Snapshot,
    timestamp_version: int,
    now: datetime,
    root: tuple[int, bytes] | None = None,
) -> None:
    """Writes all files under new names, then replaces the timestamp, which commits the change.

    Args:
        repository: Locked by the caller.
        keys: Keys of the changed roles, of snapshot and timestamp.
        roles: New targets metadata by role.
        files: Additional files, by path within the repository.
        snapshot: The new snapshot; its ``meta`` is updated here.
        timestamp_version: Version of the new timestamp.
        now: Time from which expiry is counted; UTC.
        root: Version and bytes of a root that comes into force with the timestamp.
    """
    new = dict(files)
    for role, payload in roles.items():
        raw = sign(payload, keys, role)
        if len(raw) > MAX_METADATA_BYTES:
            raise ReleaseError(
                f"{repository}: the list of published files would have {len(raw)} bytes, more than "
                f"the {MAX_METADATA_BYTES} that devices read. Nothing was published; start a new "
                "repository."
            )
        new[f"metadata/{payload.version}.{role}.json"] = raw
        snapshot.meta[f"{role}.json"] = MetaFile.from_data(payload.version, raw, ["sha256"])
    raw = sign(snapshot, keys, "snapshot")
    new[f"metadata/{snapshot.version}.snapshot.json"] = raw
    timestamp = Timestamp(
        version=timestamp_version,
        expires=now + TIMESTAMP_EXPIRY,
        snapshot_meta=MetaFile.from_data(snapshot.version, raw, ["sha256"]),
        unrecognized_fields=stamp(now),
    )
    switch, raw = repository / "metadata" / "timestamp.json", sign(timestamp, keys, "timestamp")
    written: list[Path] = []
    try:
        for name, data in new.items():
            if not name_exists(path := repository / name):
                written.append(path)
            write_atomic(path, data)
        if root is None:
            write_atomic(switch, raw)
        else:
            pending.commit(repository, {f"{root[0]}.root.json": root[1], switch.name: raw})
    except BaseException:
        begun = pending.is_pending(repository)
        if not begun and not _holds(switch, raw):  # not in force: nothing refers to them
            for path in written:
                path.unlink(missing_ok=True)
        raise


def _holds(path: Path, raw: bytes) -> bool:
    try:
        return _read(path) == raw
    except DataError:
        return False


def _read(path: Path) -> bytes:
    return read_bytes(path, max_bytes=MAX_METADATA_BYTES, what="signed metadata")


def _verified(
    kind: type[Payload], raw: bytes, role: str, delegator: Root | Targets | None
) -> Payload:
    """Returns the payload of a metadata file, verified by its delegator; a root also by itself."""
    metadata: Metadata[Payload] = Metadata.from_bytes(raw)
    signed = metadata.signed
    if not isinstance(signed, kind):
        raise RepositoryError(f"expected metadata of type {kind.type!r}, got {signed.type!r}")
    for vouching in (delegator, signed if isinstance(signed, Root) else None):
        if vouching is not None:
            vouching.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    return signed


def _verified_by_delegator(
    kind: type[Payload], folder: Path, role: str, meta: MetaFile, delegator: Root | Targets
) -> Payload:
    """Returns the payload of a metadata file, also verified by version and digest in ``meta``."""
    raw = _read(folder / f"{meta.version}.{role}.json")
    meta.verify_length_and_hashes(raw)
    return _verified(kind, raw, role, delegator)
