"""Shared by the subcommands of ``fedcore provision``: options, passphrase, and output."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedcore.cli import json_option, show
from server.provision import passphrase
from server.provision.authority import Authority
from server.provision.folder import key_is_sealed
from server.provision.kits import MAX_DAYS, IssuedKit


def place(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every subcommand."""
    parser.add_argument(
        "--authority",
        type=Path,
        default=Path("authority"),
        metavar="DIR",
        help="folder of the project's authority, e.g. --authority /srv/authority (default: "
        "%(default)s)",
    )
    json_option(parser)


def signing(parser: argparse.ArgumentParser) -> None:
    """Adds the options of subcommands that may need a passphrase."""
    place(parser)
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help="a file whose first line is the passphrase, or - to be prompted for it (default: "
        f"the environment variable {passphrase.VARIABLE}; then the terminal, when one is "
        "needed)",
    )


def days(default: timedelta) -> dict[str, Any]:
    """Returns the argparse settings of ``--days``, for subcommands that issue a certificate."""
    return {
        "type": validity,
        "default": default.days,
        "metavar": "DAYS",
        "help": f"validity of the certificate in days, e.g. --days 30 (default: {default.days})",
    }


def validity(text: str) -> int:
    """Parses a whole number of days, for argparse."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:5]) <= MAX_DAYS:
        raise argparse.ArgumentTypeError(f"expected 1 to {MAX_DAYS} days, got {text!r}")
    return int(text)


def opened(options: argparse.Namespace, *, signs: bool = False) -> Authority:
    """Returns the authority, with the passphrase if a call must decrypt its key."""
    secret = None
    if signs and key_is_sealed(options.authority):
        secret = passphrase.configured(options.passphrase_file) or passphrase.ask(twice=False)
    return Authority(options.authority, secret)


def out(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--out`` option, the path of the new kit."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file for the kit (default: NAME.kit)"
    )


def described(kit: IssuedKit) -> dict[str, Any]:
    """Returns what ``--json`` prints of a new kit."""
    value = asdict(kit) | {"not_after": moment(kit.not_after), "servers": list(kit.servers)}
    del value["path"]
    return value


def moment(moment: datetime) -> str:
    """Formats a time as ISO 8601, UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def show_server(options: argparse.Namespace, kit: IssuedKit) -> int:
    """Prints a new or renewed server identity."""
    text = (
        f"Server: {kit.path}, valid until {moment(kit.not_after)}\n        {' '.join(kit.servers)}"
    )
    return show(options, text, {**described(kit), "folder": str(kit.path)})
