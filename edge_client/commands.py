"""The commands ``fedcore device update | infer | status | bench``, for a device's owner."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from edge_client.delivery import store as installed
from edge_client.delivery.clock import stale_since
from edge_client.delivery.store import Installed
from edge_client.inference.answers import answer_lines, answers
from edge_client.inference.bench import bench
from edge_client.inference.confined import MAX_RUNS, predict
from edge_client.inference.inputs import parse_inputs, read_text
from edge_client.inference.tuning import remembered
from edge_client.options import (
    limits_of,
    limits_options,
    model_option,
    store_option,
    threads_option,
)
from edge_client.serving.commands import serve_command
from edge_client.update_commands import run, update
from fedcore.artifacts.golden import parse_golden
from fedcore.cli import Command, group, show
from fedcore.errors import DeviceError, DigestMismatch
from fedcore.observability.foreign import say
from fedcore.observability.words import counted


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or not 1 <= int(text) <= MAX_RUNS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {MAX_RUNS}, got {text!r}"
        )
    return int(text)


def _infer_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    threads_option(parser)
    limits_options(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="one input or a list of inputs as JSON, e.g. --input x.json; - reads it from standard "
        "input",
    )


def _infer(options: argparse.Namespace) -> int:
    version = _serving(options.store, options.model)
    inputs = parse_inputs(read_text(options.input), version.manifest, where=options.input)
    outputs = predict(
        version.manifest, version.path, inputs, threads=options.threads, limits=limits_of(options)
    )
    lines = (answer_lines if options.json else answers)(version.manifest, outputs)
    for line in lines:
        say(line)
    return 0


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)


def _status(options: argparse.Namespace) -> int:
    rows = [_row(options.store, model) for model in installed.models(options.store)]
    text = "\n".join(map(_line, rows)) or f"{options.store}: no model is installed"
    show(options, text, rows)
    return 0 if all(row["version"] for row in rows) else DigestMismatch.exit_code


def _row(store: Path, model: str) -> dict[str, Any]:
    try:
        version = installed.serving(store, model)
    except (DeviceError, DigestMismatch) as error:
        return {"model": model, "version": None, "damage": str(error)}
    manifest = version.manifest
    tuned = version.tuning and remembered(version.tuning, manifest.onnx.sha256)
    return {
        "model": model,
        "version": manifest.version,
        "created": manifest.created,
        "candidate": manifest.lineage.candidate,
        "bytes": manifest.onnx.length,
        "sha256": manifest.onnx.sha256,
        "epsilon": manifest.privacy.epsilon,
        "damage": version.damage,
        "tuned": tuned and tuned.model_dump(),
        "stale_since": stale_since(store / "trust"),
    }


def _line(row: dict[str, Any]) -> str:
    if row["version"] is None:
        return f"{row['model']}: no version can be served: {row['damage']}"
    tuned = row["tuned"]
    how = (
        f"\n  fastest here: {counted(tuned['threads'], 'thread')} on {tuned['provider']}, "
        f"{tuned['p50_us']:.1f} us"
        if tuned
        else ""
    )
    damaged = f"\n  the active version cannot be served: {row['damage']}" if row["damage"] else ""
    if row["stale_since"]:
        damaged += f"\n  stale: not confirmed as the newest since {row['stale_since']}"
    return (
        f"{row['model']}: version {row['version']} of {row['created']} serves, {row['candidate']}, "
        f"{row['bytes']} bytes, sha256 {row['sha256']}{how}{damaged}"
    )


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    limits_options(parser)
    parser.add_argument(
        "--runs",
        type=_count,
        default=2000,
        metavar="N",
        help="timed inferences, e.g. --runs 10000 (default: %(default)s)",
    )


def _bench(options: argparse.Namespace) -> int:
    version = _serving(options.store, options.model)
    inputs = parse_golden(version.golden).inputs
    figures = bench(
        version.manifest, version.path, inputs, runs=options.runs, limits=limits_of(options)
    )
    text = (
        f"{options.model}: version {version.manifest.version}, batch 1, 1 thread, "
        f"{counted(options.runs, 'run')}: p50 {figures.p50_us:.1f} us, p99 {figures.p99_us:.1f} us"
    )
    value = {
        "model": options.model,
        "version": version.manifest.version,
        "threads": 1,
        "runs": options.runs,
        "p50_us": figures.p50_us,
        "p99_us": figures.p99_us,
    }
    return show(options, text, value)


def _serving(store: Path, model: str) -> Installed:
    """Returns the version that serves; warns on standard error if it is not the active one."""
    version = installed.serving(store, model)
    if version.damage:
        say(
            f"warning: version {version.manifest.version} serves instead of the active one: "
            f"{version.damage}",
            to=sys.stderr,
        )
    return version


device = group(
    {
        "update": update,
        "run": run,
        "infer": Command(
            "Answer inputs with the installed model.",
            _infer_arguments,
            _infer,
            "fedcore device infer --store store --model digits --input x.json",
        ),
        "status": Command(
            "Show which versions serve, and whether they are intact.",
            _status_arguments,
            _status,
            "fedcore device status --store store --json",
        ),
        "bench": Command(
            "Time single-thread inference on the golden inputs, one at a time.",
            _bench_arguments,
            _bench,
            "fedcore device bench --store store --model digits",
        ),
        "serve": serve_command,
    },
    "Serve released models on this device.",
)
