"""Verification of a repository with The Update Framework (TUF), and the trusted state for it.

The trusted state (root, newest metadata, time floor) has a folder of its own, apart from the
models: a device whose models were wiped still refuses older releases. Start with `current_offer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api.metadata import (  # type: ignore[attr-defined]  # implicit re-export
    Root,
    TargetFile,
    Timestamp,
)
from tuf.ngclient import (  # type: ignore[attr-defined]  # implicit re-export
    FetcherInterface,
    Updater,
    UpdaterConfig,
)

from edge_client.delivery.cache import cached_timestamp, check_cache, make_durable
from edge_client.delivery.clock import (
    ClockReading,
    floor_after,
    forgotten,
    learned,
    read_floor,
    shown,
    write_floor,
)
from edge_client.delivery.floor import read_versions, write_versions
from edge_client.delivery.roots import Anchor, check_awaited, pin, rotated
from edge_client.delivery.source import Source
from fedcore.artifacts.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest
from fedcore.artifacts.rollout import Canary, rollout_of
from fedcore.artifacts.statements import EPOCHS, MAX_EPOCHS_BYTES, Epochs, moment_of, parse_epochs
from fedcore.errors import DataError, DigestMismatch, RollbackRefused, SignatureInvalid, TrustError
from fedcore.files import disk_errors, sync_folder
from fedcore.observability.foreign import foreign

_AFTER = "Nothing was installed; the previous version keeps serving."
_SET_CLOCK = "Set the clock; NTP keeps it correct (timedatectl set-ntp true)."
_MAX_ROOTS = 100_000
"""Most root rotations that one update follows; each is signed by the keys before it."""


@dataclass(frozen=True)
class Offer:
    """The verified current release of a model."""

    manifest: Manifest
    manifest_raw: bytes = field(repr=False)
    locations: dict[str, str] = field(repr=False)
    """Path of the bytes in the repository, by target path."""
    epoch: int
    """Epoch of the model's versions, signed with the offline keys."""
    clock: str | None
    """What is wrong with this device's clock; None if no fault is known."""


def current_offer(
    source: Source,
    *,
    trust: Path,
    start: Anchor,
    model: str,
    now: datetime,
    chooses: Callable[[Canary, int], bool] = lambda canary, epoch: False,
) -> Offer:
    """Reads and verifies the current release of a model in a repository.

    Guarantee:
        The digests of the manifest and of each file it names are in metadata signed with the keys
        of ``start``, or of a root reached from it by signed rotations. The metadata has not
        expired, and is no older than any in ``trust`` since the last rotation of its keys.

    Args:
        source: The repository.
        trust: Folder of the trusted state; updated durably.
        start: The trusted root; the newest root in its chain is pinned.
        model: The model's name, valid as `fedcore.config.run.Name`.
        now: Reading of the device's clock. Expiry is judged by it, or by the time floor if later.
        chooses: Returns whether this device takes part in a trial, given the signed description of
            the trial and the epoch of the model's versions.

    Raises:
        SignatureInvalid: the metadata is signed with other keys, or has expired. The message
            distinguishes a frozen repository from a clock that is behind or ahead.
        RollbackRefused: the metadata is older than what this device has verified before.
        DigestMismatch: a file differs from what was signed.
        TrustError: the metadata or manifest is malformed or inconsistent, or the chain of rotations
            does not lead to the root that the owner gave.
        DataError: a file or the model is missing from the repository.
        DiskFull: there was no room.
    """
    metadata = trust / "metadata"
    check_cache(metadata)
    cached, floor = cached_timestamp(metadata), read_floor(trust)
    if floor.until is None and cached is not None:  # verified by a version without a time floor
        floor = floor.model_copy(update={"until": cached.expires})
    view = _View(metadata, ClockReading(now, floor), cached.version if cached else None)
    with _explained(f"model {model!r}", view), disk_errors(metadata):
        updater, judged = _refreshed(source, trust, start, view)
        seen = read_versions(trust)
        seen.check_metadata(updater.versions)
        pointer = f"models/{model}/release.json"
        info = updater.get_targetinfo(pointer)
        check_awaited(start, trust)
        make_durable(metadata)
        if start.pinned and seen.metadata != updater.versions:
            write_versions(trust, seen.with_metadata(updater.versions))
        if info is None:
            raise DataError(
                f"model {model!r}: this repository contains no model of that name. {_AFTER} "
                "Check --model."
            )
        epoch = _epochs(source, updater).of(model)
        canary = rollout_of(info.custom).canary
        if canary is not None and chooses(canary, epoch):
            info = _canary_info(updater, model, canary)
        raw = _read_target(source, info, MAX_MANIFEST_BYTES, "the manifest")
        manifest = parse_manifest(raw)
        locations = {
            entry.path: _location(_agreed(updater, entry, manifest, name, model))
            for entry, name in (
                (manifest.onnx, "model.onnx"),
                (manifest.golden, "golden.safetensors"),
            )
        }
    created = moment_of(manifest.created)
    known = learned(
        judged.floor, now, root=updater.root, timestamp=updater.timestamp, created=created
    )
    write_floor(trust, known)
    if not start.pinned:  # pinned only now: it has led to a valid release
        write_versions(trust, seen.with_metadata(updater.versions))
        pin(trust, start, updater.root.version, metadata / "root_history")
    said = ClockReading(now, known.model_copy(update={"latest": judged.floor.latest}))
    return Offer(manifest, raw, locations, epoch, said.clock_warning())


class _Updater(Updater):
    """python-tuf's updater with a settable reference time and access to verified metadata.

    Relies on the private attribute ``_trusted_set``.
    """

    def judge_at(self, moment: datetime) -> None:
        self._trusted_set.reference_time = moment

    @property
    def root(self) -> Root:
        return self._trusted_set.root

    @property
    def timestamp(self) -> Timestamp:
        """The newest correctly signed timestamp, expired or not."""
        return self._trusted_set.timestamp

    @property
    def versions(self) -> dict[str, int]:
        """Versions of the verified metadata in force, by role."""
        snapshot = self._trusted_set.snapshot
        meta = {name.removesuffix(".json"): one.version for name, one in snapshot.meta.items()}
        own = {"timestamp": self.timestamp.version, "snapshot": snapshot.version}
        return own | {role: meta[role] for role in meta.keys() & {"targets", "releases"}}

    @property
    def has_timestamp(self) -> bool:
        return Timestamp.type in self._trusted_set


@dataclass
class _View:
    """State of a verification, from which its errors are explained."""

    metadata: Path
    judged: ClockReading
    seen_version: int | None
    """Version of the newest timestamp verified before this update."""
    updater: _Updater | None = None


def _refreshed(
    source: Source, trust: Path, start: Anchor, view: _View
) -> tuple[_Updater, ClockReading]:
    """Verifies root, timestamp, snapshot and targets; returns the updater and the time used.

    If a root rotation has replaced keys of timestamp or snapshot, discards what the old keys
    signed and repeats: with stolen keys, an attacker may have signed version numbers so high that
    the owner never reaches them (step 5.3.11 of the TUF specification).
    """
    failure: Exception | None = None
    for forgetting in (True, False):
        floor, failure = view.judged.floor, None
        if floor.until is not None:  # kept even if this update fails
            write_floor(trust, floor_after(floor, view.judged.now))
        updater = view.updater = _Updater(
            str(view.metadata),
            "metadata",
            fetcher=_Fetcher(source),
            config=UpdaterConfig(max_root_rotations=_MAX_ROOTS),
            bootstrap=start.raw,
        )
        updater.judge_at(view.judged.at)
        try:
            updater.refresh()
        except (tuf.RepositoryError, tuf.DownloadError) as error:
            failure = error
        if not (forgetting and rotated(start.root, updater.root, ("timestamp", "snapshot"))):
            break
        for role in ("timestamp", "snapshot"):
            (view.metadata / f"{role}.json").unlink(missing_ok=True)
        sync_folder(view.metadata)
        view.judged = ClockReading(view.judged.now, forgotten(updater.root))
        view.seen_version = None
        if start.pinned:
            write_floor(trust, view.judged.floor)
            write_versions(trust, read_versions(trust).with_metadata({}))
    if start.pinned:
        pin(trust, start, updater.root.version, view.metadata / "root_history")
    if failure is not None:
        raise failure
    return updater, view.judged


class _Fetcher(FetcherInterface):
    """Adapts a `Source` to python-tuf's fetcher; the updater limits and verifies the bytes."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from self._source(url, 0)
        except FileNotFoundError:
            raise tuf.DownloadHTTPError(f"{url} is not in the repository", 404) from None


@contextmanager
def _explained(what: str, view: _View) -> Iterator[None]:
    """Turns errors of python-tuf into fedcore's, with the consequence for this device."""
    try:
        yield
    except tuf.ExpiredMetadataError as error:
        raise SignatureInvalid(_expired(f"{what}: the repository's", error, view)) from error
    except tuf.UnsignedMetadataError as error:
        raise SignatureInvalid(
            f"{what}: the repository is not signed by the keys that this device trusts "
            f"({_said(error)}). {_AFTER} Check --repository; its maintainer must investigate "
            "this."
        ) from error
    except tuf.BadVersionNumberError as error:
        raise RollbackRefused(
            f"{what}: the repository offers signed metadata older than this device has seen "
            f"before ({_said(error)}). {_AFTER} Fetch from the current repository. If a stolen "
            "key signed versions that are too high, the publisher must run `fedcore release "
            "rotate`."
        ) from error
    except (tuf.LengthOrHashMismatchError, tuf.DownloadLengthMismatchError) as error:
        raise DigestMismatch(
            f"{what}: a metadata file differs from what was signed ({_said(error)}). {_AFTER} The "
            "repository is damaged or was tampered with; restore it, then run again."
        ) from error
    except tuf.RepositoryError as error:
        raise TrustError(
            f"{what}: cannot parse the repository's metadata ({type(error).__name__}: "
            f"{_said(error)}). {_AFTER} Restore the repository, then run again."
        ) from error
    except tuf.DownloadError as error:
        raise DataError(
            f"{what}: the repository is incomplete: {_said(error)}. {_AFTER} Run again when it "
            "is complete."
        ) from error


def _said(error: Exception) -> str:
    """Escapes and shortens python-tuf's message, which may quote untrusted bytes."""
    return foreign(error, 300)


def _expired(whose: str, error: tuf.ExpiredMetadataError, view: _View) -> str:
    """Explains an expired signature: a frozen repository, or a clock that is wrong."""
    judged, updater = view.judged, view.updater
    told = f"{whose} signatures have expired ({_said(error)})"
    clock = f"this device's clock says {shown(judged.now)}"
    if judged.held:
        how = "" if judged.is_slow else ", or was fast then"
        return (
            f"{told}, checked against {shown(judged.at)}, a time that this device has seen "
            f"before; {clock}, so it is slow, or was set back{how}. {_AFTER} {_SET_CLOCK} "
            "Freshly signed metadata will be accepted."
        )
    doubts = []
    if updater is not None and updater.root.is_expired(judged.now):
        doubts.append(f"even the root has expired, on {shown(updater.root.expires)}")
    if (
        updater is not None
        and updater.has_timestamp
        and view.seen_version is not None
        and updater.timestamp.version > view.seen_version
    ):
        doubts.append("the repository was signed again since this device's last update")
    if judged.jumped():
        doubts.append("it showed a much earlier time at this device's last update")
    if doubts:
        return (
            f"{told}; {clock}, and may be fast: {' and '.join(doubts)}. {_AFTER} Check that the "
            "clock is right; if it is, the publisher must run `fedcore release refresh`."
        )
    return (
        f"{told}: it was not signed again, or an attacker presents an old copy (freeze attack); "
        f"{clock}. {_AFTER} The publisher must run `fedcore release refresh`."
    )


def _epochs(source: Source, updater: Updater) -> Epochs:
    """Reads the models' epochs, signed with the offline targets keys; empty if none are signed."""
    info = updater.get_targetinfo(EPOCHS)
    if info is None:
        return Epochs()
    return parse_epochs(_read_target(source, info, MAX_EPOCHS_BYTES, "the list of epochs"))


def _canary_info(updater: Updater, model: str, canary: Canary) -> TargetFile:
    path = f"models/{model}/{canary.version}/manifest.json"
    info = updater.get_targetinfo(path)
    if info is None:
        raise TrustError(f"{path}: it is on trial, but it is not signed. {_AFTER}")
    return info


def _read_target(source: Source, info: TargetFile, max_bytes: int, what: str) -> bytes:
    if info.length > max_bytes:
        raise TrustError(
            f"{info.path}: {what} has {info.length} bytes, more than the {max_bytes} allowed. "
            f"{_AFTER}"
        )
    raw = _Fetcher(source).download_bytes(_location(info), info.length)
    info.verify_length_and_hashes(raw)
    return raw


def _agreed(
    updater: Updater, entry: FileEntry, manifest: Manifest, name: str, model: str
) -> TargetFile:
    """Returns a file's signed metadata, after checking that it agrees with the manifest."""
    expected = f"models/{model}/{manifest.version}/{name}"
    if manifest.model != model or entry.path != expected:
        raise TrustError(
            f"manifest: it belongs to model {manifest.model!r} and lists {entry.path!r}, "
            f"expected {expected!r}. {_AFTER} The publisher must investigate this."
        )
    info = updater.get_targetinfo(expected)
    if info is None:
        raise TrustError(f"{expected}: the manifest lists it, but it is not signed. {_AFTER}")
    if (info.length, info.hashes.get("sha256")) != (entry.length, entry.sha256):
        raise DigestMismatch(
            f"{expected}: the manifest says {entry.length} bytes, sha256 {entry.sha256}, the "
            f"signed metadata {info.length} bytes, sha256 {info.hashes.get('sha256')}. {_AFTER}"
        )
    return info


def _location(info: TargetFile) -> str:
    digest = info.hashes.get("sha256")
    if digest is None:
        raise TrustError(f"{info.path}: it is signed without a sha256 digest. {_AFTER}")
    folder, slash, name = info.path.rpartition("/")
    return f"targets/{folder}{slash}{digest}.{name}"
