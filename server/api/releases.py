"""Signed repositories of models as calls: create, list, renew, rotate keys, and roll back.

`fedcore.publish` adds a model to a repository, and `fedcore.update_model` takes it from there on a
device. Imports neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.stability import SHIFTED
from fedcore.errors import ReleaseError
from server.delivery.drift import as_row, drift_of
from server.delivery.feedback import ServingBook
from server.delivery.reports import book_of, tally
from server.release.channels import promote, rollouts
from server.release.publish import history, initialise, refresh, rollback
from server.release.registry.keys import OFFLINE, ONLINE, ROLES, Quorum
from server.release.registry.rotation import Rotation, rotate
from server.release.upkeep import collect_garbage, verify_files

ROLE_GROUPS = {"online": ONLINE, "offline": OFFLINE}
"""Roles by the folder of their keys."""
Place = str | PathLike[str]


@dataclass(frozen=True)
class NewRepository:
    """The folders and files that `fedcore.create_repository` made.

    Example::

        made = fedcore.create_repository("releases", "keys")
        made.root  # give this file to devices
    """

    repository: Path
    """The empty, signed repository."""
    keys: Path
    """The folder of keys: ``online`` publishes; move ``offline`` to storage without connection."""
    root: Path
    """The ``root.json`` that devices must receive over a channel that their owners trust."""


def create_repository(
    repository: Place,
    keys: Place,
    *,
    models: Iterable[str] = (),
    thresholds: Mapping[str, tuple[int, int]] | None = None,
) -> NewRepository:
    """Creates keys, and an empty repository that they sign.

    Example::

        made = fedcore.create_repository("releases", "keys")
        manifest = fedcore.publish(result.compressed, result, repository="releases", keys="keys")

    Args:
        repository: A new or empty folder.
        keys: A folder without keys, outside of the repository.
        models: Names of the models that the online keys may publish; empty for any.
        thresholds: By role, how many of how many keys must sign, such as ``{"root": (2, 3)}``; one
            key for roles not listed. Roles are ``root``, ``targets``, ``releases``, ``snapshot``
            and ``timestamp``.

    Returns:
        The folders, and the root metadata file for devices.

    Raises:
        ReleaseError: keys or a repository exist already, or a name, role or threshold is not valid.
        DiskFull: the disk is full; nothing is left behind.
    """
    root = initialise(
        Path(repository),
        Path(keys),
        models=_names(models),
        quorums=_quorums(thresholds),
        now=_now(),
    )
    return NewRepository(Path(repository), Path(keys), root)


def list_releases(repository: Place, keys: Place) -> tuple[Manifest, ...]:
    """Lists every published version, after verifying its signatures.

    Example::

        for manifest in fedcore.list_releases("releases", "keys"):
            print(manifest.model, manifest.version, manifest.lineage.run)

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.

    Returns:
        The manifests, ordered by model and version.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify.
    """
    return history(Path(repository), Path(keys))


def refresh_repository(
    repository: Place, keys: Place, *, offline: bool = False
) -> dict[str, datetime]:
    """Renews signatures that would expire, so that devices keep trusting the current releases.

    Call it daily, and once a year with ``offline=True``.

    Example::

        expiry = fedcore.refresh_repository("releases", "keys")
        min(expiry.values())  # when the next signature expires

    Args:
        repository: The folder of the repository.
        keys: The folder of keys.
        offline: Whether to renew root and targets, too, which requires the offline keys.

    Returns:
        When each role's signature expires (UTC).

    Raises:
        ReleaseError: the repository is missing, or keys are missing or not the repository's.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    state = refresh(Path(repository), Path(keys), now=_now(), offline=offline)
    return {
        "root": state.root.expires,
        "targets": state.targets.expires,
        "releases": state.releases.expires,
        "snapshot": state.snapshot.expires,
        "timestamp": state.timestamp.expires,
    }


def rotate_keys(
    repository: Place,
    keys: Place,
    *,
    roles: Iterable[str] = ("online",),
    thresholds: Mapping[str, tuple[int, int]] | None = None,
    last_good: Mapping[str, int] | None = None,
) -> Rotation:
    """Replaces keys of a repository, and withdraws what a thief published.

    Devices follow by themselves from any earlier root.

    Example::

        done = fedcore.rotate_keys("releases", "keys", last_good={"digits": 7})
        done.removed  # files of retired keys: destroy every copy of them

    Args:
        repository: The folder of the repository; restore a copy first if a thief may have written
            to it.
        keys: The folder of keys, with the old keys of root and of all roles that keep theirs.
        roles: Roles whose keys are replaced; ``online`` and ``offline`` stand for all roles with
            keys in that folder.
        thresholds: By replaced role, how many of how many new keys must sign; as before by default.
        last_good: By model, the version to which devices return; later ones are withdrawn.

    Returns:
        The rotation in force. ``root.json`` in the folder of keys is the new root.

    Raises:
        ReleaseError: keys are missing or not the repository's, or a role, threshold or version is
            not valid. Nothing changes.
        DiskFull: the disk is full. Nothing changes.
    """
    named = [role for name in _names(roles) for role in ROLE_GROUPS.get(name, (name,))]
    return rotate(
        Path(repository),
        Path(keys),
        roles=named,
        quorums=_quorums(thresholds),
        last_good=last_good,
        now=_now(),
    )


def roll_back(model: str, version: int, *, repository: Place, keys: Place) -> Manifest:
    """Publishes the files of an older version again, under a new version number.

    Devices never install a lower version number than before, so a bad version is followed by a new
    one with the files of a good one.

    Example::

        manifest = fedcore.roll_back("digits", 3, repository="releases", keys="keys")
        manifest.version, manifest.lineage.rollback_of

    Args:
        model: The model's name.
        version: The older version.
        repository: The folder of the repository.
        keys: The folder of its online keys.

    Returns:
        The signed manifest of the new version.

    Raises:
        ReleaseError: there is no such older version, keys are missing or not the repository's, or
            devices would reject the release. Earlier releases remain valid.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    return rollback(model, version, repository=Path(repository), keys=Path(keys), created=_now())


def list_rollouts(
    repository: Place, keys: Place, *, reports: Place = "reports"
) -> list[dict[str, Any]]:
    """Lists which versions devices get, what was rolled back and why, and devices' reports.

    Example::

        for row in fedcore.list_rollouts("releases", "keys"):
            print(row["model"], row["stable"], row["canary"], row["rolled_back"])

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        reports: The folder in which ``fedcore release serve`` keeps devices' reports.

    Returns:
        For each model its name, its ``stable`` version, the ``canary`` on trial or None, the
        versions that were ``rolled_back``, how many ``devices`` reported what by version, and how
        they use it: ``serving`` has what `fedcore.measure_drift` returns, by version.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify.
    """
    book = book_of(Path(reports), Path(repository))
    serving: dict[str, dict[str, Any]] = {}
    for drift in drift_of(Path(repository), Path(keys), ServingBook(Path(reports)), above=SHIFTED):
        serving.setdefault(drift.model, {})[str(drift.version)] = as_row(drift)
    rows = []
    for model, (stable, rollout) in rollouts(Path(repository), Path(keys)).items():
        canary = rollout.canary
        versions = {stable, *([canary.version] if canary else [])}
        versions |= {each.version for each in rollout.rolled_back}
        rows.append(
            {
                "model": model,
                "stable": stable,
                "canary": canary.model_dump(mode="json") if canary else None,
                "rolled_back": [each.model_dump(mode="json") for each in rollout.rolled_back],
                "devices": {
                    str(version): tally(book.of(model, version)) for version in sorted(versions)
                },
                "serving": serving.get(model, {}),
            }
        )
    return rows


def promote_canary(model: str, *, repository: Place, keys: Place) -> Manifest:
    """Gives the version on trial to all devices.

    Example::

        manifest = fedcore.promote_canary("digits", repository="releases", keys="keys")

    Args:
        model: The model's name.
        repository: The folder of the repository.
        keys: The folder of its online keys.

    Returns:
        The manifest of the version that is stable now.

    Raises:
        ReleaseError: no version is on trial, or keys are missing or not the repository's.
        DiskFull: the disk is full; the trial goes on.
    """
    return promote(model, repository=Path(repository), keys=Path(keys), now=_now())


def verify_repository(repository: Place, keys: Place) -> int:
    """Checks every published file against its signature.

    Example::

        fedcore.verify_repository("releases", "keys")  # how many files were checked

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.

    Returns:
        The number of files, all of which are as they were signed.

    Raises:
        ReleaseError: a signature doesn't verify, or a file is missing or differs.
    """
    return verify_files(Path(repository), Path(keys))


def clean_repository(repository: Place, keys: Place) -> int:
    """Removes files that no signed metadata names; returns the number of bytes freed.

    Interrupted publications and withdrawals leave such files.

    Example::

        fedcore.clean_repository("releases", "keys")

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify. Nothing is removed.
    """
    return collect_garbage(Path(repository), Path(keys))


def _names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names as a tuple; a single string is one name, not its letters."""
    return (names,) if isinstance(names, str) else tuple(names)


def _quorums(thresholds: Mapping[str, tuple[int, int]] | None) -> dict[str, Quorum]:
    quorums = {}
    for role, numbers in (thresholds or {}).items():
        if role not in ROLES:
            raise ReleaseError(
                f"thresholds: {role!r} is no role; expected one of {', '.join(ROLES)}. Nothing was "
                "written."
            )
        if not (isinstance(numbers, tuple) and [type(one) for one in numbers] == [int, int]):
            raise ReleaseError(
                f"thresholds: {role} is {numbers!r}; expected how many of how many keys must sign, "
                f'as in {{"{role}": (2, 3)}}. Nothing was written.'
            )
        quorums[role] = Quorum(*numbers)
    return quorums


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)
