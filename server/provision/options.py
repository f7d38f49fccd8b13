"""Shared by the subcommands of ``fedcore provision``: options, acting user, and output."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.x509 import load_pem_x509_certificate

from fedcore.cli import json_option, show
from fedcore.crypto.certificates import certificate_sha256
from fedcore.crypto.kit import KitFile
from fedcore.errors import ConfigError
from server.provision import passphrase
from server.provision.folder import check_place, key_is_sealed
from server.provision.issue import Act

_MAX_DAYS = 730


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
        "default": default,
        "metavar": "DAYS",
        "help": f"validity of the certificate in days, e.g. --days 30 (default: {default.days})",
    }


def validity(text: str) -> timedelta:
    """Parses a whole number of days, for argparse."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:5]) <= _MAX_DAYS:
        raise argparse.ArgumentTypeError(f"expected 1 to {_MAX_DAYS} days, got {text!r}")
    return timedelta(days=int(text))


def acting(options: argparse.Namespace, *, signs: bool = False) -> Act:
    """Returns the context of an operation, with the passphrase if it must decrypt the key."""
    secret = None
    if signs and key_is_sealed(options.authority):
        secret = passphrase.configured(options.passphrase_file) or passphrase.ask(twice=False)
    return Act(options.authority, _user(), clock(), secret)


def sealing(options: argparse.Namespace, *, twice: bool) -> Act:
    """Returns the context of an operation that encrypts or decrypts a file with a passphrase."""
    secret = passphrase.configured(options.passphrase_file, twice=twice)
    return Act(options.authority, _user(), clock(), secret)


def out(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--out`` option, the path of the new kit."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file for the kit (default: NAME.kit)"
    )


def described(file: KitFile) -> dict[str, Any]:
    """Summarises a new kit for output."""
    certificate = load_pem_x509_certificate(file.certificate.encode())
    _, role, name = (str(part.value) for part in certificate.subject)
    return {
        "name": name,
        "role": role,
        "servers": list(file.servers),
        "serial": f"{certificate.serial_number:x}",
        "not_after": moment(certificate.not_valid_after_utc),
        "authority_sha256": certificate_sha256(load_pem_x509_certificate(file.authority.encode())),
    }


def free(path: Path) -> Path:
    """Returns the path unchanged if a new file can be created there.

    Raises:
        ConfigError: a file exists there.
        ResourceError: no file can be created there.
    """
    if path.exists():
        raise ConfigError(
            f"{path}: this file exists. No certificate was issued; remove it, or choose another "
            "with --out."
        )
    check_place(path)
    return path


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no user database entry, as in some containers
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def clock() -> datetime:
    """Returns the current time, UTC, in whole seconds: the resolution of certificates and logs."""
    return datetime.now(UTC).replace(microsecond=0)


def moment(moment: datetime) -> str:
    """Formats a time as ISO 8601, UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def show_server(options: argparse.Namespace, file: KitFile) -> int:
    """Prints a new or renewed server identity."""
    text = (
        f"Server: {options.authority / 'server'}, valid until {described(file)['not_after']}\n"
        f"        {' '.join(file.servers)}"
    )
    return show(options, text, {**described(file), "folder": str(options.authority / "server")})
