"""Options that several verbs have."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_options(parser: argparse.ArgumentParser) -> None:
    """Which run: its file, and what to override in it."""
    parser.add_argument("config", type=Path, help="the run's TOML file")
    set_option(parser)


def set_option(parser: argparse.ArgumentParser) -> None:
    """What to override in a run's file."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the file, e.g. --set federation.rounds=5; may be repeated",
    )
