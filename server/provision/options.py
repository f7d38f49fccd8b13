"""What the verbs of ``fedcore provision`` have in common: options, who acts, what is printed."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.x509 import load_pem_x509_certificate

from fedcore.crypto.certificates import certificate_sha256
from fedcore.crypto.kit import KitFile
from fedcore.errors import ConfigError
from fedcore.observability.foreign import say
from server.provision import passphrase
from server.provision.folder import check_place, key_is_sealed
from server.provision.issue import Act

_MAX_DAYS = 730


def place(parser: argparse.ArgumentParser) -> None:
    """Adds what every verb takes."""
    parser.add_argument(
        "--authority",
        type=Path,
        default=Path("authority"),
        metavar="DIR",
        help="folder of the project's authority, as --authority /srv/authority (default: "
        "%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for a machine to read")


def signing(parser: argparse.ArgumentParser) -> None:
    """Adds what verbs take that may need a passphrase."""
    place(parser)
    parser.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help="a file whose first line is the passphrase, or - to be asked for it (default: the "
        f"environment variable {passphrase.VARIABLE}; then the terminal, when one is needed)",
    )


def days(default: timedelta) -> dict[str, Any]:
    """How ``--days`` is added to a verb that issues a certificate."""
    return {
        "type": validity,
        "default": default,
        "metavar": "DAYS",
        "help": f"how long the certificate is valid, as --days 30 (default: {default.days})",
    }


def validity(text: str) -> timedelta:
    """A whole number of days, for argparse."""
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:5]) <= _MAX_DAYS:
        raise argparse.ArgumentTypeError(f"expected 1 to {_MAX_DAYS} days, got {text!r}")
    return timedelta(days=int(text))


def acting(options: argparse.Namespace, *, signs: bool = False) -> Act:
    """Who acts, and the passphrase when the verb signs and the key needs one."""
    secret = None
    if signs and key_is_sealed(options.authority):
        secret = passphrase.given(options.passphrase_file) or passphrase.ask(twice=False)
    return Act(options.authority, _user(), clock(), secret)


def sealing(options: argparse.Namespace, *, twice: bool) -> Act:
    """As `acting`, for a verb that seals or opens a file of its own."""
    secret = passphrase.given(options.passphrase_file, twice=twice)
    return Act(options.authority, _user(), clock(), secret)


def out(parser: argparse.ArgumentParser) -> None:
    """Adds where a kit is written."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the kit goes (default: NAME.kit)"
    )


def described(file: KitFile) -> dict[str, Any]:
    """What a kit just made says, for people and machines."""
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
    """The path itself.

    Raises:
        ConfigError: something is there.
        ResourceError: nothing can be made there.
    """
    if path.exists():
        raise ConfigError(
            f"{path}: this file exists. No certificate was issued; remove it, or name another with "
            "--out."
        )
    check_place(path)
    return path


def show(options: argparse.Namespace, text: str, value: Any) -> int:
    """Prints for people or for machines; returns the exit code."""
    say(json.dumps(value, indent=2) if options.json else text)
    return 0


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no entry in the user database, as in some containers
        name = f"uid {os.getuid()}"
    return f"{name}@{socket.gethostname()}"


def clock() -> datetime:
    """The time, UTC, to the second: certificates and logs know no smaller unit."""
    return datetime.now(UTC).replace(microsecond=0)


def moment(moment: datetime) -> str:
    """A moment as ISO 8601, UTC."""
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def show_server(options: argparse.Namespace, file: KitFile) -> int:
    """Prints a server's identity that was just made or renewed."""
    text = (
        f"Server: {options.authority / 'server'}, valid until {described(file)['not_after']}\n"
        f"        {' '.join(file.servers)}"
    )
    return show(options, text, {**described(file), "folder": str(options.authority / "server")})
