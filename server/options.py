"""Command-line options that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_options(parser: argparse.ArgumentParser) -> None:
    """Adds the run's file and the ``--set`` option."""
    parser.add_argument("config", type=Path, help="the run's TOML file")
    set_option(parser)


def set_option(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--set`` option, which overrides settings of the run's file."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the file, e.g. --set federation.rounds=5; may be repeated",
    )
