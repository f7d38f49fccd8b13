"""The commands ``fedcore client enrol | install | start``: join a project and train."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_client.agent.commands import start
from edge_client.enrol import enrol, install_kit
from fedcore.cli import Command, group, json_option, show


def _kit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kit",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for this machine's key and kit, e.g. --kit /var/lib/fedcore/kit",
    )
    json_option(parser)


def _enrol_arguments(parser: argparse.ArgumentParser) -> None:
    _kit(parser)
    parser.add_argument(
        "name", metavar="NAME", help="name of this machine, e.g. edge-017; unique in the project"
    )


def _enrol(options: argparse.Namespace) -> int:
    done = enrol(options.kit, options.name)
    text = (
        f"Key:     created in {options.kit}; never send it to anyone\nRequest: {done.request}; "
        f"send it to the operator, who sends back a kit\nSHA-256: {done.fingerprint} (of the key)"
    )
    value = {"request": str(done.request), "fingerprint": done.fingerprint}
    return show(options, text, value)


def _install_arguments(parser: argparse.ArgumentParser) -> None:
    _kit(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="kit file from the operator")
    parser.add_argument(
        "--authority",
        metavar="SHA256",
        help="the authority's fingerprint, received from the operator over another channel than "
        "the kit; without it, the source of the kit is trusted unchecked",
    )


def _install(options: argparse.Namespace) -> int:
    kit = install_kit(options.kit, options.file, authority_sha256=options.authority)
    checked = "as given" if options.authority else "compare it with the operator's"
    text = (
        f"Installed: {kit.role} {kit.name} of project {kit.project}, valid until "
        f"{kit.not_after:%Y-%m-%d}\n"
        f"Server:    {' '.join(kit.servers)}\n"
        f"Authority: {kit.authority_sha256} ({checked})"
    )
    value = {
        "name": kit.name,
        "role": kit.role,
        "project": kit.project,
        "servers": list(kit.servers),
        "not_after": f"{kit.not_after:%Y-%m-%dT%H:%M:%SZ}",
        "authority_sha256": kit.authority_sha256,
    }
    return show(options, text, value)


client = group(
    {
        "enrol": Command(
            "Create this machine's key, and a request for the operator.",
            _enrol_arguments,
            _enrol,
            "fedcore client enrol edge-017 --kit kit",
        ),
        "install": Command(
            "Install the kit that the operator sent back, or a renewed one.",
            _install_arguments,
            _install,
            "fedcore client install edge-017.kit --kit kit --authority 3f9a...",
        ),
        "start": start,
    },
    "Take part in a project: enrol this machine, install its kit, train.",
)
