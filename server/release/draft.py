"""A release before it has a version: its content, the checks on it, and the files of a version."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

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
    NamedOutput,
    NamedTensor,
    Parity,
    PrivacyStatement,
    TestStatement,
    manifest_bytes,
)
from fedcore.artifacts.presentation import Presentation
from fedcore.config.run import Name, ReleaseConfig
from fedcore.errors import ReleaseError, TrustError
from fedcore.files import sha256_hex
from server.release.registry import repository as registry


@dataclass(frozen=True)
class CanaryAim:
    """The devices that a trial is for: a share of all, and those that are named."""

    percent: float
    cohort: tuple[str, ...] = ()


def aim_of(release: ReleaseConfig) -> CanaryAim | None:
    """Returns the devices that a run publishes to first; None if it publishes to all."""
    if release.canary_percent is None and not release.canary_cohort:
        return None
    return CanaryAim(release.canary_percent or 0.0, release.canary_cohort)


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
    outputs: tuple[NamedOutput, ...] | None = None
    """Several outputs with names; None for one without."""
    canary: CanaryAim | None = None
    """The devices that get it before the others; None to give it to all."""


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


def files_of(draft: Draft, version: int, now: datetime) -> tuple[Manifest, dict[str, bytes]]:
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
        outputs=draft.outputs,
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


def check_draft(draft: Draft) -> None:
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


def check_name(model: str) -> None:
    try:
        TypeAdapter(Name).validate_python(model)
    except ValidationError:
        raise ReleaseError(
            f"model name {model!r}: expected 1 to 64 of a-z, 0-9, '-' and '_', starting with a "
            "letter or digit. Nothing was published."
        ) from None
