"""What devices report of versions, and when that ends the trial of one.

::

    REPORTS/MODEL/VERSION/DEVICE.json    the latest report of each device
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.artifacts.rollout import Canary
from fedcore.crypto.roster import Member
from fedcore.errors import DataError, FedcoreError
from fedcore.files import read_bytes, write_json
from fedcore.observability.foreign import foreign
from fedcore.observability.throttle import PeerLines
from fedcore.observability.words import counted
from fedcore.rpc.delivery import MAX_REASON, reason_text
from fedcore.rpc.delivery_pb2 import DeviceReport, ServingReport
from server.delivery.feedback import ServingBook
from server.release.channels import end_trial, rollouts
from server.release.draft import check_name

log = logging.getLogger("fedcore.server")

LEAST_FAILED = 2
"""Devices that must fail before a trial ends; one suffices in a cohort of one."""
FAILED_SHARE = 0.1
"""Share of the devices that reported, above which their failures end a trial."""
_OUTCOMES = {
    DeviceReport.ACTIVATED: "activated",
    DeviceReport.REFUSED: "refused",
    DeviceReport.RETURNED: "returned",
}
_MAX_BYTES = 8192


class KeptReport(BaseModel):
    """The latest report of a device on a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Annotated[str, Field(max_length=64)]
    outcome: Literal["activated", "refused", "returned"]
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    golden_error: float | None = None
    p50_us: float | None = None

    @property
    def failed(self) -> bool:
        """Whether the device could not install the version, or left it."""
        return self.outcome != "activated"


@dataclass(frozen=True)
class ReportBook:
    """The reports in a folder. One file for each device and version, so that it stays bounded."""

    folder: Path
    published: Callable[[str, int], bool]
    """Returns whether a version of a model exists; reports on others are dropped."""

    def put(self, member: Member, report: DeviceReport | ServingReport) -> None:
        """Keeps a report, in place of the device's earlier one of its kind on that version.

        Raises:
            ReleaseError: the model's name is not valid.
            DiskFull: there was no room.
        """
        check_name(report.model)
        if not self.published(report.model, report.version):
            return
        if isinstance(report, ServingReport):
            ServingBook(self.folder).put(member, report)
            return
        kept = KeptReport.model_validate(
            {
                "device": member.name,
                "outcome": _OUTCOMES[report.outcome],
                "reason": reason_text(report.reason),
                "golden_error": _present(report, "golden_error"),
                "p50_us": _present(report, "p50_us"),
            }
        )
        path = self.folder / report.model / str(report.version) / f"{member.fingerprint}.json"
        write_json(path, kept.model_dump(mode="json"), mode=0o640)

    def of(self, model: str, version: int) -> list[KeptReport]:
        """Returns all reports on a version, by device; damaged files are left out."""
        found = []
        for path in sorted((self.folder / model / str(version)).glob("*.json")):
            try:
                raw = read_bytes(path, max_bytes=_MAX_BYTES, what="a report")
                found.append(KeptReport.model_validate_json(raw))
            except (DataError, ValidationError) as error:
                log.warning("a report cannot be read: %s", foreign(error, 200))
        return sorted(found, key=lambda kept: kept.device)


def tally(reports: Sequence[KeptReport]) -> dict[str, int]:
    """Returns how many devices reported each outcome."""
    outcomes = _OUTCOMES.values()
    return {outcome: sum(each.outcome == outcome for each in reports) for outcome in outcomes}


def book_of(folder: Path, repository: Path) -> ReportBook:
    """Returns the reports in a folder on the versions in a repository."""

    def published(model: str, version: int) -> bool:
        return (repository / "targets" / "models" / model / str(version)).is_dir()

    return ReportBook(folder, published)


def verdict(canary: Canary, reports: Sequence[KeptReport]) -> str | None:
    """Returns why a trial must end, by the reports on its version; None if it may go on."""
    failed = [each for each in reports if each.failed]
    least = 1 if not canary.basis_points and len(canary.cohort) == 1 else LEAST_FAILED
    if len(failed) < least or len(failed) <= FAILED_SHARE * len(reports):
        return None
    first = failed[0]
    return (
        f"{len(failed)} of {counted(len(reports), 'device')} could not keep version "
        f"{canary.version}; {first.device} {first.outcome} it: {first.reason}"
    )


@dataclass(frozen=True)
class TrialJudge:
    """Takes devices' reports, and rolls a canary back when they show that it is bad."""

    book: ReportBook
    repository: Path
    keys: Path | None
    """The folder of the online keys; without it, reports are only kept."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _lines: PeerLines = field(
        default_factory=lambda: PeerLines(partial(log.warning, "%s"), "reports that failed")
    )

    def __call__(self, member: Member, report: DeviceReport | ServingReport) -> None:
        """Keeps a report and judges the trial that it is about. Errors are logged."""
        try:
            with self._lock:
                self.book.put(member, report)
                if self.keys is not None and isinstance(report, DeviceReport):
                    self._judge(report.model, report.version, self.keys)
        except FedcoreError as error:
            line = f"report of {foreign(member.name, 64)}: {error}"
            self._lines.tell(member.name, "report", line, member=True)

    def _judge(self, model: str, version: int, keys: Path) -> None:
        rollout = rollouts(self.repository, keys).get(model)
        canary = rollout[1].canary if rollout else None
        if canary is None or canary.version != version:
            return
        why = verdict(canary, self.book.of(model, version))
        if why is None:
            return
        done = end_trial(
            model,
            why,
            repository=self.repository,
            keys=keys,
            now=datetime.now(UTC),
            version=version,
        )
        if done is not None:
            log.warning("%s: version %d rolled back: %s", model, version, why)


def _present(report: DeviceReport, name: str) -> float | None:
    return float(getattr(report, name)) if report.HasField(name) else None
