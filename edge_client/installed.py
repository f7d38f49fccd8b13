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
from edge_client.inference.bench import bench
from edge_client.inference.confined import MAX_RUNS
from edge_client.inference.process import ModelLimits
from edge_client.inference.tuning import TunedSettings, remembered
from fedcore.artifacts.golden import parse_golden
from fedcore.errors import ConfigError, DeviceError, DigestMismatch

TIMED_RUNS = 2000
"""Default number of timed inferences."""


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
