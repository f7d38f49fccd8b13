"""The command ``fedcore device update``, for a device's owner."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edge_client.model import update_model
from edge_client.options import (
    limits_of,
    limits_options,
    model_option,
    store_option,
    threads_option,
)
from fedcore.cli import Command, show
from fedcore.observability.foreign import say


def _place_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repository",
        metavar="DIR",
        help="folder of the signed repository, e.g. --repository /mnt/releases",
    )
    parser.add_argument(
        "--server",
        metavar="HOST[:PORT]",
        help="the project's server, which delivers releases, e.g. --server fl.example.org "
        "(default port: two above the kit's, such as 9094); needs --kit",
    )
    parser.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="folder of this device's kit, the identity for --server, e.g. --kit kit",
    )
    parser.add_argument(
        "--root",
        type=Path,
        metavar="FILE",
        help=(
            "the root.json to trust, e.g. --root root.json; needed for the first update, which "
            "pins it in the store"
        ),
    )


def _update_arguments(parser: argparse.ArgumentParser) -> None:
    store_option(parser)
    model_option(parser)
    threads_option(parser)
    limits_options(parser)
    _place_options(parser)


def _update(options: argparse.Namespace) -> int:
    done = update_model(
        options.store,
        options.model,
        repository=options.repository,
        server=options.server,
        kit=options.kit,
        root=options.root,
        threads=options.threads,
        limits=limits_of(options),
    )
    if done.clock:
        say(f"warning: {done.clock}", to=sys.stderr)
    if done.damage:
        say(f"warning: the previously installed version was damaged: {done.damage}", to=sys.stderr)
    if not done.changed:
        text = f"{done.model}: version {done.version} is already current"
    else:
        kept = f"; version {done.previous} is kept" if done.previous else ""
        text = (
            f"{done.model}: version {done.version} is active; self-test passed, largest difference "
            f"{done.golden_error:.3g}{kept}"
        )
    value = {
        "model": done.model,
        "version": done.version,
        "previous": done.previous,
        "changed": done.changed,
        "golden_error": done.golden_error,
        "clock": done.clock,
        "damage": done.damage,
    }
    return show(options, text, value)


update = Command(
    "Fetch, verify, self-test and activate the current release of a model.",
    _update_arguments,
    _update,
    "fedcore device update --server fl.example.org --kit kit --root root.json --model digits "
    "--store store",
)
