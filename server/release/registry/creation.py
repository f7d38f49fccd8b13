"""Creation of an empty repository, and the paths that its online keys may sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
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
    """Returns the target paths that the online ``releases`` key may sign, one per file.

    A TUF wildcard doesn't cross folders, so ``*`` matches one model or one version.
    """
    return [
        f"models/{model}/{rest}"
        for model in models or ["*"]
        for rest in (POINTER, *(f"*/{name}" for name in RELEASE_FILES))
    ]


def refuse_occupied(repository: Path) -> None:
    """Raises `ReleaseError` unless the folder is missing or empty."""
    if repository.exists() and (not repository.is_dir() or any(repository.iterdir())):
        raise ReleaseError(
            f"{repository}: expected an empty folder, or none. Nothing was written; choose "
            "another, or publish to the existing repository."
        )


def create(
    repository: Path,
    keys: Keys,
    *,
    models: Sequence[str],
    quorums: Mapping[str, Quorum],
    now: datetime,
) -> bytes:
    """Creates an empty repository and returns its root metadata, which devices need.

    Args:
        repository: A new or empty folder.
        keys: Keys of all roles.
        models: Names of the models that may be published without the offline keys; empty for any.
        quorums: Number of keys and signing threshold by role; one key for roles not listed.
        now: Time from which expiry is counted; UTC.

    Raises:
        DiskFull: the disk is full.
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
        terminating=True,  # no other role is consulted for unlisted paths
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
