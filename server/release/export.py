"""Export of a published model for other servers: verified, tried, and written as a whole folder.

Start with `export_model`. `layouts` has the files, `signature` what the model takes and returns.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore.artifacts.manifest import Manifest
from fedcore.errors import ReleaseError
from fedcore.files import disk_errors, name_exists, sync_folder, write_atomic
from server.release.channels import stable_version
from server.release.draft import check_name
from server.release.layouts import ExportLayout, check_layout, files_of_layout
from server.release.publish import read_manifest, versions
from server.release.registry import repository as registry
from server.release.registry.keys import read_trusted_root
from server.release.signature import read_signature


@dataclass(frozen=True)
class ExportedModel:
    """A released model in the layout of another server.

    Example::

        done = fedcore.export_release(
            "digits", "triton", repository="releases", keys="keys", out="models"
        )
        done.folder, done.files, done.max_batch_size
    """

    folder: Path
    """The model's folder, within the one that was named."""
    manifest: Manifest
    files: tuple[str, ...]
    """Paths of the files, within the model's folder."""
    max_batch_size: int
    """How many inputs a server may run together; 1 if answers would depend on the batch."""


def export_model(
    model: str,
    layout: ExportLayout,
    *,
    repository: Path,
    keys: Path,
    out: Path,
    version: int | None = None,
    storage_uri: str | None = None,
) -> ExportedModel:
    """Writes a released model into ``out``, in a folder of the model's name.

    Args:
        model: The model's name.
        layout: The layout of the folder.
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        out: The folder that gets the model's folder.
        version: A published version; None for the one that all devices get.
        storage_uri: Where a cluster will find the model; for ``kserve`` alone.

    Raises:
        ConfigError: the layout, or its storage URI, is not valid.
        ReleaseError: signatures or files don't verify, there is no such version, it does not
            reproduce its golden outputs, or the model's folder exists. Nothing was written.
        DiskFull: the disk is full. Nothing was written.
    """
    check_layout(layout, storage_uri)
    check_name(model)
    folder = out / model
    _refuse_existing(folder)
    manifest, onnx, golden = _verified(model, version, repository, keys)
    signature = read_signature(manifest, onnx, golden)
    files = files_of_layout(layout, manifest, signature, onnx, golden, storage_uri)
    _write(folder, files)
    return ExportedModel(folder, manifest, tuple(sorted(files)), signature.max_batch_size)


def _verified(
    model: str, version: int | None, repository: Path, keys: Path
) -> tuple[Manifest, bytes, bytes]:
    with registry.locked(repository):
        state = registry.read_state(repository, read_trusted_root(keys))
        published = versions(state, model)
        if not published or (version is not None and version not in published):
            known = ", ".join(map(str, published)) or "none"
            wanted = "no version" if version is None else f"no version {version}"
            raise ReleaseError(
                f"{model}: {repository} has {wanted} of it; published are: {known}. Nothing was "
                "exported; `fedcore release list` names models and versions."
            )
        chosen = stable_version(state, model) if version is None else version
        manifest = read_manifest(repository, state, model, chosen)
        return (
            manifest,
            registry.read_target(repository, state, manifest.onnx.path),
            registry.read_target(repository, state, manifest.golden.path),
        )


def _refuse_existing(folder: Path) -> None:
    if name_exists(folder):
        raise ReleaseError(
            f"{folder}: this exists already, and may be in use. Nothing was exported; name "
            "another folder with --out, or remove this one."
        )


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes all files under another name first, so that a server never sees a part of them."""
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            for name, data in files.items():
                write_atomic(made / name, data)
            made.chmod(0o755)  # the server may run as another user
            made.rename(folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        sync_folder(folder.parent)
