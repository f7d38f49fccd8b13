"""Making an empty repository, and what its online keys may ever sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import (  # type: ignore[attr-defined]  # re-exported unsaid
    TOP_LEVEL_ROLE_NAMES,
    DelegatedRole,
    Delegations,
    Key,
    Root,
    Snapshot,
    Targets,
)

from fedcore.artifacts.statements import stamp
from fedcore.errors import ReleaseError
from server.release.registry.keys import Keys, Quorum
from server.release.registry.repository import (
    OFFLINE_EXPIRY,
    POINTER,
    RELEASE_FILES,
    RELEASES_EXPIRY,
    replace,
    sign,
)


def delegated_paths(models: Sequence[str]) -> list[str]:
    """The target paths that the online ``releases`` key may sign, file by file.

    A wildcard of TUF stays within one folder, so ``*`` stands for one model or one version.
    """
    return [
        f"models/{model}/{rest}"
        for model in models or ["*"]
        for rest in (POINTER, *(f"*/{name}" for name in RELEASE_FILES))
    ]


def refuse_occupied(repository: Path) -> None:
    """Raises `ReleaseError` unless a repository can be made in this folder."""
    if repository.exists() and (not repository.is_dir() or any(repository.iterdir())):
        raise ReleaseError(
            f"{repository}: expected an empty folder, or none. Nothing was written; choose "
            "another, or publish to the repository that is there."
        )


def create(
    repository: Path,
    keys: Keys,
    *,
    models: Sequence[str],
    quorums: Mapping[str, Quorum],
    now: datetime,
) -> bytes:
    """Makes an empty repository and returns its root metadata, which devices are given.

    Args:
        repository: A folder that is not there yet, or is empty.
        keys: Of all roles.
        models: The only models that may ever be published without the offline keys; any when
            empty.
        quorums: How many keys a role has and needs; one where nothing is said.
        now: Expiry counts from here; UTC.

    Raises:
        DiskFull: there was no room.
    """
    root = Root(
        version=1,
        expires=now + OFFLINE_EXPIRY,
        consistent_snapshot=True,
        unrecognized_fields=stamp(now),
    )
    for role in sorted(TOP_LEVEL_ROLE_NAMES):
        for key in keys.public(role):
            root.add_key(key, role)
        root.roles[role].threshold = quorums.get(role, Quorum()).threshold
    delegated = DelegatedRole(
        name="releases",
        keyids=keys.ids("releases"),
        threshold=quorums.get("releases", Quorum()).threshold,
        terminating=True,  # what it does not list does not exist: nobody else is asked
        paths=delegated_paths(models),
    )
    by_id: dict[str, Key] = {key.keyid: key for key in keys.public("releases")}
    targets = Targets(
        version=1,
        expires=now + OFFLINE_EXPIRY,
        delegations=Delegations(keys=by_id, roles={"releases": delegated}),
    )
    releases = Targets(version=1, expires=now + RELEASES_EXPIRY)
    raw_root = sign(root, keys, "root")
    replace(
        repository,
        keys,
        {"targets": targets, "releases": releases},
        {"metadata/1.root.json": raw_root},
        snapshot=Snapshot(version=1, expires=now + RELEASES_EXPIRY, meta={}),
        timestamp_version=1,
        now=now,
    )
    return raw_root
