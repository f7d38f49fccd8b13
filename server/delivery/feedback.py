"""What devices tell of the versions that they serve: checked, kept, and read again.

::

    REPORTS/MODEL/VERSION/served/DEVICE.json    the latest window of each device
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.artifacts.feedback import LATENCY_BOUNDS_S, MAX_ROWS, MIN_ROWS, Observation
from fedcore.artifacts.reference import MAX_BINS, MAX_FEATURES
from fedcore.crypto.roster import Member
from fedcore.errors import DataError
from fedcore.files import read_bytes, write_json
from fedcore.observability.foreign import foreign
from fedcore.rpc.delivery_pb2 import ServingReport

log = logging.getLogger("fedcore.server")

_MOST_REQUESTS = 10**12
_DEVIATIONS = 10.0
"""How many deviations noise may have moved a count by."""
_MAX_BYTES = 1 << 16
_FOLDER = "served"


class KeptServing(BaseModel):
    """The latest window of a device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Annotated[str, Field(max_length=64)]
    observation: Observation


@dataclass(frozen=True)
class ServingBook:
    """The windows in a folder of reports. One file for each device and version."""

    folder: Path

    def put(self, member: Member, report: ServingReport) -> None:
        """Keeps a report without `fault_of_serving`, in place of the device's earlier one.

        Raises:
            DiskFull: there was no room.
        """
        kept = KeptServing(device=member.name, observation=_observation(report))
        path = self._of(report.model, report.version) / f"{member.fingerprint}.json"
        write_json(path, kept.model_dump(mode="json"), mode=0o640)

    def of(self, model: str, version: int) -> list[KeptServing]:
        """Returns all windows of a version, by device; damaged files are left out."""
        found = []
        for path in sorted(self._of(model, version).glob("*.json")):
            try:
                raw = read_bytes(path, max_bytes=_MAX_BYTES, what="counts of a device")
                found.append(KeptServing.model_validate_json(raw))
            except (DataError, ValidationError) as error:
                log.warning("counts of a device cannot be read: %s", foreign(error, 200))
        return sorted(found, key=lambda kept: kept.device)

    def _of(self, model: str, version: int) -> Path:
        return self.folder / model / str(version) / _FOLDER


def fault_of_serving(report: ServingReport) -> str:
    """Returns what is wrong with a device's counts; empty if nothing is.

    Whether they have the bins of the release's reference shows when they are read: only then are
    the release's signatures verified.
    """
    if not 1 <= len(report.model) <= 64 or not 1 <= report.version <= 10**15:
        return "no valid model and version"
    if report.rows > MAX_ROWS or report.requests > _MOST_REQUESTS:
        return "too many rows or requests"
    if report.errors > report.requests:
        return "more errors than requests"
    if len(report.latency) != len(LATENCY_BOUNDS_S) + 1:
        return "not one number for each bucket of latency"
    if sum(report.latency) > report.requests - report.errors:
        return "more latencies than answered requests"
    if bool(report.features) != bool(report.rows):
        return "counts without rows, or rows without counts"
    noise = report.noise_deviation
    if len(report.features) > MAX_FEATURES or not 0 <= noise <= report.rows:
        return "too many features, or more noise than rows"
    if report.rows and report.rows < MIN_ROWS:
        return f"fewer than {MIN_ROWS} rows"
    if not all(_is_count(feature.counts, report.rows, noise) for feature in report.features):
        return "counts of a feature that are negative, too many, or do not add up to the rows"
    return ""


def _is_count(counts: Sequence[int], rows: int, noise: float) -> bool:
    """Returns whether each row can have been counted once; noise moves a count a few deviations."""
    if not 2 <= len(counts) <= MAX_BINS:
        return False
    if not noise:
        return min(counts) >= 0 and sum(counts) == rows
    slack = _DEVIATIONS * noise + 1
    return min(counts) >= -slack and max(counts) <= rows + slack


def _observation(report: ServingReport) -> Observation:
    return Observation(
        rows=report.rows,
        counts=tuple(tuple(feature.counts) for feature in report.features),
        requests=report.requests,
        errors=report.errors,
        latency=tuple(report.latency),
        noise_deviation=report.noise_deviation,
    )
