"""Options that the commands for a repository of releases share."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedcore.cli import json_option


def repository_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for a repository, its keys, and output as JSON."""
    repository_option(parser)
    parser.add_argument(
        "--keys",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the keys, e.g. --keys keys; never within the repository",
    )
    json_option(parser)


def repository_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the folder of a signed repository."""
    parser.add_argument(
        "--repository",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the signed repository, e.g. --repository releases",
    )


def reports_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the folder of devices' reports."""
    parser.add_argument(
        "--reports",
        type=Path,
        default=Path("reports"),
        metavar="DIR",
        help="folder of devices' reports, never within the repository (default: %(default)s)",
    )
