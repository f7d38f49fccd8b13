"""Health of an installed version after its activation, and when a device must return from it.

A version is judged against itself: its first measurement on this device after activation is the
baseline. `check_health` measures it again in a process of its own, and `reason_to_return` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from edge_client.delivery.state_file import read_state
from edge_client.delivery.store import Installed, Record
from edge_client.inference.bench import bench
from edge_client.inference.process import ModelLimits
from edge_client.inference.selftest import self_test
from fedcore.artifacts.golden import parse_golden
from fedcore.errors import DataError, DeviceError
from fedcore.files import write_json

STRIKES = 3
"""Failed checks in a row after which a device returns to the version before."""
SLOWER = 3.0
"""Median latency over that of the baseline, above which a check fails."""
MAX_ERROR_RATE = 0.05
"""Share of requests that failed in the model, above which a check fails."""
MIN_REQUESTS = 20
"""Requests since the last check below which their errors say nothing."""
_RUNS = 200
_MAX_BYTES = 4096
_Stored = TypeVar("_Stored", bound=BaseModel)


@dataclass(frozen=True)
class HealthCheck:
    """What one check found."""

    golden_error: float | None
    """Largest difference from the golden outputs; None if the model failed on them."""
    p50_us: float | None
    """Median time of one inference on one thread; None if it could not be measured."""
    failure: str = ""
    """Why the model failed on its golden inputs; empty if it did not."""


class ServedCounts(BaseModel):
    """Requests that a server on this device answered with a version: ``health/MODEL.served``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: Record
    requests: Annotated[int, Field(ge=0)]
    """Requests that reached the model since the server started."""
    errors: Annotated[int, Field(ge=0)]
    """Requests that failed in the model; refused inputs and overload do not count."""


class HealthBaseline(BaseModel):
    """First measurement of a version on this device: ``health/MODEL.baseline``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record: Record
    golden_error: float
    p50_us: float


def check_health(version: Installed, *, threads: int, limits: ModelLimits) -> HealthCheck:
    """Runs the self-test and times the model, each in a process of its own.

    Raises:
        ResourceError: no process could be started, which says nothing about the model.
    """
    try:
        golden_error = self_test(
            version.manifest, version.path, version.golden, threads=threads, limits=limits
        )
        inputs = parse_golden(version.golden).inputs
        timing = bench(version.manifest, version.path, inputs, runs=_RUNS, limits=limits)
    except (DeviceError, DataError) as error:
        return HealthCheck(None, None, str(error))
    return HealthCheck(golden_error, timing.p50_us)


def reason_to_return(
    baseline: HealthBaseline,
    found: HealthCheck,
    before: HealthCheck | None,
    served: tuple[int, int],
) -> str | None:
    """Returns why a version fails a check; None if it passes.

    Args:
        baseline: The version's first measurement here.
        found: The measurement now.
        before: The measurement now of the version before. A device that is busy slows both down,
            which is no fault of the newer one; None if there is no version before.
        served: Requests and errors since the last check.
    """
    if found.failure or found.golden_error is None or found.p50_us is None:
        return f"it no longer reproduces its golden outputs: {found.failure}"
    requests, errors = served
    if requests >= MIN_REQUESTS and errors > MAX_ERROR_RATE * requests:
        return f"{errors} of {requests} requests failed in the model"
    busy = before is not None and before.p50_us is not None and found.p50_us <= 2 * before.p50_us
    if found.p50_us > SLOWER * baseline.p50_us and not busy:
        return (
            f"one inference takes {found.p50_us:.0f} us, and took {baseline.p50_us:.0f} us after "
            "the activation"
        )
    return None


def read_baseline(store: Path, model: str, record: Record) -> HealthBaseline | None:
    """Returns a version's first measurement; None if there is none or it cannot be read."""
    found = _read(store / "health" / f"{model}.baseline", HealthBaseline)
    return found if found is not None and found.record == record else None


def write_baseline(store: Path, model: str, baseline: HealthBaseline) -> None:
    """Keeps a version's first measurement.

    Raises:
        DiskFull: there was no room.
    """
    write_json(store / "health" / f"{model}.baseline", baseline.model_dump(mode="json"))


def read_served(store: Path, model: str, record: Record) -> tuple[int, int]:
    """Returns the requests and errors of a version since a server started; zeros if unknown."""
    found = _read(store / "health" / f"{model}.served", ServedCounts)
    return (found.requests, found.errors) if found and found.record == record else (0, 0)


def write_served(store: Path, model: str, counts: ServedCounts) -> None:
    """Tells the agent on this device how requests to a version went.

    Raises:
        DiskFull: there was no room.
    """
    write_json(store / "health" / f"{model}.served", counts.model_dump(mode="json"))


def _read(path: Path, kind: type[_Stored]) -> _Stored | None:
    """Reads a measurement; a damaged one counts as missing: it is only measured again."""
    try:
        return read_state(path, kind, max_bytes=_MAX_BYTES, what="a measurement")
    except DataError:
        return None
