"""What a device believes: the owner's root, and the newest signed metadata it has seen.

This state lives in a folder of its own, apart from the models, so that a device whose models were
wiped still refuses to go back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api.metadata import (  # type: ignore[attr-defined]  # re-exported unsaid
    Metadata,
    Root,
    TargetFile,
    Timestamp,
)
from tuf.ngclient import (  # type: ignore[attr-defined]  # likewise
    FetcherInterface,
    Updater,
    UpdaterConfig,
)

from edge_client.delivery.clock import (
    Judged,
    forgotten,
    learned,
    looked,
    read_floor,
    shown,
    write_floor,
)
from edge_client.delivery.roots import Anchor, check_awaited, pin, rotated
from edge_client.delivery.source import Source
from fedcore.artifacts.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest
from fedcore.artifacts.statements import EPOCHS, MAX_EPOCHS_BYTES, Epochs, moment_of, parse_epochs
from fedcore.errors import DataError, DigestMismatch, RollbackRefused, SignatureInvalid, TrustError
from fedcore.files import disk_errors, open_regular, read_bytes, sync_folder
from fedcore.observability.foreign import foreign

_AFTER = "Nothing was installed; the version before keeps serving."
_SET_CLOCK = "Set the clock; NTP keeps it right (timedatectl set-ntp true)."
_MAX_ROOTS = 100_000
"""Rotations that a device may have been off for. Each was signed by the keys before it."""


_METADATA = "metadata that this device has verified"
_REMOVE = f"{_AFTER} Remove it, and run again: what is signed is fetched again."
_MAX_CACHED_BYTES = 16_384  # bytes: what python-tuf's updater allows a timestamp


@dataclass(frozen=True)
class Offer:
    """The current release of a model, as its repository signed it."""

    manifest: Manifest
    manifest_raw: bytes = field(repr=False)
    locations: dict[str, str] = field(repr=False)
    """Where in the repository each target path's bytes are."""
    epoch: int
    """Of the model's versions, as the offline keys state it."""
    clock: str | None
    """What is wrong with this device's clock; None where nothing is known to be."""


def current_offer(
    source: Source, *, trust: Path, start: Anchor, model: str, now: datetime
) -> Offer:
    """Asks a repository what the current release of a model is, and believes only what is signed.

    Guarantee:
        The manifest is named, with its digest, by metadata that is signed by the keys that
        ``start`` trusts, or that its keys have put in their place; it has not expired, and is no
        older than any seen with this ``trust`` since those keys were last changed. So is each file
        that the manifest names.

    Args:
        source: The repository.
        trust: The folder of the trusted state; it is brought up to date and made durable.
        start: The root that is trusted; the newest that it leads to is pinned.
        model: The name to ask for, valid as `fedcore.config.run.Name`.
        now: What this device's clock says. Expiry is judged by no earlier time than it has seen.

    Raises:
        SignatureInvalid: the metadata is signed by others, or has expired; the text tells a
            repository that may be frozen from a clock that is behind, or may be ahead.
        RollbackRefused: the metadata is older than what was seen before.
        DigestMismatch: a file differs from what was signed.
        TrustError: the metadata, or the manifest, is not what it should be, or the roots do not
            lead to the one that the owner gave.
        DataError: the repository lacks a file or the model.
        DiskFull: there was no room.
    """
    metadata = trust / "metadata"
    _check_cache(metadata)
    cached, floor = _cached_timestamp(metadata), read_floor(trust)
    if floor.until is None and cached is not None:  # verified before this device kept a floor
        floor = floor.model_copy(update={"until": cached.expires})
    view = _View(metadata, Judged(now, floor), cached.version if cached else None)
    with _explained(f"model {model!r}", view), disk_errors(metadata):
        updater, judged = _refreshed(source, trust, start, view)
        pointer = f"models/{model}/release.json"
        info = updater.get_targetinfo(pointer)
        check_awaited(start, trust)
        _make_durable(metadata)
        if info is None:
            raise DataError(
                f"model {model!r}: this repository has released no model of that name. {_AFTER} "
                "Check --model."
            )
        raw = _read_target(source, info, MAX_MANIFEST_BYTES, "the manifest")
        manifest = parse_manifest(raw)
        locations = {
            entry.path: _location(_agreed(updater, entry, manifest, name, model))
            for entry, name in (
                (manifest.onnx, "model.onnx"),
                (manifest.golden, "golden.safetensors"),
            )
        }
        epoch = _epochs(source, updater).of(model)
    created = moment_of(manifest.created)
    known = learned(
        judged.floor, now, root=updater.root, timestamp=updater.timestamp, created=created
    )
    write_floor(trust, known)
    if not start.pinned:  # it has just vouched for a release
        pin(trust, start, updater.root.version, metadata / "root_history")
    said = Judged(now, known.model_copy(update={"latest": judged.floor.latest}))
    return Offer(manifest, raw, locations, epoch, said.complaint())


class _Updater(Updater):
    """python-tuf's updater, which judges expiry by a time of ours, and tells what it has verified.

    Both need one attribute of its that is nobody's API.
    """

    def judge_at(self, moment: datetime) -> None:
        self._trusted_set.reference_time = moment

    @property
    def root(self) -> Root:
        return self._trusted_set.root

    @property
    def timestamp(self) -> Timestamp:
        """The newest whose signatures fit, be it expired or not."""
        return self._trusted_set.timestamp

    @property
    def has_timestamp(self) -> bool:
        return Timestamp.type in self._trusted_set


@dataclass
class _View:
    """What explains a refusal."""

    metadata: Path
    judged: Judged
    seen_version: int | None
    """Of the newest timestamp before this update."""
    updater: _Updater | None = None


def _refreshed(source: Source, trust: Path, start: Anchor, view: _View) -> tuple[_Updater, Judged]:
    """An updater that has followed root, timestamp, snapshot and targets; and by what time.

    Where the keys of timestamp or snapshot were changed, what the old ones signed is forgotten
    first: whoever stole them may have signed versions that the owner never reaches (step 5.3.11 of
    the specification).
    """
    failure: Exception | None = None
    for forgetting in (True, False):
        floor, failure = view.judged.floor, None
        if floor.until is not None:  # remembered whether or not this update succeeds
            write_floor(trust, looked(floor, view.judged.now))
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
        view.judged = Judged(view.judged.now, forgotten(updater.root))
        view.seen_version = None
        if start.pinned:
            write_floor(trust, view.judged.floor)
    if start.pinned:
        pin(trust, start, updater.root.version, view.metadata / "root_history")
    if failure is not None:
        raise failure
    return updater, view.judged


class _Fetcher(FetcherInterface):
    """Hands python-tuf's updater the bytes of a source; the updater bounds and verifies them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from self._source(url, 0)
        except FileNotFoundError:
            raise tuf.DownloadHTTPError(f"{url} is not in the repository", 404) from None


@contextmanager
def _explained(what: str, view: _View) -> Iterator[None]:
    """Turns what python-tuf raises into errors that say what it means for this device."""
    try:
        yield
    except tuf.ExpiredMetadataError as error:
        raise SignatureInvalid(_expired(f"{what}: the repository's", error, view)) from error
    except tuf.UnsignedMetadataError as error:
        raise SignatureInvalid(
            f"{what}: the repository is not signed by the keys that this device trusts "
            f"({_said(error)}). {_AFTER} Check --repository; whoever keeps it has to look into "
            "this."
        ) from error
    except tuf.BadVersionNumberError as error:
        raise RollbackRefused(
            f"{what}: the repository offers signed metadata that is older than what this device "
            f"has seen ({_said(error)}). {_AFTER} Fetch from the current repository. If a stolen "
            "key has signed versions that are too high, whoever publishes runs `fedcore release "
            "rotate`."
        ) from error
    except (tuf.LengthOrHashMismatchError, tuf.DownloadLengthMismatchError) as error:
        raise DigestMismatch(
            f"{what}: a metadata file differs from what was signed ({_said(error)}). {_AFTER} The "
            "repository is damaged or was tampered with; restore it, then run again."
        ) from error
    except tuf.RepositoryError as error:
        raise TrustError(
            f"{what}: the repository's metadata cannot be read as such "
            f"({type(error).__name__}: {_said(error)}). {_AFTER} Restore the repository, then run "
            "again."
        ) from error
    except tuf.DownloadError as error:
        raise DataError(
            f"{what}: the repository is not whole: {_said(error)}. {_AFTER} Run again when it is "
            "complete."
        ) from error


def _said(error: Exception) -> str:
    """python-tuf's own words, which may quote what was delivered."""
    return foreign(error, 300)


def _expired(whose: str, error: tuf.ExpiredMetadataError, view: _View) -> str:
    """What run-out signatures mean: a frozen repository, or a clock that is wrong."""
    judged, updater = view.judged, view.updater
    told = f"{whose} signatures have run out ({_said(error)})"
    clock = f"this device's clock says {shown(judged.now)}"
    if judged.held:
        how = "" if judged.behind else ", or was ahead then"
        return (
            f"{told}, judged by {shown(judged.at)}, a time that this device has seen before; "
            f"{clock}, so it is behind, or was set back{how}. {_AFTER} {_SET_CLOCK} What is signed "
            "again is taken."
        )
    doubts = []
    if updater is not None and updater.root.is_expired(judged.now):
        doubts.append(f"even the root has run out, on {shown(updater.root.expires)}")
    if (
        updater is not None
        and updater.has_timestamp
        and view.seen_version is not None
        and updater.timestamp.version > view.seen_version
    ):
        doubts.append("somebody has signed again since this device last looked")
    if judged.jumped():
        doubts.append("it said much less when this device last looked")
    if doubts:
        return (
            f"{told}; {clock}, and may be ahead: {' and '.join(doubts)}. {_AFTER} See that the "
            "clock is right; if it is, whoever publishes runs `fedcore release refresh`."
        )
    return (
        f"{told}: nobody has signed it again, or somebody shows an old copy (frozen); {clock}. "
        f"{_AFTER} Whoever publishes runs `fedcore release refresh`."
    )


def _epochs(source: Source, updater: Updater) -> Epochs:
    """The epochs of models, which the offline targets keys sign; none where they say nothing."""
    info = updater.get_targetinfo(EPOCHS)
    if info is None:
        return Epochs()
    return parse_epochs(_read_target(source, info, MAX_EPOCHS_BYTES, "the list of epochs"))


def _check_cache(metadata: Path) -> None:
    """Sees that the updater, which opens what it finds there, finds files and folders alone.

    Raises:
        DataError: it would find a pipe, whose other end it would wait for.
    """
    for path in (metadata, *metadata.rglob("*")):
        if path.exists() and not (path.is_dir() or path.is_file()):
            os.close(open_regular(path, what=_METADATA, otherwise=_REMOVE))


def _cached_timestamp(metadata: Path) -> Timestamp | None:
    """The newest timestamp that was verified, as it lies there; None where none does."""
    try:
        raw = read_bytes(metadata / "timestamp.json", max_bytes=_MAX_CACHED_BYTES, what="it")
        cached: Metadata[Timestamp] = Metadata.from_bytes(raw)
    except (DataError, tuf.RepositoryError, ValueError):
        return None
    return cached.signed if isinstance(cached.signed, Timestamp) else None


def _read_target(source: Source, info: TargetFile, most_bytes: int, what: str) -> bytes:
    if info.length > most_bytes:
        raise TrustError(
            f"{info.path}: {what} has {info.length} bytes, more than the {most_bytes} allowed. "
            f"{_AFTER}"
        )
    raw = _Fetcher(source).download_bytes(_location(info), info.length)
    info.verify_length_and_hashes(raw)
    return raw


def _agreed(
    updater: Updater, entry: FileEntry, manifest: Manifest, name: str, model: str
) -> TargetFile:
    """The signed metadata of a file, which must say what the manifest says."""
    expected = f"models/{model}/{manifest.version}/{name}"
    if manifest.model != model or entry.path != expected:
        raise TrustError(
            f"manifest: it is of model {manifest.model!r} and names {entry.path!r}, where "
            f"{expected!r} was expected. {_AFTER} Whoever publishes has to look into this."
        )
    info = updater.get_targetinfo(expected)
    if info is None:
        raise TrustError(f"{expected}: the manifest names it, but nobody signed it. {_AFTER}")
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


def _make_durable(folder: Path) -> None:
    """The updater renames without fsync; a power cut must not make this device forget."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = open_regular(path, what=_METADATA, otherwise=_REMOVE)
            os.fsync(descriptor)
            os.close(descriptor)
    sync_folder(folder.parent)
