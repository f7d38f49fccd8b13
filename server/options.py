"""Command-line options that several subcommands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedcore.errors import ConfigError


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


def listen_address(text: str) -> tuple[str, int]:
    """Parses the value of ``--listen``, ``HOST:PORT``.

    Raises:
        ConfigError: it is not of that form.
    """
    host, separator, port = text.rpartition(":")
    digits = port.isascii() and port.isdecimal() and len(port) <= 5
    name = host.strip("[]")
    if not separator or not name or not digits or int(port) >= 2**16:
        raise ConfigError(
            f"--listen {text}: expected HOST:PORT, e.g. 0.0.0.0:9092 or [::]:9092 for every "
            "address. Nothing was started."
        )
    return name, int(port)
