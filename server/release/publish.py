"""Publication of models: signed, with a manifest, under version numbers that only increase.

Start with `publish`; `initialise` creates a repository, `rollback` republishes an older version.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedcore.artifacts.golden import MAX_GOLDEN_BYTES, parse_golden
from fedcore.artifacts.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_MODEL_BYTES,
    MAX_VERSION,
    FileEntry,
    Lineage,
    Manifest,
    MissingAllowed,
    NamedTensor,
    Parity,
    PrivacyStatement,
    TestStatement,
    manifest_bytes,
    parse_manifest,
)
from fedcore.artifacts.presentation import Presentation
from fedcore.config.run import Name
from fedcore.errors import ReleaseError, TrustError
from fedcore.files import disk_errors, sha256_hex, write_atomic
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


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A release before it has a version: the manifest's content and the files."""

    model: str
    """The name under which devices request the model."""
    kind: str
    """The kind of problem, which says what outputs mean."""
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    input_dtype: str
    golden_tolerance: float
    lineage: Lineage
    privacy: PrivacyStatement
    parity: Parity
    onnx: bytes = field(repr=False)
    golden: bytes = field(repr=False)
    """Golden inputs and outputs, encoded by `fedcore.artifacts.golden.golden_bytes`."""
    test: TestStatement | None = None
    presentation: Presentation | None = None
    """How devices tell an answer; None where the kind says it."""
    missing: MissingAllowed | None = None
    inputs: tuple[NamedTensor, ...] | None = None
    """Several inputs with names; None for one without (see `fedcore.artifacts.manifest`)."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Provenance of a model: the rounds that trained it, and their privacy, for the manifest."""

    run: str
    round: int
    """The round with the best model."""
    parent_sha256: str
    """SHA-256 of the best model's checkpoint."""
    config_sha256: str
    """SHA-256 of the run's configuration."""
    seed: int
    privacy: PrivacyStatement
    initial_sha256: str | None = None
    """SHA-256 of the checkpoint that the run started from; None if it started from new weights."""


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
        _check_name(model)
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
    _check_draft(draft)
    with _publishing(repository, keys, draft.model, created) as (state, put):
        return put(draft, max(versions(state, draft.model), default=0) + 1)


def check_publishable(model: str, *, repository: Path, keys: Path, now: datetime) -> None:
    """Checks, before a model exists, the conditions under which `publish` would fail.

    Raises:
        ReleaseError: keys or repository are missing or don't match, or the keys may not publish a
            model of this name.
    """
    with _publishing(repository, keys, model, now):
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
    with _publishing(repository, keys, model, created) as (state, put):
        published = versions(state, model)
        if to_version not in published[:-1]:
            older = ", ".join(map(str, published[:-1])) or "none"
            raise ReleaseError(
                f"{model}: version {to_version} is not available for rollback; older than the "
                f"current version {published[-1] if published else '(none)'} are: {older}. "
                "Nothing was published."
            )
        old = _manifest(repository, state, model, to_version)
        draft = Draft(
            model=model,
            kind=old.kind,
            presentation=old.presentation,
            missing=old.missing,
            inputs=old.inputs,
            labels=old.labels,
            input_shape=old.input_shape,
            input_dtype=old.input_dtype,
            golden_tolerance=old.golden_tolerance,
            lineage=old.lineage.model_copy(update={"rollback_of": to_version}),
            privacy=old.privacy,
            parity=old.parity,
            onnx=registry.read_target(repository, state, old.onnx.path),
            golden=registry.read_target(repository, state, old.golden.path),
        )
        return put(draft, published[-1] + 1)


def history(repository: Path, keys: Path) -> tuple[Manifest, ...]:
    """Returns every published manifest, verified, ordered by model and version.

    Raises:
        ReleaseError: there is no repository, or its signatures don't verify.
    """
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        return tuple(
            _manifest(repository, state, model, version)
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
def _publishing(
    repository: Path, keys: Path, model: str, created: datetime
) -> Iterator[tuple[registry.RepositoryState, Callable[[Draft, int], Manifest]]]:
    """Locks the repository; yields its metadata and a function that publishes a draft."""
    _check_name(model)
    now = _utc(created)
    with registry.locked(repository):
        state, signing = _open(repository, keys, ONLINE)
        if not registry.may_publish(state, f"models/{model}/{registry.POINTER}"):
            raise ReleaseError(
                f"{repository}: the online keys may not publish a model named {model!r} there. "
                "Nothing was published; `fedcore release init --model` set the allowed names."
            )

        def put(draft: Draft, version: int) -> Manifest:
            manifest, files = _files(draft, version, now)
            registry.add(repository, state, signing, files, now=now)
            return manifest

        yield state, put


def _open(
    repository: Path, keys: Path, roles: Sequence[str]
) -> tuple[registry.RepositoryState, Keys]:
    signing = read_keys(keys, roles)
    state = registry.read_state(repository, read_trusted_root(keys))
    return state, registry.trusted_keys(state, signing, repository)


def _files(draft: Draft, version: int, now: datetime) -> tuple[Manifest, dict[str, bytes]]:
    """Returns the manifest of a version, and the version's files by target path."""
    if version > MAX_VERSION:
        raise ReleaseError(
            f"{draft.model}: its versions have reached {version - 1}, the largest possible. "
            "Nothing was published; if a thief did this, withdraw everything after the last good "
            "version with `fedcore release rotate --last-good`."
        )
    folder = f"models/{draft.model}/{version}"

    def entry(name: str, data: bytes) -> FileEntry:
        return FileEntry(path=f"{folder}/{name}", sha256=sha256_hex(data), length=len(data))

    manifest = Manifest(
        model=draft.model,
        version=version,
        created=f"{now:%Y-%m-%dT%H:%M:%SZ}",
        kind=draft.kind,
        presentation=draft.presentation,
        missing=draft.missing,
        inputs=draft.inputs,
        labels=draft.labels,
        input_shape=draft.input_shape,
        input_dtype=draft.input_dtype,
        onnx=entry("model.onnx", draft.onnx),
        golden=entry("golden.safetensors", draft.golden),
        golden_tolerance=draft.golden_tolerance,
        lineage=draft.lineage,
        privacy=draft.privacy,
        parity=draft.parity,
        test=draft.test,
    )
    raw = manifest_bytes(manifest)
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ReleaseError(
            f"{draft.model}: its manifest would have {len(raw)} bytes, more than the "
            f"{MAX_MANIFEST_BYTES} that devices read. Nothing was published; shorten the labels."
        )
    return manifest, {
        manifest.onnx.path: draft.onnx,
        manifest.golden.path: draft.golden,
        f"{folder}/manifest.json": raw,
        f"models/{draft.model}/{registry.POINTER}": raw,
    }


def _manifest(
    repository: Path, state: registry.RepositoryState, model: str, version: int
) -> Manifest:
    path = f"models/{model}/{version}/manifest.json"
    try:
        return parse_manifest(registry.read_target(repository, state, path))
    except TrustError as error:
        raise ReleaseError(
            f"{repository}: {path} is signed, but this version does not support its format: {error}"
        ) from error


def _check_draft(draft: Draft) -> None:
    """Rejects drafts that devices would reject, before signing."""
    for what, data, most in (
        ("model", draft.onnx, MAX_MODEL_BYTES),
        ("golden file", draft.golden, MAX_GOLDEN_BYTES),
    ):
        if not 1 <= len(data) <= most:
            raise ReleaseError(
                f"{draft.model}: its {what} has {len(data)} bytes, expected 1 to {most}. Nothing "
                "was published."
            )
    try:
        parse_golden(draft.golden)
    except TrustError as error:
        raise ReleaseError(f"{draft.model}: nothing was published: {error}") from error


def _check_name(model: str) -> None:
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError:
        raise ReleaseError(
            f"model name {model!r}: expected 1 to 64 of a-z, 0-9, '-' and '_', starting with a "
            "letter or digit. Nothing was published."
        ) from None


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"{moment}: expected a time of publication with its time zone")
    return moment.astimezone(UTC).replace(microsecond=0)
