"""Subcommand ``fedcore release``, for publishers and their timers."""

from __future__ import annotations

import argparse
from pathlib import Path

from fedcore.artifacts.manifest import Manifest
from fedcore.cli import Command, group, json_option, show
from server.api.releases import (
    ROLE_GROUPS,
    create_repository,
    list_releases,
    refresh_repository,
    roll_back,
    rotate_keys,
)
from server.release.registry.keys import ROLES


def _places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repository",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the signed repository, as --repository releases",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the keys, as --keys keys; never within the repository",
    )
    json_option(parser)


def _init_arguments(parser: argparse.ArgumentParser) -> None:
    _places(parser)
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a model that may be published with the online keys, as --model digits; repeat it for "
        "more, leave it out for any",
    )
    _threshold(parser, "a role's keys, one each by default")


def _threshold(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--threshold",
        action="append",
        type=_role_threshold,
        default=[],
        metavar="ROLE=K/N",
        help=f"{what}, as --threshold root=2/3 for three keys of which two must sign; roles: "
        f"{', '.join(ROLES)}; repeat it for more",
    )


def _role_threshold(text: str) -> tuple[str, tuple[int, int]]:
    role, _, numbers = text.partition("=")
    threshold, _, keys = numbers.partition("/")
    if role not in ROLES or not _is_number(threshold) or not _is_number(keys):
        raise argparse.ArgumentTypeError(
            f"expected ROLE=K/N with a role of {', '.join(ROLES)}, as root=2/3, got {text!r}"
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
    _places(parser)
    parser.add_argument("--model", required=True, metavar="NAME", help="as --model digits")
    parser.add_argument(
        "--to",
        type=int,
        required=True,
        metavar="VERSION",
        help="the older version whose bytes are published again, as --to 3",
    )


def _rollback(options: argparse.Namespace) -> int:
    manifest = roll_back(
        options.model, options.to, repository=options.repository, keys=options.keys
    )
    text = (
        f"{manifest.model}: version {manifest.version} holds the bytes of version {options.to}, "
        f"sha256 {manifest.onnx.sha256}"
    )
    return show(options, text, manifest.model_dump(mode="json"))


def _list(options: argparse.Namespace) -> int:
    manifests = list_releases(options.repository, options.keys)
    text = "\n".join(map(_line, manifests)) or "nothing is published yet"
    return show(options, text, [manifest.model_dump(mode="json") for manifest in manifests])


def _line(manifest: Manifest) -> str:
    lineage = manifest.lineage
    rolled = f", rollback of {lineage.rollback_of}" if lineage.rollback_of else ""
    return (
        f"{manifest.model} {manifest.version}  {manifest.created}  {lineage.candidate}  "
        f"{manifest.onnx.length} bytes  sha256 {manifest.onnx.sha256}  run {lineage.run}{rolled}"
    )


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    _places(parser)
    parser.add_argument(
        "--offline",
        action="store_true",
        help="also renew root and targets for a year; the offline keys must be there",
    )


def _refresh(options: argparse.Namespace) -> int:
    expiry = refresh_repository(options.repository, options.keys, offline=options.offline)
    text = "\n".join(f"{role:<9} expires {when:%Y-%m-%d}" for role, when in expiry.items())
    return show(
        options, text, {role: f"{when:%Y-%m-%dT%H:%M:%SZ}" for role, when in expiry.items()}
    )


def _rotate_arguments(parser: argparse.ArgumentParser) -> None:
    _places(parser)
    parser.add_argument(
        "--role",
        action="append",
        choices=[*ROLES, *ROLE_GROUPS],
        default=[],
        help="whose keys are replaced, as --role online (default: online); repeat it for more",
    )
    _threshold(parser, "the new keys of a role, as many as before by default")
    parser.add_argument(
        "--last-good",
        action="append",
        type=_model_version,
        default=[],
        metavar="MODEL=VERSION",
        help="what came after this version is withdrawn, and devices go back to it, as "
        "--last-good digits=7; repeat it for more models",
    )


def _model_version(text: str) -> tuple[str, int]:
    model, _, version = text.rpartition("=")
    if not model or not _is_number(version):
        raise argparse.ArgumentTypeError(f"expected MODEL=VERSION, as digits=7, got {text!r}")
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
        f"New keys:   {', '.join(done.roles)}; devices follow by themselves from any root before",
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
            "Make keys and an empty repository that they sign.",
            _init_arguments,
            _init,
            "fedcore release init --repository releases --keys keys --model digits",
        ),
        "rollback": Command(
            "Publish the bytes of an older version again, under a new version.",
            _rollback_arguments,
            _rollback,
            "fedcore release rollback --repository releases --keys keys --model digits --to 3",
        ),
        "list": Command(
            "List every published version, verified.",
            _places,
            _list,
            "fedcore release list --repository releases --keys keys --json",
        ),
        "refresh": Command(
            "Sign again what would expire; run it daily, and with --offline once a year.",
            _refresh_arguments,
            _refresh,
            "fedcore release refresh --repository releases --keys keys",
        ),
        "rotate": Command(
            "Give roles new keys, vouched for by the old root's; undo what a thief published.",
            _rotate_arguments,
            _rotate,
            "fedcore release rotate --repository releases --keys keys --role online "
            "--last-good digits=7",
        ),
    },
    "Keep a signed repository of models: make it, list it, renew it, rotate its keys, roll a "
    "model back.",
)
