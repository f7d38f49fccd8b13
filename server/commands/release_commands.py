"""Subcommand ``fedcore release``, for publishers and their timers."""

from __future__ import annotations

import argparse

from fedcore.artifacts.manifest import Manifest
from fedcore.cli import Command, group, show
from server.api.releases import (
    ROLE_GROUPS,
    create_repository,
    list_releases,
    refresh_repository,
    roll_back,
    rotate_keys,
)
from server.commands.channel_commands import CHANNEL_VERBS
from server.commands.copy_commands import COPY_VERBS
from server.commands.drift_command import drift_command
from server.commands.release_options import repository_options
from server.commands.serve_command import serve
from server.release.registry.keys import ROLES


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a model that may be published with the online keys, e.g. --model digits; repeat "
        "for more (default: any)",
    )
    _threshold(parser, "number of keys of a role (default: one each)")


def _threshold(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--threshold",
        action="append",
        type=_role_threshold,
        default=[],
        metavar="ROLE=K/N",
        help=f"{what}, e.g. --threshold root=2/3 for three keys of which two must sign; roles: "
        f"{', '.join(ROLES)}; repeat for more",
    )


def _role_threshold(text: str) -> tuple[str, tuple[int, int]]:
    role, _, numbers = text.partition("=")
    threshold, _, keys = numbers.partition("/")
    if role not in ROLES or not _is_number(threshold) or not _is_number(keys):
        raise argparse.ArgumentTypeError(
            f"expected ROLE=K/N with a role of {', '.join(ROLES)}, e.g. root=2/3, got {text!r}"
        )
    return role, (int(threshold), int(keys))


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 19


def _init(options: argparse.Namespace) -> int:
    made = create_repository(
        options.repository, options.keys, models=options.model, thresholds=dict(options.threshold)
    )
    text = (
        f"Repository: {options.repository}\n"
        f"Keys:       {options.keys}/online publish; move {options.keys}/offline to storage that "
        "is not connected\n"
        f"Devices:    give each {made.root} over a channel that its owner trusts"
    )
    value = {
        "repository": str(options.repository),
        "keys": str(options.keys),
        "root": str(made.root),
    }
    return show(options, text, value)


def _rollback_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="name of the model, e.g. --model digits"
    )
    parser.add_argument(
        "--to",
        type=int,
        required=True,
        metavar="VERSION",
        help="older version to publish again, e.g. --to 3",
    )


def _rollback(options: argparse.Namespace) -> int:
    manifest = roll_back(
        options.model, options.to, repository=options.repository, keys=options.keys
    )
    text = (
        f"{manifest.model}: version {manifest.version} contains the bytes of version "
        f"{options.to}, sha256 {manifest.onnx.sha256}"
    )
    return show(options, text, manifest.model_dump(mode="json"))


def _list(options: argparse.Namespace) -> int:
    manifests = list_releases(options.repository, options.keys)
    text = "\n".join(map(_line, manifests)) or "nothing has been published yet"
    return show(options, text, [manifest.model_dump(mode="json") for manifest in manifests])


def _line(manifest: Manifest) -> str:
    lineage = manifest.lineage
    rolled = f", rollback of {lineage.rollback_of}" if lineage.rollback_of else ""
    return (
        f"{manifest.model} {manifest.version}  {manifest.created}  {lineage.candidate}  "
        f"{manifest.onnx.length} bytes  sha256 {manifest.onnx.sha256}  run {lineage.run}{rolled}"
    )


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--offline",
        action="store_true",
        help="also renew root and targets for a year; needs the offline keys",
    )


def _refresh(options: argparse.Namespace) -> int:
    expiry = refresh_repository(options.repository, options.keys, offline=options.offline)
    text = "\n".join(f"{role:<9} expires {when:%Y-%m-%d}" for role, when in expiry.items())
    return show(
        options, text, {role: f"{when:%Y-%m-%dT%H:%M:%SZ}" for role, when in expiry.items()}
    )


def _rotate_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--role",
        action="append",
        choices=[*ROLES, *ROLE_GROUPS],
        default=[],
        help="role whose keys are replaced, e.g. --role online (default: online); repeat for more",
    )
    _threshold(parser, "number of new keys of a role (default: as before)")
    parser.add_argument(
        "--last-good",
        action="append",
        type=_model_version,
        default=[],
        metavar="MODEL=VERSION",
        help="withdraw all later versions, so that devices return to this one, e.g. --last-good "
        "digits=7; repeat for more models",
    )


def _model_version(text: str) -> tuple[str, int]:
    model, _, version = text.rpartition("=")
    if not model or not _is_number(version):
        raise argparse.ArgumentTypeError(f"expected MODEL=VERSION, e.g. digits=7, got {text!r}")
    return model, int(version)


def _rotate(options: argparse.Namespace) -> int:
    done = rotate_keys(
        options.repository,
        options.keys,
        roles=options.role or ("online",),
        thresholds=dict(options.threshold),
        last_good=dict(options.last_good),
    )
    offline = sorted({str(path) for path in done.written if path.parent.name == "offline"})
    lines = [
        f"New keys:   {', '.join(done.roles)}; devices switch automatically from any earlier root",
        f"New root:   version {done.root_version}, {options.keys / 'root.json'}: give it to new "
        "devices",
        *(f"Epoch {epoch}: {model}" for model, epoch in done.epochs.items()),
        *(f"Offline:    move {path} to storage that is not connected" for path in offline),
        *(f"Removed:    {path}; destroy every copy of it" for path in done.removed),
    ]
    value = {
        "root_version": done.root_version,
        "roles": list(done.roles),
        "written": [str(path) for path in done.written],
        "removed": [str(path) for path in done.removed],
        "epochs": dict(done.epochs),
    }
    return show(options, "\n".join(lines), value)


release = group(
    {
        "init": Command(
            "Create keys and an empty repository signed with them.",
            _init_arguments,
            _init,
            "fedcore release init --repository releases --keys keys --model digits",
        ),
        "rollback": Command(
            "Publish an older version again, under a new version number.",
            _rollback_arguments,
            _rollback,
            "fedcore release rollback --repository releases --keys keys --model digits --to 3",
        ),
        "list": Command(
            "List every published version, verified.",
            repository_options,
            _list,
            "fedcore release list --repository releases --keys keys --json",
        ),
        **CHANNEL_VERBS,
        "drift": drift_command,
        "serve": serve,
        **COPY_VERBS,
        "refresh": Command(
            "Renew signatures before they expire; run it daily, and with --offline once a year.",
            _refresh_arguments,
            _refresh,
            "fedcore release refresh --repository releases --keys keys",
        ),
        "rotate": Command(
            "Replace the keys of roles, signed by the old root; withdraw what a thief published.",
            _rotate_arguments,
            _rotate,
            "fedcore release rotate --repository releases --keys keys --role online "
            "--last-good digits=7",
        ),
    },
    "Manage a signed repository of models: create it, list it, renew it, rotate its keys, roll a "
    "model back.",
)
