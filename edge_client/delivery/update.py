"""The device's way from an offer to a model that serves."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_client.delivery import store as installed
from edge_client.delivery.fetch import fetch
from edge_client.delivery.roots import anchor
from edge_client.delivery.source import Source
from edge_client.delivery.store import Record
from edge_client.delivery.trust import current_offer
from edge_client.inference.confined import ModelLimits
from edge_client.inference.selftest import self_test
from fedcore.errors import DataError, DeviceError, DigestMismatch, RollbackRefused
from fedcore.files import disk_errors, remove, sha256_hex


@dataclass(frozen=True)
class UpdateResult:
    """What an update did."""

    model: str
    version: int
    """The version that serves now."""
    previous: int | None
    """The version that served before; None on the first, and when nothing changed."""
    changed: bool
    golden_error: float | None
    """Largest difference in the self-test; None when nothing changed."""
    clock: str | None = None
    """What is wrong with this device's clock; None where nothing is known to be."""
    damage: str | None = None
    """What was damaged of the version that should have served until now; None where none was."""


def update(
    source: Source,
    *,
    store: Path,
    model: str,
    root: bytes | None,
    threads: int,
    limits: ModelLimits | None = None,
    now: datetime | None = None,
) -> UpdateResult:
    """Fetches the current release of a model, verifies it, tests it, and makes it serve.

    Whatever fails, the version that served before serves on.

    Args:
        source: The repository.
        store: This device's folder.
        model: The name to ask for.
        root: Trusted root metadata; needed on the first update, pinned by it.
        threads: Of one inference, in the self-test.
        limits: What the model may take in the self-test; `ModelLimits()` when None.
        now: What this device's clock says; it is asked when None.

    Raises:
        ConfigError: the name is not valid, or no root is trusted yet.
        TrustError: the release, or who offers it, cannot be trusted (see `current_offer`).
        DataError: the repository lacks something.
        SelfTestFailed: the model answers differently here, cannot run, or passes its limits.
        DeviceError: another update is at work.
        ResourceError: the store cannot be written, or (`DiskFull`) has no room.
    """
    installed.check_name(model)
    with disk_errors(store), installed.locked(store):
        trust = store / "trust"
        offer = current_offer(
            source,
            trust=trust,
            start=anchor(trust, root),
            model=model,
            now=now or datetime.now(UTC),
        )
        record = Record(
            version=offer.manifest.version,
            manifest_sha256=sha256_hex(offer.manifest_raw),
            epoch=offer.epoch,
        )
        before, damage = _before(store, model)
        if before == record and before == _active(store, model):
            return UpdateResult(
                model,
                record.version,
                None,
                changed=False,
                golden_error=None,
                clock=offer.clock,
                damage=damage,
            )
        _refuse_older(record, _active(store, model) or before, model)
        incoming = store / "incoming"
        onnx, golden = (
            fetch(source, offer.locations[entry.path], entry, incoming)
            for entry in (offer.manifest.onnx, offer.manifest.golden)
        )
        with installed.staged(store, model, offer.manifest_raw, onnx, golden) as folder:
            golden_error = self_test(
                offer.manifest,
                folder / "model.onnx",
                (folder / "golden.safetensors").read_bytes(),
                threads=threads,
                limits=limits or ModelLimits(),
            )
            installed.activate(store, model, folder, record, before)
        for unfinished in incoming.iterdir():
            remove(unfinished)
        previous = before.version if before else None
        return UpdateResult(
            model,
            record.version,
            previous,
            changed=True,
            golden_error=golden_error,
            clock=offer.clock,
            damage=damage,
        )


def _before(store: Path, model: str) -> tuple[Record | None, str | None]:
    """The version that answers now, if any does; and what is damaged of the one that should."""
    try:
        found = installed.serving(store, model)
    except DeviceError:
        return None, None
    except DigestMismatch as error:
        return None, str(error)
    return found.record, found.damage


def _active(store: Path, model: str) -> Record | None:
    """The version that should answer, be it damaged or not."""
    try:
        return installed.read_record(store, model, "active")
    except DataError:
        return None


def _refuse_older(offered: Record, active: Record | None, model: str) -> None:
    """A version never goes back, and what a version is never changes."""
    if active is None:
        return
    if (offered.epoch, offered.version) < (active.epoch, active.version):
        raise RollbackRefused(
            f"model {model!r}: the repository offers {_named(offered)}, older than "
            f"{_named(active)} here. Nothing was installed; the version before keeps serving. "
            "`fedcore release rollback` publishes older bytes under a new version; after a theft "
            "of keys, `fedcore release rotate --last-good` begins a new epoch."
        )
    same = (offered.epoch, offered.version) == (active.epoch, active.version)
    if same and offered != active:
        raise DigestMismatch(
            f"model {model!r}: the repository offers a {_named(offered)} that differs from "
            f"the one installed here: manifest sha256 {offered.manifest_sha256}, here "
            f"{active.manifest_sha256}. Nothing was installed; the version before keeps serving. "
            "Whoever publishes has to look into this."
        )


def _named(record: Record) -> str:
    return f"version {record.version}" + (f" of epoch {record.epoch}" if record.epoch else "")
