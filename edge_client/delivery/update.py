"""Update of an installed model: verifies, fetches, tests and activates the current release."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edge_client.delivery import store as installed
from edge_client.delivery.fetch import PART, fetch, unfinished_name
from edge_client.delivery.floor import read_versions, write_versions
from edge_client.delivery.held import hold, read_held, release_held
from edge_client.delivery.roots import anchor
from edge_client.delivery.source import Source
from edge_client.delivery.store import Record
from edge_client.delivery.trust import Offer, current_offer
from edge_client.inference.process import ModelLimits
from edge_client.inference.selftest import self_test
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.rollout import Canary, DeviceIdentity
from fedcore.errors import (
    DataError,
    DeviceError,
    DigestMismatch,
    RollbackRefused,
    SelfTestFailed,
)
from fedcore.files import disk_errors, remove, sha256_hex


@dataclass(frozen=True)
class UpdateResult:
    """Result of an update.

    Example::

        done = fedcore.update_model("device-store", "digits", repository="releases")
        done.version, done.changed
    """

    model: str
    version: int
    """The version that is active now."""
    previous: int | None = None
    """The version that served before; None on the first update, and when nothing changed."""
    changed: bool = False
    golden_error: float | None = None
    """Largest absolute difference in the self-test; None when nothing changed."""
    clock: str | None = None
    """What is wrong with this device's clock; None if no fault is known."""
    damage: str | None = None
    """What is damaged in the version that was active before; None if nothing is."""
    held: str | None = None
    """Why the newest version is not installed; None if it is."""


def update(
    source: Source,
    *,
    store: Path,
    model: str,
    root: bytes | None,
    threads: int,
    limits: ModelLimits | None = None,
    now: datetime | None = None,
    respect: Collection[str] = ("returned",),
    identity: DeviceIdentity | None = None,
) -> UpdateResult:
    """Fetches the current release of a model, verifies it, tests it, and activates it.

    Guarantee:
        If any step fails, the version that served before continues to serve.

    Args:
        source: The repository.
        store: The device's store of installed models; created if missing.
        model: The model's name.
        root: Trusted root metadata (``root.json``). The first update needs it, and pins it.
        threads: Threads of one inference in the self-test.
        limits: Time and memory for the self-test; `ModelLimits()` when None.
        now: Time to judge expiry by; the device's clock when None.
        respect: Outcomes of earlier attempts that keep a version from being tried again:
            ``returned`` for one that this device left, ``refused`` for one that failed its
            self-test.
        identity: Decides whether this device takes part in a trial; None if it never does.

    Raises:
        ConfigError: the name is not valid, or no root is trusted yet.
        TrustError: a signature, digest or version is not acceptable (see `current_offer`).
        DataError: the repository or the store is incomplete or damaged.
        SelfTestFailed: the model answers differently here, cannot run, or exceeds its limits.
        DeviceError: another update of this store is running.
        ResourceError: the store cannot be written, or (`DiskFull`) has no room.
    """
    installed.check_name(model)
    with disk_errors(store), installed.locked(store):
        trust, active = store / "trust", _active(store, model)

        def chooses(canary: Canary, epoch: int) -> bool:
            follows = active and active.epoch == epoch and active.version >= canary.since
            return bool(follows) or (identity is not None and canary.selects(model, identity))

        offer = current_offer(
            source,
            trust=trust,
            start=anchor(trust, root),
            model=model,
            now=now or datetime.now(UTC),
            chooses=chooses,
        )
        record = Record(
            version=offer.manifest.version,
            manifest_sha256=sha256_hex(offer.manifest_raw),
            epoch=offer.epoch,
        )
        before, damage = _serving_version(store, model)
        if before == record and before == active:
            return UpdateResult(model, record.version, clock=offer.clock, damage=damage)
        held = read_held(store, model)
        if before and held and held.record == record and held.outcome in respect:
            return UpdateResult(
                model,
                before.version,
                clock=offer.clock,
                damage=damage,
                held=f"version {record.version} was {held.outcome}: {held.reason}",
            )
        _refuse_older(record, active or before, model)
        least = read_versions(trust).models.get(model, (0, 0))
        if (record.epoch, record.version) < least:
            raise _older(record, f"version {least[1]} of epoch {least[0]}, installed", model)
        golden_error = _install(source, store, offer, record, before, threads, limits)
        return UpdateResult(
            model,
            record.version,
            before.version if before else None,
            changed=True,
            golden_error=golden_error,
            clock=offer.clock,
            damage=damage,
        )


def _install(
    source: Source,
    store: Path,
    offer: Offer,
    record: Record,
    before: Record | None,
    threads: int,
    limits: ModelLimits | None,
) -> float:
    """Fetches, tests and activates an offer; returns the self-test's largest difference."""
    model, trust = offer.manifest.model, store / "trust"
    incoming, entries = store / "incoming" / model, (offer.manifest.onnx, offer.manifest.golden)
    _drop_unfinished(incoming, kept={unfinished_name(entry) for entry in entries})
    onnx, golden = (
        fetch(source, offer.locations[entry.path], entry, incoming) for entry in entries
    )
    with installed.staged(store, model, offer.manifest_raw, onnx, golden) as folder:
        golden_error = _tested(store, offer.manifest, folder, record, threads, limits)
        floor = read_versions(trust).with_model(model, record.epoch, record.version)
        write_versions(trust, floor)  # before what it protects is in force
        installed.activate(store, model, folder, record, before)
        release_held(store, model)
    remove(incoming)
    return golden_error


def _drop_unfinished(incoming: Path, kept: Collection[str]) -> None:
    """Removes unfinished fetches of earlier offers: each may take the room of a whole model."""
    if not incoming.parent.is_dir():
        return
    before = [path for path in incoming.parent.iterdir() if path.suffix == PART]  # not by model
    own = incoming.iterdir() if incoming.is_dir() else ()
    for path in (*before, *(each for each in own if each.name not in kept)):
        remove(path)


def _tested(
    store: Path,
    manifest: Manifest,
    folder: Path,
    record: Record,
    threads: int,
    limits: ModelLimits | None,
) -> float:
    """Runs the self-test of a staged version, and holds the version back if it fails."""
    golden = (folder / "golden.safetensors").read_bytes()
    try:
        return self_test(
            manifest, folder / "model.onnx", golden, threads=threads, limits=limits or ModelLimits()
        )
    except SelfTestFailed as error:
        hold(store, manifest.model, record, "refused", str(error))
        raise


def _serving_version(store: Path, model: str) -> tuple[Record | None, str | None]:
    """Returns the version that serves now, or None, and any damage to the active version."""
    try:
        found = installed.serving(store, model)
    except DeviceError:
        return None, None
    except DigestMismatch as error:
        return None, str(error)
    return found.record, found.damage


def _active(store: Path, model: str) -> Record | None:
    """Returns the active version, damaged or not; None if there is none or its record is bad."""
    try:
        return installed.read_record(store, model, "active")
    except DataError:
        return None


def _refuse_older(offered: Record, active: Record | None, model: str) -> None:
    """Checks that an offer is no rollback, and that no version has changed its content.

    Raises:
        RollbackRefused: the offer is older than the active version.
        DigestMismatch: the offer is the active version with another manifest.
    """
    if active is None:
        return
    if (offered.epoch, offered.version) < (active.epoch, active.version):
        raise _older(offered, _named(active), model)
    same = (offered.epoch, offered.version) == (active.epoch, active.version)
    if same and offered != active:
        raise DigestMismatch(
            f"model {model!r}: the repository offers a {_named(offered)} that differs from the "
            f"one installed here: manifest sha256 {offered.manifest_sha256}, here "
            f"{active.manifest_sha256}. Nothing was installed; the previous version keeps "
            "serving. The publisher must investigate this."
        )


def _older(offered: Record, newest: str, model: str) -> RollbackRefused:
    return RollbackRefused(
        f"model {model!r}: the repository offers {_named(offered)}, older than {newest} here. "
        "Nothing was installed; the previous version keeps serving. `fedcore release rollback` "
        "publishes older bytes under a new version; after a theft of keys, `fedcore release "
        "rotate --last-good` starts a new epoch."
    )


def _named(record: Record) -> str:
    return f"version {record.version}" + (f" of epoch {record.epoch}" if record.epoch else "")
