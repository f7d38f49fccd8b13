"""A device's installed models as calls: which version of each serves, and how fast one answers.

`list_models` and `time_model` are part of the Python API; ``fedcore device status | bench`` call
the same. Imports neither torch nor Flower.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from edge_client.delivery import store as installed
from edge_client.delivery.clock import stale_since
from edge_client.delivery.observed import read_observed
from edge_client.delivery.store import Installed
from edge_client.inference.bench import bench
from edge_client.inference.confined import MAX_RUNS
from edge_client.inference.process import ModelLimits
from edge_client.inference.tuning import TunedSettings, remembered
from fedcore.artifacts.feedback import MIN_ROWS, FeatureShift, fits, latency_us, shifts
from fedcore.artifacts.golden import parse_golden
from fedcore.errors import ConfigError, DeviceError, DigestMismatch

TIMED_RUNS = 2000
"""Default number of timed inferences."""


@dataclass(frozen=True)
class ServingSummary:
    """How a version is used on this device, by the latest window of counts, about an hour.

    Example::

        (one,) = fedcore.list_models("device-store")
        [each for each in one.served.features if each.reading == "shifted"]
    """

    requests: int
    """Requests that reached the model."""
    error_rate: float | None
    """Share of them that failed in the model; None without requests."""
    p50_us: float | None
    """Upper bound of the bucket of latency that holds the median; None without requests, or above
    5 s."""
    p99_us: float | None
    rows: int
    """Rows that were counted in bins."""
    features: tuple[FeatureShift, ...]
    """How far each feature has moved since the release; empty below 100 rows, and where the release
    has no reference."""


@dataclass(frozen=True)
class InstalledModel:
    """A model in a device's store, from `fedcore.list_models`.

    Example::

        damaged = [one.model for one in fedcore.list_models("device-store") if one.damage]
    """

    model: str
    version: int | None
    """The version that serves; None if no version is intact."""
    created: str | None = None
    """When the version was released, UTC, ISO 8601."""
    candidate: str | None = None
    """Name of the compressed candidate, such as ``int8_static``."""
    bytes: int | None = None
    """Size of the ONNX file."""
    sha256: str | None = None
    """Digest of the ONNX file."""
    epsilon: float | None = None
    """Largest epsilon that training the version cost a client; None without privacy."""
    damage: str | None = None
    """Why the active version cannot be served; None if it is intact."""
    tuned: TunedSettings | None = None
    """Threads and provider that were measured fastest on this device; None if none were."""
    stale_since: str | None = None
    """Since when the version is not confirmed as the newest, UTC; None if it is."""
    served: ServingSummary | None = None
    """What `fedcore device serve` has counted of the version; None if nothing."""


@dataclass(frozen=True)
class ModelTiming:
    """Latency of single inferences on one thread, from `fedcore.time_model`.

    Example::

        timing = fedcore.time_model("device-store", "digits", runs=10_000)
        timing.p50_us, timing.p99_us
    """

    model: str
    version: int
    """The version that was timed."""
    threads: int
    runs: int
    """Number of timed inferences."""
    p50_us: float
    p99_us: float
    damage: str | None = None
    """Why an older version was timed in place of the active one."""


def list_models(store: str | PathLike[str]) -> list[InstalledModel]:
    """Lists a device's installed models, after checking every byte of each.

    Needs only the base package: imports neither torch nor Flower.

    Example::

        for one in fedcore.list_models("device-store"):
            print(one.model, one.version, one.damage)

    Args:
        store: The store that `fedcore.update_model` installs to.

    Returns:
        All models by name; empty if none is installed.
    """
    return [_described(Path(store), model) for model in installed.models(Path(store))]


def _described(store: Path, model: str) -> InstalledModel:
    try:
        version = installed.serving(store, model)
    except (DeviceError, DigestMismatch) as error:
        return InstalledModel(model, None, damage=str(error))
    manifest = version.manifest
    return InstalledModel(
        model=model,
        version=manifest.version,
        created=manifest.created,
        candidate=manifest.lineage.candidate,
        bytes=manifest.onnx.length,
        sha256=manifest.onnx.sha256,
        epsilon=manifest.privacy.epsilon,
        damage=version.damage,
        tuned=remembered(version.tuning, manifest.onnx.sha256) if version.tuning else None,
        stale_since=stale_since(store / "trust"),
        served=_served(store, model, version),
    )


def _served(store: Path, model: str, version: Installed) -> ServingSummary | None:
    observed = read_observed(store, model, version.record)
    if observed is None:
        return None
    found, reference = observed.latest.observation, parse_golden(version.golden).reference
    known = reference is not None and found.rows >= MIN_ROWS and fits(reference, found)
    return ServingSummary(
        requests=found.requests,
        error_rate=found.errors / found.requests if found.requests else None,
        p50_us=latency_us(found.latency, 0.5),
        p99_us=latency_us(found.latency, 0.99),
        rows=found.rows,
        features=shifts(reference, found) if reference is not None and known else (),
    )


def time_model(
    store: str | PathLike[str],
    name: str,
    *,
    runs: int = TIMED_RUNS,
    limits: ModelLimits | None = None,
) -> ModelTiming:
    """Times single inferences of an installed model on one thread, on its golden inputs.

    Needs only the base package: imports neither torch nor Flower.

    Example::

        timing = fedcore.time_model("device-store", "digits")
        timing.version, timing.p50_us

    Args:
        store: The store that `fedcore.update_model` installs to.
        name: The model's name.
        runs: Number of timed inferences.
        limits: Time and memory for all runs together; the usual ones when None.

    Raises:
        ConfigError: ``name`` or ``runs`` is not valid.
        DeviceError: no version is installed, or onnxruntime cannot run it.
        DigestMismatch: the active version is damaged, and no intact previous version exists.
        LimitExceeded: the model exceeded its limits.
        ResourceError: no process could be started.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise ConfigError(f"runs = {runs}: expected 1 to {MAX_RUNS}. Nothing was timed.")
    version = installed.serving(Path(store), name)
    manifest, inputs = version.manifest, parse_golden(version.golden).inputs
    found = bench(manifest, version.path, inputs, runs=runs, limits=limits or ModelLimits())
    return ModelTiming(
        model=name,
        version=manifest.version,
        threads=1,
        runs=runs,
        p50_us=found.p50_us,
        p99_us=found.p99_us,
        damage=version.damage,
    )
