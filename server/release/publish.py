"""Release: a model with its manifest, signed, under a version that only grows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from fedcore.artifacts.golden import MAX_GOLDEN_BYTES, parse_golden
from fedcore.artifacts.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_MODEL_BYTES,
    MAX_VERSION,
    FileEntry,
    Lineage,
    Manifest,
    Parity,
    PrivacyStatement,
    TestStatement,
    manifest_bytes,
    parse_manifest,
)
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
    """A release before it has a version: what `Manifest` says of it, and the bytes."""

    model: str
    """The name devices ask for."""
    kind: Literal["classification", "regression", "next_token"]
    labels: tuple[str, ...]
    input_shape: tuple[int, ...]
    input_dtype: str
    golden_tolerance: float
    lineage: Lineage
    privacy: PrivacyStatement
    parity: Parity
    onnx: bytes = field(repr=False)
    golden: bytes = field(repr=False)
    """As `fedcore.artifacts.golden.golden_bytes` makes them."""
    test: TestStatement | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The rounds that a model comes from: what the manifest of a release says of them."""

    run: str
    round: int
    """The round whose model was the best."""
    parent_sha256: str
    """Digest of that model, as a checkpoint."""
    config_sha256: str
    """Digest of the run's configuration."""
    seed: int
    privacy: PrivacyStatement


def initialise(
    repository: Path,
    keys: Path,
    *,
    models: Sequence[str] = (),
    quorums: Mapping[str, Quorum] | None = None,
    now: datetime,
) -> Path:
    """Makes keys and an empty repository that they sign.

    Args:
        repository: A folder that is not there yet, or is empty.
        keys: A folder without keys.
        models: The only models that the online keys may publish; any when empty.
        quorums: How many keys each role has, and how many must sign; one where nothing is said.
        now: Expiry counts from here.

    Returns:
        The file that devices are given over a channel that their owner trusts.

    Raises:
        ReleaseError: keys or a repository are there already, or a model's name is not valid.
        DiskFull: there was no room; nothing is left.
    """
    for model in models:
        _check_name(model)
    if keys.resolve().is_relative_to(repository.resolve()):
        raise ReleaseError(
            f"{keys}: this folder of keys lies within the repository, so private keys would be "
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
        except BaseException:  # half a set of keys is of no use; neither is what it has signed
            remove_keys(keys)
            shutil.rmtree(repository / "metadata", ignore_errors=True)
            raise
    return keys / TRUSTED_ROOT


def publish(draft: Draft, *, repository: Path, keys: Path, created: datetime) -> Manifest:
    """Publishes a draft under the next version of its model.

    Args:
        draft: What to publish.
        repository: As `initialise` made it.
        keys: The folder of keys; its ``offline`` part is not needed.
        created: The moment of publication: it stands in the manifest, and expiry counts from it.

    Returns:
        The manifest as signed. Devices that ask from now on get this version.

    Raises:
        ReleaseError: keys are missing or not the repository's, or devices would refuse the
            release. What was published before stands.
        DiskFull: there was no room; what was published before stands.
    """
    _check_draft(draft)
    with _publishing(repository, keys, draft.model, created) as (state, put):
        return put(draft, max(versions(state, draft.model), default=0) + 1)


def check_publishable(model: str, *, repository: Path, keys: Path, now: datetime) -> None:
    """Refuses what `publish` would refuse for reasons known before there is a model.

    Raises:
        ReleaseError: keys or repository are missing, do not belong together, or may not publish
            a model of this name.
    """
    with _publishing(repository, keys, model, now):
        return


def rollback(
    model: str, to_version: int, *, repository: Path, keys: Path, created: datetime
) -> Manifest:
    """Publishes the bytes of an older version again, under a new version.

    Devices never go back to a version that they have passed, so a version that turns out bad is
    followed by one that holds what was good.

    Raises:
        ReleaseError: as `publish`, or there is no such older version.
        DiskFull: as `publish`.
    """
    with _publishing(repository, keys, model, created) as (state, put):
        published = versions(state, model)
        if to_version not in published[:-1]:
            older = ", ".join(map(str, published[:-1])) or "none"
            raise ReleaseError(
                f"{model}: version {to_version} cannot be rolled back to; older than the current "
                f"version {published[-1] if published else '(none)'} are: {older}. Nothing was "
                "published."
            )
        old = _manifest(repository, state, model, to_version)
        draft = Draft(
            model=model,
            kind=old.kind,
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
    """Every published manifest, by model and version, verified.

    Raises:
        ReleaseError: there is no repository, or it does not verify.
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
    """Signs again what would expire, so that devices go on trusting the current releases.

    Args:
        repository: As `initialise` made it.
        keys: The folder of keys.
        now: Expiry counts from here.
        offline: Also renew root and targets, for which the offline keys must be there.

    Returns:
        What is in force now.

    Raises:
        ReleaseError: as `publish`.
        DiskFull: as `publish`.
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
    """The published versions of a model, ascending."""
    return sorted(
        version
        for name, version, file in registry.releases(state)
        if name == model and file == "manifest.json"
    )


@contextmanager
def _publishing(
    repository: Path, keys: Path, model: str, created: datetime
) -> Iterator[tuple[registry.RepositoryState, Callable[[Draft, int], Manifest]]]:
    """What is in force, and a function that puts a draft into force, under one lock."""
    _check_name(model)
    now = _utc(created)
    with registry.locked(repository):
        state, signing = _open(repository, keys, ONLINE)
        if not registry.may_publish(state, f"models/{model}/{registry.POINTER}"):
            raise ReleaseError(
                f"{repository}: the online keys may not publish a model named {model!r} there. "
                "Nothing was published; `fedcore release init --model` said which names they may."
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
    """The manifest of a version, and its files by target path."""
    if version > MAX_VERSION:
        raise ReleaseError(
            f"{draft.model}: its versions have reached {version - 1}, and no larger one can be "
            "named. Nothing was published; if a thief did this, `fedcore release rotate "
            "--last-good` withdraws what came after the last good version."
        )
    folder = f"models/{draft.model}/{version}"

    def entry(name: str, data: bytes) -> FileEntry:
        return FileEntry(path=f"{folder}/{name}", sha256=sha256_hex(data), length=len(data))

    manifest = Manifest(
        model=draft.model,
        version=version,
        created=f"{now:%Y-%m-%dT%H:%M:%SZ}",
        kind=draft.kind,
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
            f"{repository}: {path} is signed, but not of a format that this version knows: {error}"
        ) from error


def _check_draft(draft: Draft) -> None:
    """Refuses what devices would refuse, before it is signed."""
    for what, data, most in (
        ("model", draft.onnx, MAX_MODEL_BYTES),
        ("golden file", draft.golden, MAX_GOLDEN_BYTES),
    ):
        if not 1 <= len(data) <= most:
            raise ReleaseError(
                f"{draft.model}: its {what} has {len(data)} bytes; devices take 1 to {most}. "
                "Nothing was published."
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
        raise ValueError(f"{moment}: a moment of publication names its time zone")
    return moment.astimezone(UTC).replace(microsecond=0)
