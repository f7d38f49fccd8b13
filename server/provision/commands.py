"""Subcommand ``fedcore provision``, for the operator of a project."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fedcore.cli import Command, group, show
from fedcore.crypto.issue import SERVER_VALIDITY
from fedcore.errors import ConfigError
from fedcore.observability.words import counted
from server.provision import passphrase
from server.provision.authority import (
    DEFAULT_PORT,
    Authority,
    create_authority,
    restore_authority,
)
from server.provision.member_commands import MEMBER_VERBS
from server.provision.options import days, moment, opened, show_server, signing


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument(
        "--project",
        required=True,
        metavar="NAME",
        help="name of the project, stored in every certificate, e.g. --project orchard",
    )


def _init(options: argparse.Namespace) -> int:
    secret = passphrase.configured(options.passphrase_file, twice=True)
    authority = create_authority(options.authority, options.project, passphrase=secret)
    made, sealed = authority.members(), secret is not None
    keep = "encrypted" if sealed else "not encrypted: keep the folder where nobody else can read it"
    text = (
        f"Authority: {options.authority}, project {options.project}, "
        f"valid until {moment(made.not_after)}\n"
        f"SHA-256:   {made.authority_sha256}\n"
        f"Key:       {keep}\n"
        "Next:      fedcore provision server HOST"
    )
    value = {
        "authority": str(options.authority),
        "project": options.project,
        "authority_sha256": made.authority_sha256,
        "not_after": moment(made.not_after),
        "sealed": sealed,
    }
    return show(options, text, value)


def _server_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument(
        "hosts",
        nargs="+",
        metavar="HOST",
        help="names and addresses at which devices reach the server, the preferred first",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=DEFAULT_PORT,
        metavar="N",
        help="port on which it listens, e.g. --port 443 (default: %(default)s)",
    )
    parser.add_argument("--days", **days(SERVER_VALIDITY))
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace the server's present key and certificate with new ones",
    )


def _server(options: argparse.Namespace) -> int:
    if not 1 <= options.port < 2**16:
        raise ConfigError(
            f"--port {options.port}: expected a port from 1 to 65535. Nothing was created."
        )
    kit = opened(options, signs=True).add_server(
        options.hosts, port=options.port, days=options.days, replace=options.replace
    )
    return show_server(options, kit)


def _sign(options: argparse.Namespace) -> int:
    signed = opened(options, signs=True).sign_roster()
    text = (
        f"Signed:  {options.authority}, version {signed.version} of the roster, by key "
        f"{signed.signer}\nNext:    copy roster.json to the server's machine, if that is another "
        "one"
    )
    return show(options, text, asdict(signed))


def _file_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="the encrypted file")


def _backup(options: argparse.Namespace) -> int:
    secret = passphrase.configured(options.passphrase_file, twice=True)
    Authority(options.authority, secret).backup(options.file)
    text = f"Backup: {options.file}, encrypted; keep it and its passphrase in two places"
    return show(options, text, {"file": str(options.file)})


def _restore_arguments(parser: argparse.ArgumentParser) -> None:
    _file_arguments(parser)
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace the present folder, which is kept under another name",
    )


def _restore(options: argparse.Namespace) -> int:
    secret = passphrase.configured(options.passphrase_file)
    done = restore_authority(
        options.file, options.authority, passphrase=secret, replace=options.replace
    )
    newer = " (the folder's own roster was newer and was kept)" if done.roster == "folder" else ""
    before = f"\nBefore:   {done.before}" if done.before else ""
    members = counted(done.members, "member")
    text = f"Restored: {options.authority}, project {done.project}, {members}{newer}"
    value = {
        "authority": str(options.authority),
        "project": done.project,
        "members": done.members,
        "roster": done.roster,
        "before": done.before and str(done.before),
        "caution": done.caution,
    }
    caution = f"\nCaution:  {done.caution}" if done.caution else ""
    return show(options, text + before + caution, value)


provision = group(
    {
        "init": Command(
            "Create the authority of a new project.",
            _init_arguments,
            _init,
            "fedcore provision init --project orchard --passphrase-file -",
        ),
        "server": Command(
            "Create the server's key and certificate for its names and addresses.",
            _server_arguments,
            _server,
            "fedcore provision server fl.example.org 10.0.0.5 --port 9092",
        ),
        **MEMBER_VERBS,
        "sign": Command(
            "Create a new key for rosters, and sign the current roster with it.",
            signing,
            _sign,
            "fedcore provision sign --passphrase-file -",
        ),
        "backup": Command(
            "Write the whole authority to one encrypted file.",
            _file_arguments,
            _backup,
            "fedcore provision backup authority.sealed --passphrase-file -",
        ),
        "restore": Command(
            "Verify and restore an authority from an encrypted backup.",
            _restore_arguments,
            _restore,
            "fedcore provision restore authority.sealed --passphrase-file -",
        ),
    },
    "Manage a project's authority: who takes part, in which role, until when.",
)
