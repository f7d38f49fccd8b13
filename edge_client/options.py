"""Options that several commands of a device have: store, model, threads and limits."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_client.inference.process import (
    MAX_MEMORY_BYTES,
    MAX_SECONDS,
    MIN_MEMORY_BYTES,
    MIN_SECONDS,
    ModelLimits,
)
from fedcore.cli import json_option
from fedcore.config.run import Serving

_MAX_THREADS = 256


def store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        type=Path,
        required=True,
        metavar="DIR",
        help="this device's folder, e.g. --store /var/lib/fedcore",
    )
    json_option(parser)


def model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="name of the model, e.g. --model digits"
    )


def threads_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=_thread_count,
        default=Serving().threads,
        metavar="N",
        help="threads per inference, e.g. --threads 2 (default: %(default)s)",
    )


def _thread_count(text: str) -> int:
    if not text.isdecimal() or len(text) > 4 or not 1 <= int(text) <= _MAX_THREADS:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1 to {_MAX_THREADS}, got {text!r}"
        )
    return int(text)


def limits_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-seconds",
        type=_seconds,
        default=ModelLimits().seconds,
        metavar="S",
        help=(
            "time limit of the model's process, in seconds, e.g. --max-seconds 600 (default: "
            "%(default)g)"
        ),
    )
    parser.add_argument(
        "--max-memory-mib",
        type=_memory,
        metavar="MIB",
        help="address space that the model may use, e.g. --max-memory-mib 4096 (default: 1024, "
        "160 per thread, and six times the model's file)",
    )


def limits_of(options: argparse.Namespace) -> ModelLimits:
    mib = options.max_memory_mib
    return ModelLimits(seconds=options.max_seconds, memory_bytes=mib and mib << 20)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(
            f"expected {MIN_SECONDS:g} to {MAX_SECONDS:g} seconds, got {text!r}"
        )
    return seconds


def _memory(text: str) -> int:
    least, most = MIN_MEMORY_BYTES >> 20, MAX_MEMORY_BYTES >> 20
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected {least} to {most} MiB, got {text!r}")
    return int(text)
