"""Reports to the server that have not arrived yet: ``STORE/outbox.json``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from edge_client.delivery.state_file import read_state
from fedcore.errors import DataError
from fedcore.files import write_json
from fedcore.rpc.delivery import MAX_REASON, reason_text
from fedcore.rpc.delivery_pb2 import DeviceReport

if TYPE_CHECKING:
    from edge_client.delivery.network import DeliveryLink

_KEPT = 32
_MAX_BYTES = 1 << 16
_OUTCOMES = {
    "activated": DeviceReport.ACTIVATED,
    "refused": DeviceReport.REFUSED,
    "returned": DeviceReport.RETURNED,
}


class PendingReport(BaseModel):
    """What became of a version on this device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    version: int
    outcome: Literal["activated", "refused", "returned"]
    reason: Annotated[str, Field(max_length=MAX_REASON)] = ""
    golden_error: float | None = None
    p50_us: float | None = None


class _Outbox(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    reports: Annotated[tuple[PendingReport, ...], Field(max_length=_KEPT)] = ()


def put_report(store: Path, report: PendingReport) -> None:
    """Keeps a report until `send_reports` delivers it; beyond 32, the oldest are dropped.

    Raises:
        DiskFull: there was no room.
    """
    _write(store, (*_read(store), report)[-_KEPT:])


def send_reports(store: Path, link: DeliveryLink) -> None:
    """Sends all pending reports, oldest first, and forgets those that arrived.

    Raises:
        RepositoryUnreachable: the server could not be reached; the others stay.
        CertificateRefused: the server refuses this device.
    """
    while pending := _read(store):
        first = pending[0]
        link.report(
            DeviceReport(
                model=first.model,
                version=first.version,
                outcome=_OUTCOMES[first.outcome],
                reason=reason_text(first.reason),
                golden_error=first.golden_error,
                p50_us=first.p50_us,
            )
        )
        _write(store, pending[1:])


def _read(store: Path) -> tuple[PendingReport, ...]:
    """Reads the pending reports; a damaged file counts as empty: reports only inform."""
    try:
        found = read_state(_path(store), _Outbox, max_bytes=_MAX_BYTES, what="the pending reports")
    except DataError:
        return ()
    return found.reports if found else ()


def _write(store: Path, reports: tuple[PendingReport, ...]) -> None:
    write_json(_path(store), _Outbox(reports=reports).model_dump(mode="json"))


def _path(store: Path) -> Path:
    return store / "outbox.json"
