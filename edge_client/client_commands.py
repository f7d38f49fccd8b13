"""The commands ``fedcore client enrol | install | start``: join a project and train."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from edge_client.agent.commands import start
from edge_client.enrol import enrol, install
from fedcore.cli import Command, group, json_option, show
from fedcore.crypto.certificates import certificate_sha256


def _kit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kit",
        type=Path,
        required=True,
        metavar="DIR",
        help="where this machine keeps its key and kit, as --kit /var/lib/fedcore/kit",
    )
    json_option(parser)


def _enrol_arguments(parser: argparse.ArgumentParser) -> None:
    _kit(parser)
    parser.add_argument("name", metavar="NAME", help="as edge-017; unique in the project")


def _enrol(options: argparse.Namespace) -> int:
    done = enrol(options.kit, options.name)
    text = (
        f"Key:     made in {options.kit}, where it stays\n"
        f"Request: {done.request}; send it to the operator, who answers with a kit\n"
        f"SHA-256: {done.fingerprint} (of the key)"
    )
    value = {"request": str(done.request), "fingerprint": done.fingerprint}
    return show(options, text, value)


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    _kit(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="what the operator sent back")
    parser.add_argument(
        "--authority",
        metavar="SHA256",
        help="the authority's fingerprint as the operator told it, on another way than the kit "
        "came; without it, whoever brings the kit is trusted",
    )


def _install(options: argparse.Namespace) -> int:
    now = datetime.now(UTC)
    kit = install(options.kit, options.file, authority_sha256=options.authority, now=now)
    subject, sha256 = kit.subject, certificate_sha256(kit.authority)
    checked = "as told" if options.authority else "compare it with what the operator tells you"
    text = (
        f"Installed: {subject.role} {subject.name} of project {subject.project}, valid until "
        f"{subject.not_after:%Y-%m-%d}\n"
        f"Server:    {' '.join(kit.file.servers)}\n"
        f"Authority: {sha256} ({checked})"
    )
    value = {
        "name": subject.name,
        "role": subject.role,
        "project": subject.project,
        "servers": list(kit.file.servers),
        "not_after": f"{subject.not_after:%Y-%m-%dT%H:%M:%SZ}",
        "authority_sha256": sha256,
    }
    return show(options, text, value)


client = group(
    {
        "enrol": Command(
            "Make this machine's key, and a request for the operator.",
            _enrol_arguments,
            _enrol,
            "fedcore client enrol edge-017 --kit kit",
        ),
        "install": Command(
            "Take the kit that the operator sent back, or a renewed one.",
            _install_arguments,
            _install,
            "fedcore client install edge-017.kit --kit kit --authority 3f9a...",
        ),
        "start": start,
    },
    "Take part in a project: enrol this machine, install its kit, train.",
)
