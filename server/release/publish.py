"""Publication of models: signed, with a manifest, under version numbers that only increase.

Start with `publish`; `initialise` creates a repository, `rollback` republishes an older version.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from fedcore.artifacts.manifest import (
    Manifest,
    manifest_bytes,
    parse_manifest,
)
from fedcore.artifacts.rollout import Canary, Rollout, rollout_of
from fedcore.errors import ReleaseError, TrustError
from fedcore.files import disk_errors, write_atomic
from fedcore.observability.faults import first_fault
from server.release.draft import (
    CanaryAim,
    Draft,
    check_draft,
    check_name,
    files_of,
)
from server.release.registry import creation
from server.release.registry import repository as registry
from server.release.registry.keys import (
    OFFLINE,
    ONLINE,
    TRUSTED_ROOT,
    Keys,
    Quorum,
    generate_keys,
    read_keys,
    read_trusted_root,
    refuse_existing,
    remove_keys,
    write_keys,
)

Put = Callable[["Draft | None", int, Rollout | None], Manifest]
"""Publishes a draft as a version, or with None gives a published version to all devices; with a
rollout, to the devices of its trial alone."""


def initialise(
    repository: Path,
    keys: Path,
    *,
    models: Sequence[str] = (),
    quorums: Mapping[str, Quorum] | None = None,
    now: datetime,
) -> Path:
    """Creates keys and an empty repository signed with them.

    Args:
        repository: A new or empty folder.
        keys: A folder without keys.
        models: Names of the models that the online keys may publish; empty for any.
        quorums: Number of keys and signing threshold by role; one key for roles not listed.
        now: Time from which expiry is counted.

    Returns:
        The root metadata file, which devices must receive over a trusted channel.

    Raises:
        ReleaseError: keys or a repository exist already, or a model's name is invalid.
        DiskFull: the disk is full; nothing is left behind.
    """
    for model in models:
        check_name(model)
    if keys.resolve().is_relative_to(repository.resolve()):
        raise ReleaseError(
            f"{keys}: this folder of keys is inside the repository, so private keys would be "
            "delivered with it. Nothing was written; choose a folder elsewhere."
        )
    made = generate_keys(quorums=quorums)
    with disk_errors(repository):
        refuse_existing(keys)
        creation.refuse_occupied(repository)
        try:
            root = creation.create(
                repository, made, models=models, quorums=quorums or {}, now=_utc(now)
            )
            write_keys(made, keys)
            write_atomic(keys / TRUSTED_ROOT, root)
        except BaseException:  # a partial set of keys is useless, and so is its repository
            remove_keys(keys)
            shutil.rmtree(repository / "metadata", ignore_errors=True)
            raise
    return keys / TRUSTED_ROOT


def publish(draft: Draft, *, repository: Path, keys: Path, created: datetime) -> Manifest:
    """Publishes a draft as the next version of its model.

    Args:
        draft: The release to publish.
        repository: The folder that `initialise` created.
        keys: The folder of keys; its ``offline`` subfolder is not needed.
        created: Time of publication, stated in the manifest; expiry is counted from it.

    Returns:
        The signed manifest. Devices that request the model from now on receive this version.

    Raises:
        ReleaseError: keys are missing or not the repository's, or devices would reject the release.
            Earlier releases remain valid.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    check_draft(draft)
    with publishing(repository, keys, draft.model, created) as (state, put):
        version = max(versions(state, draft.model), default=0) + 1
        rollout = None if draft.canary is None else _started(state, draft, draft.canary, version)
        return put(draft, version, rollout)


def check_publishable(model: str, *, repository: Path, keys: Path, now: datetime) -> None:
    """Checks, before a model exists, the conditions under which `publish` would fail.

    Raises:
        ReleaseError: keys or repository are missing or don't match, or the keys may not publish a
            model of this name.
    """
    with publishing(repository, keys, model, now):
        return


def rollback(
    model: str, to_version: int, *, repository: Path, keys: Path, created: datetime
) -> Manifest:
    """Publishes an older version's files again, under a new version number.

    Devices never install a lower version number than before. A bad version is therefore followed by
    a new version with the files of a good one.

    Raises:
        ReleaseError: the older version doesn't exist, keys are missing or not the repository's, or
            devices would reject the release. Earlier releases remain valid.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    with publishing(repository, keys, model, created) as (state, put):
        published = versions(state, model)
        if to_version not in published[:-1]:
            older = ", ".join(map(str, published[:-1])) or "none"
            raise ReleaseError(
                f"{model}: version {to_version} is not available for rollback; older than the "
                f"current version {published[-1] if published else '(none)'} are: {older}. "
                "Nothing was published."
            )
        draft = draft_again(repository, state, model, to_version)
        return put(draft, published[-1] + 1, None)


def draft_again(
    repository: Path, state: registry.RepositoryState, model: str, version: int
) -> Draft:
    """Returns a published version as a draft, to be published again under a new number.

    Raises:
        ReleaseError: its files are missing or damaged.
    """
    old = read_manifest(repository, state, model, version)
    return Draft(
        model=model,
        kind=old.kind,
        presentation=old.presentation,
        missing=old.missing,
        inputs=old.inputs,
        outputs=old.outputs,
        labels=old.labels,
        input_shape=old.input_shape,
        input_dtype=old.input_dtype,
        golden_tolerance=old.golden_tolerance,
        lineage=old.lineage.model_copy(update={"rollback_of": version}),
        privacy=old.privacy,
        parity=old.parity,
        test=old.test,
        onnx=registry.read_target(repository, state, old.onnx.path),
        golden=registry.read_target(repository, state, old.golden.path),
    )


def history(repository: Path, keys: Path) -> tuple[Manifest, ...]:
    """Returns every published manifest, verified, ordered by model and version.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify.
    """
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        return tuple(
            read_manifest(repository, state, model, version)
            for model in sorted({model for model, _, _ in registry.releases(state)})
            for version in versions(state, model)
        )


def refresh(
    repository: Path, keys: Path, *, now: datetime, offline: bool
) -> registry.RepositoryState:
    """Renews expiring signatures, so that devices keep trusting the current releases.

    Args:
        repository: The folder that `initialise` created.
        keys: The folder of keys.
        now: Time from which expiry is counted.
        offline: Renew root and targets, too; requires the offline keys.

    Returns:
        The metadata now in force.

    Raises:
        ReleaseError: the repository is missing, or keys are missing or not the repository's.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    roles = (*ONLINE, *OFFLINE) if offline else ONLINE
    with registry.locked(repository):
        state, signing = _open(repository, keys, roles)
        if offline:
            registry.renew_offline(repository, state, signing, now=_utc(now))
        else:
            registry.add(repository, state, signing, {}, now=_utc(now))
        return registry.read_state(repository, read_trusted_root(keys))


def versions(state: registry.RepositoryState, model: str) -> list[int]:
    """Returns the published versions of a model, ascending."""
    return sorted(
        version
        for name, version, file in registry.releases(state)
        if name == model and file == "manifest.json"
    )


@contextmanager
def publishing(
    repository: Path, keys: Path, model: str, created: datetime
) -> Iterator[tuple[registry.RepositoryState, Put]]:
    """Locks the repository; yields its metadata and a function that publishes a draft."""
    check_name(model)
    now = _utc(created)
    with registry.locked(repository):
        state, signing = _open(repository, keys, ONLINE)
        if not registry.may_publish(state, f"models/{model}/{registry.POINTER}"):
            raise ReleaseError(
                f"{repository}: the online keys may not publish a model named {model!r} there. "
                "Nothing was published; `fedcore release init --model` set the allowed names."
            )

        def put(draft: Draft | None, version: int, rollout: Rollout | None) -> Manifest:
            pointer = f"models/{model}/{registry.POINTER}"
            if draft is None:  # another channel for a version that is published already
                manifest = read_manifest(repository, state, model, version)
                files = {pointer: manifest_bytes(manifest)}
            else:
                manifest, files = files_of(draft, version, now)
            told = rollout or read_rollout(state, model).model_copy(update={"canary": None})
            if rollout is not None:  # devices in no trial stay with the version that they have
                files[pointer] = registry.read_target(repository, state, pointer)
            registry.add(
                repository, state, signing, files, now=now, custom={pointer: told.custom()}
            )
            return manifest

        yield state, put


def read_rollout(state: registry.RepositoryState, model: str) -> Rollout:
    """Returns how a model is rolled out, as signed.

    Raises:
        ReleaseError: a later version of fedcore has written it.
    """
    pointer = state.releases.targets.get(f"models/{model}/{registry.POINTER}")
    try:
        return rollout_of(pointer.custom if pointer is not None else None)
    except TrustError as error:
        raise ReleaseError(f"{model}: {error}") from error


def _started(
    state: registry.RepositoryState, draft: Draft, aim: CanaryAim, version: int
) -> Rollout:
    """Returns the rollout in which a version is on trial; a trial that runs goes on with it."""
    if not versions(state, draft.model):
        raise ReleaseError(
            f"{draft.model}: its first version cannot be a canary, as the other devices would have "
            "none. Nothing was published; publish a version to all devices first."
        )
    before = read_rollout(state, draft.model)
    since = before.canary.since if before.canary is not None else version
    try:
        canary = Canary(
            version=version, since=since, basis_points=round(100 * aim.percent), cohort=aim.cohort
        )
    except ValidationError as error:
        raise ReleaseError(
            f"{draft.model}: canary: {first_fault(error)}. Nothing was published."
        ) from None
    return before.model_copy(update={"canary": canary})


def _open(
    repository: Path, keys: Path, roles: Sequence[str]
) -> tuple[registry.RepositoryState, Keys]:
    signing = read_keys(keys, roles)
    state = registry.read_state(repository, read_trusted_root(keys))
    return state, registry.trusted_keys(state, signing, repository)


def read_manifest(
    repository: Path, state: registry.RepositoryState, model: str, version: int
) -> Manifest:
    """Returns a version's manifest, verified; raises `ReleaseError` if it is damaged."""
    path = f"models/{model}/{version}/manifest.json"
    try:
        return parse_manifest(registry.read_target(repository, state, path))
    except TrustError as error:
        raise ReleaseError(
            f"{repository}: {path} is signed, but this version does not support its format: {error}"
        ) from error


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"{moment}: expected a time of publication with its time zone")
    return moment.astimezone(UTC).replace(microsecond=0)
