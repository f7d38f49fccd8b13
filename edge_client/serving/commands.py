"""The command ``fedcore device serve``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from edge_client.serving.access import open_access
from edge_client.serving.batching import QueueLimits
from fedcore.cli import Command
from fedcore.config.run import Serving
from fedcore.observability.foreign import say
from fedcore.observability.lines import log_lines
from fedcore.rpc.tls import require_tls_1_3

_MAX_PORT = 65_535


def _whole(least: int, most: int, text: str) -> int:
    if not text.isdecimal() or len(text) > 12 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from {least} to {most}, got {text!r}"
        )
    return int(text)


def _port(text: str) -> int:
    return _whole(0, _MAX_PORT, text)


def _rows(text: str) -> int:
    return _whole(1, 64, text)


def _requests(text: str) -> int:
    return _whole(1, 100_000, text)


def _threads(text: str) -> int:
    return _whole(1, 256, text)


def _mib(text: str) -> int:
    return _whole(1, 1024, text)


def _delay(text: str) -> float:
    return _whole(0, 1_000_000, text) / 1e6


def _arguments(parser: argparse.ArgumentParser) -> None:
    _place_arguments(parser)
    _limit_arguments(parser)


def _place_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        type=Path,
        required=True,
        metavar="DIR",
        help="this device's folder, e.g. --store /var/lib/fedcore",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="models to serve, e.g. --model digits (default: all that are installed)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="HOST",
        help="address to listen on, e.g. --host 0.0.0.0, which needs --kit (default: %(default)s)",
    )
    for name, port in (("http", 8000), ("grpc", 8001)):
        parser.add_argument(
            f"--{name}-port",
            type=_port,
            default=port,
            metavar="PORT",
            help=f"port for {name}, e.g. --{name}-port {port + 1000}; 0 for any that is free "
            "(default: %(default)s)",
        )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="folder made by `fedcore provision server`, e.g. --kit authority/server: TLS, and "
        "callers need a certificate of the same authority",
    )


def _limit_arguments(parser: argparse.ArgumentParser) -> None:
    limits = QueueLimits()
    parser.add_argument(
        "--threads",
        type=_threads,
        default=Serving().threads,
        metavar="N",
        help="threads per inference, e.g. --threads 2 (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch",
        type=_rows,
        default=limits.max_batch,
        metavar="N",
        help="most rows that run together, e.g. --max-batch 16; 1 runs each request by itself "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-queue",
        type=_requests,
        default=limits.max_queue,
        metavar="N",
        help="most requests that wait for a model, e.g. --max-queue 64; others are refused "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--max-delay-us",
        type=_delay,
        dest="max_delay_s",
        default=limits.max_delay_s,
        metavar="US",
        help="microseconds that a request may wait for others to run with, e.g. --max-delay-us 500 "
        "(default: 0, which runs what is waiting)",
    )
    parser.add_argument(
        "--max-request-mib",
        type=_mib,
        default=16,
        metavar="MIB",
        help="longest request in MiB, e.g. --max-request-mib 64 (default: %(default)s)",
    )


def _run(options: argparse.Namespace) -> int:
    access = open_access(options.host, options.kit)
    if options.kit is not None:
        require_tls_1_3()
    from edge_client.serving.opening import opener  # imports gRPC and onnxruntime
    from edge_client.serving.run import Addresses, ServeSettings, serve

    log_lines(sys.stderr, throttled=True)
    settings = ServeSettings(
        store=options.store,
        names=tuple(dict.fromkeys(options.model)) if options.model else None,
        host=options.host,
        grpc_port=options.grpc_port,
        http_port=options.http_port,
        limits=QueueLimits(
            max_batch=options.max_batch,
            max_queue=options.max_queue,
            max_delay_s=options.max_delay_s,
        ),
        max_request_bytes=options.max_request_mib << 20,
    )

    def started(addresses: Addresses) -> None:
        say(f"serving at {addresses.http} (page, HTTP) and {addresses.grpc} (gRPC)", flush=True)

    asyncio.run(
        serve(
            settings,
            access,
            opener(threads=options.threads, max_batch=options.max_batch),
            started=started,
        )
    )
    return 0


serve_command = Command(
    "Answer other programs over gRPC and HTTP, and show a page to try models.",
    _arguments,
    _run,
    "fedcore device serve --store store --model digits",
)
