"""Subcommands of ``fedcore provision`` for members: certify, renew, revoke, list."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcore.cli import Command, show
from fedcore.crypto.issue import MEMBER_VALIDITY, SERVER_VALIDITY
from fedcore.crypto.keys import fingerprint
from fedcore.crypto.kit import KEY, KIT
from fedcore.crypto.roster import Member
from fedcore.files import name_exists
from fedcore.observability.foreign import say
from server.provision.folder import SERVER
from server.provision.issue import SERVER_NAME
from server.provision.kits import IssuedKit, clock
from server.provision.options import (
    days,
    described,
    moment,
    opened,
    out,
    place,
    show_server,
    signing,
    validity,
)


def _device_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument(
        "name", metavar="NAME", help="name of the device, e.g. edge-017; unique in the project"
    )
    parser.add_argument(
        "--request",
        type=Path,
        required=True,
        metavar="FILE",
        help=(
            "file created by `fedcore client enrol NAME` on the device, e.g. --request request.pem"
        ),
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=(
            "fixed weight of its updates, e.g. --examples 600 (default: the same as any other "
            "device)"
        ),
    )
    parser.add_argument("--days", **days(MEMBER_VALIDITY))
    out(parser)


def _person_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument(
        "name", metavar="NAME", help="name of the person, e.g. anna; unique in the project"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--request",
        type=Path,
        metavar="FILE",
        help="file created by `fedcore client enrol NAME` on that person's machine",
    )
    where.add_argument(
        "--kit",
        type=Path,
        metavar="DIR",
        help="create the key in this folder, for a person who works on this machine",
    )
    parser.add_argument("--days", **days(MEMBER_VALIDITY))
    out(parser)


def _device(options: argparse.Namespace) -> int:
    kit = opened(options, signs=True).add_device(
        options.name,
        options.request,
        num_examples=options.examples,
        days=options.days,
        out=options.out,
    )
    return _show_kit(options, kit)


def _operator(options: argparse.Namespace) -> int:
    return _person(options, opened(options, signs=True).add_operator)


def _viewer(options: argparse.Namespace) -> int:
    return _person(options, opened(options, signs=True).add_viewer)


def _person(options: argparse.Namespace, add: Callable[..., IssuedKit]) -> int:
    kit = add(
        options.name,
        request=options.request,
        kit=options.kit,
        days=options.days,
        out=options.out,
    )
    if options.kit is None:
        return _show_kit(options, kit)
    text = f"{kit.role} {kit.name}: {kit.path}, valid until {moment(kit.not_after)}"
    return show(options, text, {**described(kit), "folder": str(kit.path)})


def _show_kit(options: argparse.Namespace, kit: IssuedKit) -> int:
    text = (
        f"Kit:     {kit.path}, {kit.role} {kit.name}, valid until {moment(kit.not_after)}; it "
        f"contains no secret\nNext:    fedcore client install {kit.path} --kit DIR --authority "
        f"{kit.authority_sha256}"
    )
    return show(options, text, {**described(kit), "kit": str(kit.path)})


def _renew_arguments(parser: argparse.ArgumentParser) -> None:
    signing(parser)
    parser.add_argument("name", metavar="NAME", help=f"name of a member, or {SERVER_NAME}")
    parser.add_argument(
        "--days",
        type=validity,
        metavar="DAYS",
        help="validity of the certificate in days, e.g. --days 30 (default: "
        f"{MEMBER_VALIDITY.days}, the server's {SERVER_VALIDITY.days})",
    )
    out(parser)


def _renew(options: argparse.Namespace) -> int:
    kit = opened(options, signs=True).renew(options.name, days=options.days, out=options.out)
    return (show_server if kit.role == "server" else _show_kit)(options, kit)


def _revoke_arguments(parser: argparse.ArgumentParser) -> None:
    place(parser)
    parser.add_argument("name", metavar="NAME", help="name of the member to revoke")


def _revoke(options: argparse.Namespace) -> int:
    member = opened(options).revoke(options.name)
    text = (
        f"{member.role} {member.name}: revoked. A server that reads this folder's roster refuses "
        "it from now on; copy roster.json to any other server."
    )
    return show(options, text, _row(member, clock()))


def _list(options: argparse.Namespace) -> int:
    found, now = opened(options).members(), clock()
    rows = [_row(member, now) for member in found.members]
    server = found.server
    value = {
        "project": found.project,
        "authority_sha256": found.authority_sha256,
        "not_after": moment(found.not_after),
        "server": server
        and {
            "serial": server.serial,
            "fingerprint": fingerprint(server.public),
            "not_after": moment(server.not_after),
        },
        "members": rows,
    }
    lines = [f"project {value['project']}, authority valid until {value['not_after']}"]
    place_of_server = options.authority / SERVER
    if server is None and name_exists(place_of_server / KEY):
        say(
            f"warning: {place_of_server}: the server's {KEY} is here, but its {KIT} is "
            "missing: restore it from a backup, or create both again with `fedcore provision "
            "server HOST --replace`",
            to=sys.stderr,
        )
    if server:
        lines.append(f"{SERVER_NAME:<24} {'server':<9} valid until {moment(server.not_after)}")
    lines += [
        f"{row['name']:<24} {row['role']:<9} {row['state']:<9} until {row['not_after']}  "
        f"{row['fingerprint'][:16]}"
        for row in rows
    ]
    return show(options, "\n".join(lines), value)


def _row(member: Member, now: datetime) -> dict[str, Any]:
    expired = "in force" if member.in_force(now) else "expired"
    return {
        "name": member.name,
        "role": member.role,
        "state": "revoked" if member.revoked_at else expired,
        "not_after": moment(member.not_after),
        "revoked_at": member.revoked_at and moment(member.revoked_at),
        "num_examples": member.num_examples,
        "serial": member.serial,
        "fingerprint": member.fingerprint,
    }


MEMBER_VERBS = {
    "device": Command(
        "Issue a kit for a device's request.",
        _device_arguments,
        _device,
        "fedcore provision device edge-017 --request request.pem --examples 600",
    ),
    "operator": Command(
        "Issue a kit for a person who may control the server.",
        _person_arguments,
        _operator,
        "fedcore provision operator anna --kit anna",
    ),
    "viewer": Command(
        "Issue a kit for a person who may only view the server.",
        _person_arguments,
        _viewer,
        "fedcore provision viewer bruno --request bruno.pem",
    ),
    "revoke": Command(
        "Revoke a member's certificate.",
        _revoke_arguments,
        _revoke,
        "fedcore provision revoke edge-017",
    ),
    "renew": Command(
        "Issue a new certificate for the same key.",
        _renew_arguments,
        _renew,
        "fedcore provision renew edge-017 --days 90",
    ),
    "list": Command(
        "List everyone who ever had a certificate.",
        place,
        _list,
        "fedcore provision list --json",
    ),
}
