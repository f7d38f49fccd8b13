"""What a device believes: the owner's root, and the newest signed metadata it has seen.

This state lives in a folder of its own, apart from the models, so that a device whose models were
wiped still refuses to go back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tuf.api import exceptions as tuf
from tuf.api.metadata import (  # type: ignore[attr-defined]  # re-exported unsaid
    Metadata,
    Root,
    TargetFile,
)
from tuf.ngclient import (  # type: ignore[attr-defined]  # likewise
    FetcherInterface,
    Updater,
)

from edge_client.source import Source
from fedcore.artifacts.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    parse_manifest,
)
from fedcore.errors import (
    ConfigError,
    DataError,
    DigestMismatch,
    RollbackRefused,
    SignatureInvalid,
    TrustError,
)
from fedcore.files import disk_errors, read_bytes, sync_folder, write_atomic

MAX_ROOT_BYTES = 512_000  # bytes: what python-tuf's updater allows a root
_AFTER = "Nothing was installed; the version before keeps serving."


@dataclass(frozen=True)
class Offer:
    """The current release of a model, as its repository signed it."""

    manifest: Manifest
    manifest_raw: bytes = field(repr=False)
    locations: dict[str, str] = field(repr=False)
    """Where in the repository each target path's bytes are."""


def trusted_root(trust: Path, given: bytes | None) -> bytes:
    """The root that this device trusts: the one pinned earlier, else the one its owner gives.

    Raises:
        ConfigError: nothing is pinned yet and none is given.
        TrustError: the one given is not the pinned one, or is no root.
    """
    path = _pin(trust)
    if not path.exists():
        if given is None:
            raise ConfigError(
                f"{trust}: this device trusts no root yet. Nothing was fetched; give it once with "
                "--root, the root.json that `fedcore release init` made."
            )
        _check_root(given)
        return given
    pinned = read_bytes(path, max_bytes=MAX_ROOT_BYTES, what="the pinned root")
    if given is not None and given != pinned:
        raise TrustError(
            f"{path}: the root given is not the one that this device has trusted since its first "
            f"update. {_AFTER} Leave --root out to go on trusting that one; to trust another, "
            "choose another store."
        )
    return pinned


def pin_root(trust: Path, root: bytes) -> None:
    """Keeps the root that has just vouched for a release; from now on no other is taken."""
    if not _pin(trust).exists():
        write_atomic(_pin(trust), root)


def current_offer(source: Source, *, trust: Path, root: bytes, model: str) -> Offer:
    """Asks a repository what the current release of a model is, and believes only what is signed.

    Guarantee:
        The manifest is named, with its digest, by metadata that is signed by the keys that
        ``root`` trusts, has not expired, and is no older than any seen with this ``trust``; so is
        each file that the manifest names.

    Args:
        source: The repository.
        trust: The folder of the trusted state; it is brought up to date and made durable.
        root: Trusted root metadata.
        model: The name to ask for, valid as `fedcore.config.Name`.

    Raises:
        SignatureInvalid: the metadata is signed by others, or has expired.
        RollbackRefused: the metadata is older than what was seen before.
        DigestMismatch: a file differs from what was signed.
        TrustError: the metadata, or the manifest, is not what it should be.
        DataError: the repository lacks a file or the model.
        DiskFull: there was no room.
    """
    metadata = trust / "metadata"
    with _explained(f"model {model!r}"), disk_errors(metadata):
        updater = Updater(str(metadata), "metadata", fetcher=_Fetcher(source), bootstrap=root)
        updater.refresh()
        pointer = f"models/{model}/release.json"
        info = updater.get_targetinfo(pointer)
        _make_durable(metadata)
        if info is None:
            raise DataError(
                f"model {model!r}: this repository has released no model of that name. {_AFTER} "
                "Check --model."
            )
        raw = _read_manifest(source, info)
        manifest = parse_manifest(raw)
        locations = {
            entry.path: _location(_agreed(updater, entry, manifest, name, model))
            for entry, name in (
                (manifest.onnx, "model.onnx"),
                (manifest.golden, "golden.safetensors"),
            )
        }
    return Offer(manifest, raw, locations)


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
def _explained(what: str) -> Iterator[None]:
    """Turns what python-tuf raises into errors that say what it means for this device."""
    try:
        yield
    except tuf.ExpiredMetadataError as error:
        raise SignatureInvalid(
            f"{what}: the repository's signatures have run out ({error}), so it may be frozen, or "
            f"this device's clock wrong. {_AFTER} Whoever publishes runs `fedcore release refresh`."
        ) from error
    except tuf.UnsignedMetadataError as error:
        raise SignatureInvalid(
            f"{what}: the repository is not signed by the keys that this device trusts ({error}). "
            f"{_AFTER} Check --repository; whoever keeps it has to look into this."
        ) from error
    except tuf.BadVersionNumberError as error:
        raise RollbackRefused(
            f"{what}: the repository offers signed metadata that is older than what this device "
            f"has seen ({error}). {_AFTER} Fetch from the current repository."
        ) from error
    except (tuf.LengthOrHashMismatchError, tuf.DownloadLengthMismatchError) as error:
        raise DigestMismatch(
            f"{what}: a metadata file differs from what was signed ({error}). {_AFTER} The "
            "repository is damaged or was tampered with; restore it, then run again."
        ) from error
    except tuf.RepositoryError as error:
        raise TrustError(
            f"{what}: the repository's metadata cannot be read as such "
            f"({type(error).__name__}: {error}). {_AFTER} Restore the repository, then run again."
        ) from error
    except tuf.DownloadError as error:
        raise DataError(
            f"{what}: the repository is not whole: {error}. {_AFTER} Run again when it is complete."
        ) from error


def _read_manifest(source: Source, info: TargetFile) -> bytes:
    if info.length > MAX_MANIFEST_BYTES:
        raise TrustError(
            f"{info.path}: the manifest has {info.length} bytes, more than the "
            f"{MAX_MANIFEST_BYTES} allowed. {_AFTER}"
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
    folder, _, name = info.path.rpartition("/")
    return f"targets/{folder}/{digest}.{name}"


def _check_root(raw: bytes) -> None:
    try:
        metadata: Metadata[Root] = Metadata.from_bytes(raw)
        if not isinstance(metadata.signed, Root):
            raise tuf.RepositoryError(f"it is metadata of type {metadata.signed.type!r}")
        metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
    except (tuf.RepositoryError, ValueError) as error:
        raise TrustError(
            f"--root: expected the root.json that `fedcore release init` made, got something else "
            f"({error}). {_AFTER}"
        ) from error


def _pin(trust: Path) -> Path:
    return trust / "pinned.root.json"


def _make_durable(folder: Path) -> None:
    """The updater renames without fsync; a power cut must not make this device forget."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    sync_folder(folder.parent)
