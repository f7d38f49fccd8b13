"""How far what devices serve has moved from what it was at the release, from their counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcore.artifacts.feedback import (
    MIN_ROWS,
    FeatureShift,
    Observation,
    fits,
    latency_us,
    pooled,
    shifts,
)
from fedcore.artifacts.golden import parse_golden
from fedcore.artifacts.reference import Reference
from fedcore.errors import ReleaseError, TrustError
from fedcore.finite import finite_or_none
from server.delivery.feedback import KeptServing, ServingBook
from server.release.channels import stable_version
from server.release.publish import read_manifest, read_rollout
from server.release.registry import repository as registry
from server.release.registry.keys import read_trusted_root


@dataclass(frozen=True)
class DeviceShift:
    """The feature of one device that has moved furthest.

    Example::

        drift.worst.device if drift.worst else "no device has told anything"
    """

    device: str
    feature: str
    psi: float


@dataclass(frozen=True)
class ModelDrift:
    """How one version of a model is used on devices, from the latest window of each.

    Example::

        (drift,) = fedcore.measure_drift("releases", "keys", model="digits")
        drift.psi, drift.drifted, drift.error_rate
    """

    model: str
    version: int
    devices: int
    """Devices that have told how they use the version."""
    rows: int
    """Rows that they have counted in bins."""
    features: tuple[FeatureShift, ...]
    """Each feature, by the sum of all devices' counts; empty where no bins were told."""
    worst: DeviceShift | None
    """The device that has moved furthest, beyond what chance explains; None if there is none."""
    drifted: tuple[str, ...]
    """Features whose index is above the threshold, and beyond what chance explains."""
    requests: int
    error_rate: float | None
    """Share of requests that failed in the model, of devices that tell it; None without any."""
    p50_us: float | None
    """Upper bound of the bucket of latency that holds the median, from arrival to outputs; None
    where no device tells it, or above 5 s."""
    p99_us: float | None
    left_out: int = 0
    """Devices whose counts do not fit the release, and count for nothing."""

    @property
    def psi(self) -> float | None:
        """The largest stability index of a feature; None where no bins were told."""
        return max((each.psi for each in self.features), default=None)


def drift_of(
    repository: Path, keys: Path, book: ServingBook, *, above: float, model: str | None = None
) -> list[ModelDrift]:
    """Returns the drift of the stable version of each model, and of a canary.

    Raises:
        ReleaseError: there is no repository or no such model, or signatures don't verify.
    """
    found = []
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        names = sorted({name for name, _, _ in registry.releases(state)})
        if model is not None and model not in names:
            raise ReleaseError(
                f"{repository}: no model {model!r} has been published there, expected one of "
                f"{', '.join(names) or 'none'}. Nothing was measured."
            )
        for name in names if model is None else [model]:
            canary = read_rollout(state, name).canary
            versions = {stable_version(state, name), *([canary.version] if canary else [])}
            for version in sorted(versions):
                kept = book.of(name, version)
                bins = any(each.observation.counts for each in kept)
                reference = _reference(repository, state, name, version) if bins else None
                found.append(_drift(name, version, reference, kept, above))
    return found


def _reference(
    repository: Path, state: registry.RepositoryState, model: str, version: int
) -> Reference | None:
    manifest = read_manifest(repository, state, model, version)
    try:
        return parse_golden(registry.read_target(repository, state, manifest.golden.path)).reference
    except TrustError as error:
        raise ReleaseError(
            f"{repository}: the golden file of {model} version {version} is signed, but this "
            f"version of fedcore cannot read it: {error}"
        ) from error


def _drift(
    model: str,
    version: int,
    reference: Reference | None,
    kept: Sequence[KeptServing],
    above: float,
) -> ModelDrift:
    usable = [each for each in kept if _fits(reference, each.observation)]
    total = pooled(each.observation for each in usable)
    features = shifts(reference, total) if reference and total.rows >= MIN_ROWS else ()
    asked = total.errors + sum(total.latency)  # of devices that tell errors and latencies
    return ModelDrift(
        model=model,
        version=version,
        devices=len(usable),
        rows=total.rows,
        features=features,
        worst=None if reference is None else _worst(reference, usable),
        drifted=tuple(each.feature for each in features if each.psi > max(above, each.chance)),
        requests=total.requests,
        error_rate=total.errors / asked if asked else None,
        p50_us=latency_us(total.latency, 0.5),
        p99_us=latency_us(total.latency, 0.99),
        left_out=len(kept) - len(usable),
    )


def _fits(reference: Reference | None, observation: Observation) -> bool:
    return not observation.counts or (reference is not None and fits(reference, observation))


def _worst(reference: Reference, kept: Sequence[KeptServing]) -> DeviceShift | None:
    every = [
        DeviceShift(each.device, shift.feature, shift.psi)
        for each in kept
        if each.observation.counts
        for shift in shifts(reference, each.observation)
        if shift.psi > shift.chance
    ]
    return max(every, key=lambda each: each.psi, default=None)


def as_row(drift: ModelDrift) -> dict[str, Any]:
    """Returns a version's drift as JSON values, with its largest index as ``psi``."""
    row: dict[str, Any] = finite_or_none(asdict(drift) | {"psi": drift.psi})
    return row
