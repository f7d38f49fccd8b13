"""The command ``fedcore release serve``: delivers a repository to the devices of a project."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from fedcore.cli import Command
from fedcore.crypto.roster import check_server_folder, load_server_identity
from fedcore.errors import ConfigError
from fedcore.observability.foreign import say
from fedcore.rpc.tls import require_tls_1_3, silence_grpc_core
from server.commands.release_options import reports_option, repository_option
from server.options import listen_address

log = logging.getLogger("fedcore.server")


def _arguments(parser: argparse.ArgumentParser) -> None:
    repository_option(parser)
    parser.add_argument(
        "--identity",
        type=Path,
        default=Path("authority/server"),
        metavar="DIR",
        help="folder created by `fedcore provision server` (default: %(default)s)",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="address on which devices connect, e.g. --listen 0.0.0.0:9094 (default: every "
        "address, and the port two above the one in the kits)",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="DIR",
        help="folder of the online keys, e.g. --keys keys: with it, a version on trial is rolled "
        "back when devices report that they could not keep it",
    )
    parser.add_argument(
        "--push",
        metavar="URL",
        help="address of a bucket that gets a copy now and after each change of the repository, "
        "e.g. --push s3://bucket/fleet; needs --keys",
    )
    reports_option(parser)
    parser.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="file for the log, rotated at 10 MiB, the last six kept, e.g. --log releases.log "
        "(default: standard error)",
    )


def _serve(options: argparse.Namespace) -> int:
    if options.push and options.keys is None:
        raise ConfigError(
            "--push needs --keys: the root in that folder shows whether the repository is the one "
            "to push. Nothing was started; name both."
        )
    check_server_folder(options.identity)
    require_tls_1_3()
    silence_grpc_core()
    from fedcore.observability.lines import log_lines
    from server.delivery.bucket_copy import copied_to_bucket
    from server.delivery.reports import TrialJudge, book_of
    from server.delivery.serve import (
        DeliveryAddress,
        default_port,
        serve_until_stopped,
    )

    log_lines(options.log or sys.stderr)
    identity = load_server_identity(options.identity)
    host, port = "0.0.0.0", None  # noqa: S104
    if options.listen:
        host, port = listen_address(options.listen)
    address = DeliveryAddress(host, default_port(identity) if port is None else port)

    def started(bound: int) -> None:
        say(f"Delivering {options.repository} on port {bound}; Ctrl-C stops.", flush=True)

    with (
        copied_to_bucket(options.repository, options.keys, options.push)
        if options.push
        else nullcontext()
    ):
        serve_until_stopped(
            identity,
            options.repository,
            address,
            on_report=TrialJudge(
                book_of(options.reports, options.repository), options.repository, options.keys
            ),
            started=started,
        )
    return 0


serve = Command(
    "Deliver the repository to the project's devices, until stopped.",
    _arguments,
    _serve,
    "fedcore release serve --repository releases --identity authority/server",
)
