"""Copies of a repository's content as calls: in a bucket for devices, or for other servers."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from server.release.export import ExportedModel, export_model
from server.release.layouts import ExportLayout
from server.release.push import PushedRepository, push

Place = str | PathLike[str]


def push_release(
    repository: Place,
    keys: Place,
    *,
    to: str,
    on_upload: Callable[[str, int], None] = lambda name, length: None,
) -> PushedRepository:
    """Copies a signed repository to a bucket, from which devices fetch releases over HTTPS.

    Only what the bucket lacks is uploaded, the timestamp last, so that a device never sees metadata
    whose files are missing. A push that broke off goes on where it stopped when called again. Needs
    the extra ``s3`` for buckets of S3, and credentials from the environment or from the
    configuration of s3fs.

    Example::

        done = fedcore.push_release("releases", "keys", to="s3://bucket/fleet")
        done.uploaded, done.repaired

    Args:
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        to: Address of the bucket, with a prefix if it has other content, such as
            ``s3://bucket/fleet``.
        on_upload: Called before each upload with the object's name and its size in bytes.

    Returns:
        What was uploaded, and what was there with another content than what was signed.

    Raises:
        ConfigError: ``to`` is no address of a bucket, or has credentials in it.
        ResourceError: the fsspec plugin for the address is not installed.
        ReleaseError: the repository or one of its files doesn't verify; the bucket has a newer
            version, or versions that this folder doesn't know; or it cannot be reached. Devices see
            what they saw before.
    """
    return push(Path(repository), Path(keys), to, on_upload=on_upload)


def export_release(
    model: str,
    layout: ExportLayout,
    *,
    repository: Place,
    keys: Place,
    out: Place,
    version: int | None = None,
    storage_uri: str | None = None,
) -> ExportedModel:
    """Writes a released model into a folder that Triton or KServe serves, after verifying it.

    The model runs on its golden inputs first, one by one and in one batch. Where answers would
    depend on the batch, the exported configuration allows no batches.

    Example::

        done = fedcore.export_release(
            "digits", "triton", repository="releases", keys="keys", out="models"
        )
        done.folder, done.files, done.max_batch_size

    Args:
        model: The model's name.
        layout: ``triton`` (a model repository), ``kserve`` (the same and an ``InferenceService``)
            or ``plain`` (the ONNX file with its labels, manifest and golden inputs and outputs).
        repository: The folder of the repository.
        keys: The folder of keys; only its ``root.json`` is read.
        out: The folder that gets a new folder of the model's name.
        version: A published version; None for the one that all devices get.
        storage_uri: Where the cluster will find the content of the folder ``storage``; for
            ``kserve`` alone.

    Returns:
        The model's folder and its files.

    Raises:
        ConfigError: the layout, or its storage URI, is not valid.
        ReleaseError: signatures or files don't verify, there is no such version, it does not
            reproduce its golden outputs, or the model's folder exists. Nothing was written.
        DiskFull: the disk is full. Nothing was written.
    """
    return export_model(
        model,
        layout,
        repository=Path(repository),
        keys=Path(keys),
        out=Path(out),
        version=version,
        storage_uri=storage_uri,
    )
