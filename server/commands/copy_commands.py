"""The commands ``fedcore release push | export``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from fedcore.cli import Command, show
from fedcore.observability.foreign import say
from fedcore.observability.patience import note_if_slow
from fedcore.observability.words import bytes_text, counted
from server.api.copies import export_release, push_release
from server.commands.release_options import repository_options
from server.release.layouts import LAYOUTS


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--to",
        required=True,
        metavar="URL",
        help="address of the bucket, e.g. --to s3://bucket/fleet; credentials come from the "
        "environment or from s3fs' configuration",
    )


def _push(options: argparse.Namespace) -> int:
    def tell(name: str, length: int) -> None:
        say(f"uploading {name} ({bytes_text(length)})", to=sys.stderr, flush=True)

    with note_if_slow("note: comparing the repository with what the bucket has."):
        done = push_release(options.repository, options.keys, to=options.to, on_upload=tell)
    lines = [
        f"{done.to}: {counted(done.files, 'file')} of version {done.version} are there as they "
        f"were signed; {len(done.uploaded)} uploaded, {bytes_text(done.uploaded_bytes)}"
    ]
    lines += [
        f"Repaired:   {name} was another one; find out who may write to the bucket"
        for name in done.repaired
    ]
    if done.unnamed:
        lines.append(
            f"Not needed: {counted(done.unnamed, 'object')} below targets that no metadata names"
        )
    return show(options, "\n".join(lines), asdict(done))


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="name of the model, e.g. --model digits"
    )
    parser.add_argument(
        "--layout",
        required=True,
        choices=LAYOUTS,
        help="what the folder is for: Triton, KServe, or nothing in particular, e.g. --layout "
        "triton",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder that gets a new folder of the model's name, e.g. --out models",
    )
    parser.add_argument(
        "--version",
        type=int,
        metavar="VERSION",
        help="published version, e.g. --version 3 (default: the one that all devices get)",
    )
    parser.add_argument(
        "--storage-uri",
        metavar="URI",
        help="where the cluster will find the content of the folder `storage`, with --layout "
        "kserve alone, e.g. --storage-uri s3://bucket/digits-3",
    )


def _export(options: argparse.Namespace) -> int:
    with note_if_slow("note: verifying the model, and running it on its golden inputs."):
        done = export_release(
            options.model,
            options.layout,
            repository=options.repository,
            keys=options.keys,
            out=options.out,
            version=options.version,
            storage_uri=options.storage_uri,
        )
    manifest = done.manifest
    text = "\n".join(
        [
            f"{done.folder}: {manifest.model} version {manifest.version}, sha256 "
            f"{manifest.onnx.sha256}, at most {counted(done.max_batch_size, 'input')} together",
            *(f"  {name}" for name in done.files),
        ]
    )
    value = {
        "folder": str(done.folder),
        "model": manifest.model,
        "version": manifest.version,
        "sha256": manifest.onnx.sha256,
        "files": list(done.files),
        "max_batch_size": done.max_batch_size,
    }
    return show(options, text, value)


COPY_VERBS = {
    "push": Command(
        "Copy the repository to a bucket, from which devices fetch it over HTTPS.",
        _push_arguments,
        _push,
        "fedcore release push --repository releases --keys keys --to s3://bucket/fleet",
    ),
    "export": Command(
        "Write a released model into a folder that Triton or KServe serves.",
        _export_arguments,
        _export,
        "fedcore release export --repository releases --keys keys --model digits "
        "--layout triton --out models",
    ),
}
