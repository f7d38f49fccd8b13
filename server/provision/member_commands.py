"""Subcommands of ``fedcore provision`` for members: certify, renew, revoke, list."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from fedcore.cli import Command, show
from fedcore.crypto.certificates import MAX_CERTIFICATE_BYTES, MemberRole, certificate_sha256
from fedcore.crypto.issue import MEMBER_VALIDITY, SERVER_VALIDITY, make_request
from fedcore.crypto.keys import fingerprint, new_key, save_key
from fedcore.crypto.kit import KEY, KIT, KitFile, write_kit
from fedcore.crypto.roster import Member
from fedcore.errors import ConfigError
from fedcore.files import name_exists, read_bytes, write_atomic
from fedcore.observability.foreign import say
from server.provision.folder import check_place
from server.provision.issue import SERVER_NAME, listing, provision_member, renew, revoke
from server.provision.options import (
    acting,
    clock,
    days,
    described,
    free,
    moment,
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
    return _certify(options, "device", options.examples)


def _operator(options: argparse.Namespace) -> int:
    return _person(options, "operator")


def _viewer(options: argparse.Namespace) -> int:
    return _person(options, "viewer")


def _certify(options: argparse.Namespace, role: MemberRole, examples: int | None) -> int:
    kit = free(options.out or Path(f"{options.name}.kit"))
    where = str(options.request)
    request = read_bytes(
        options.request,
        max_bytes=MAX_CERTIFICATE_BYTES,
        what="a request",
        otherwise=f"Nothing was issued; create one with `fedcore client enrol {options.name}`.",
    )
    file = provision_member(
        acting(options, signs=True),
        options.name,
        role,
        request,
        where=where,
        validity=options.days,
        num_examples=examples,
    )
    return _show_kit(options, file, kit)


def _person(options: argparse.Namespace, role: MemberRole) -> int:
    folder = options.kit
    if folder is None:
        return _certify(options, role, None)
    if options.out is not None:
        raise ConfigError("--out and --kit exclude each other. Nothing was written.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"{folder}: expected an empty folder, or none. Nothing was written; choose another."
        )
    check_place(folder / KEY)
    key = new_key()
    file = provision_member(
        acting(options, signs=True),
        options.name,
        role,
        make_request(key, options.name),
        where=options.name,
        validity=options.days,
        num_examples=None,
    )
    save_key(folder / KEY, key)
    folder.chmod(0o700)
    write_kit(folder, file)
    said = described(file)
    text = f"{role} {options.name}: {folder}, valid until {said['not_after']}"
    return show(options, text, {**said, "folder": str(folder)})


def _show_kit(options: argparse.Namespace, file: KitFile, kit: Path) -> int:
    write_atomic(kit, file.to_bytes())
    said = described(file)
    text = (
        f"Kit:     {kit}, {said['role']} {said['name']}, valid until {said['not_after']}; it "
        f"contains no secret\nNext:    fedcore client install {kit} --kit DIR --authority "
        f"{said['authority_sha256']}"
    )
    return show(options, text, {**said, "kit": str(kit)})


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
    if options.name == SERVER_NAME:
        lasts = options.days or SERVER_VALIDITY
        return show_server(options, renew(acting(options, signs=True), SERVER_NAME, validity=lasts))
    kit = free(options.out or Path(f"{options.name}.kit"))
    lasts = options.days or MEMBER_VALIDITY
    return _show_kit(options, renew(acting(options, signs=True), options.name, validity=lasts), kit)


def _revoke_arguments(parser: argparse.ArgumentParser) -> None:
    place(parser)
    parser.add_argument("name", metavar="NAME", help="name of the member to revoke")


def _revoke(options: argparse.Namespace) -> int:
    member = revoke(acting(options), options.name)
    text = (
        f"{member.role} {member.name}: revoked. A server that reads this folder's roster refuses "
        "it from now on; copy roster.json to any other server."
    )
    return show(options, text, _row(member, clock()))


def _list(options: argparse.Namespace) -> int:
    found, now = listing(acting(options)), clock()
    rows = [_row(member, now) for member in found.members]
    server = found.server
    value = {
        "project": found.authority.project,
        "authority_sha256": certificate_sha256(found.authority.certificate),
        "not_after": moment(found.authority.certificate.not_valid_after_utc),
        "server": server
        and {
            "serial": server.serial,
            "fingerprint": fingerprint(server.public),
            "not_after": moment(server.not_after),
        },
        "members": rows,
    }
    lines = [f"project {value['project']}, authority valid until {value['not_after']}"]
    if server is None and name_exists(found.authority.server / KEY):
        say(
            f"warning: {found.authority.server}: the server's {KEY} is here, but its {KIT} is "
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
