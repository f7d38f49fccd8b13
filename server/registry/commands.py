"""``fedcore release``: what a publisher does by hand, or from a timer."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcore.artifacts.manifest import Manifest
from fedcore.cli import Command, group
from fedcore.observability.foreign import say
from server.release import history, initialise, refresh, rollback


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
    parser.add_argument("--json", action="store_true", help="print JSON, for a machine to read")


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


def _init(options: argparse.Namespace) -> int:
    root = initialise(options.repository, options.keys, models=options.model, now=_now())
    text = (
        f"Repository: {options.repository}\n"
        f"Keys:       {options.keys}/online publish; move {options.keys}/offline to storage that "
        "is not connected\n"
        f"Devices:    give each {root} over a channel that its owner trusts"
    )
    value = {
        "repository": str(options.repository),
        "keys": str(options.keys),
        "root": str(root),
    }
    return _print(options, text, value)


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
    manifest = rollback(
        options.model,
        options.to,
        repository=options.repository,
        keys=options.keys,
        created=_now(),
    )
    text = (
        f"{manifest.model}: version {manifest.version} holds the bytes of version {options.to}, "
        f"sha256 {manifest.onnx.sha256}"
    )
    return _print(options, text, manifest.model_dump(mode="json"))


def _list(options: argparse.Namespace) -> int:
    manifests = history(options.repository, options.keys)
    text = "\n".join(map(_line, manifests)) or "nothing is published yet"
    return _print(options, text, [manifest.model_dump(mode="json") for manifest in manifests])


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
    state = refresh(options.repository, options.keys, now=_now(), offline=options.offline)
    expiry = {
        payload.type if payload is not state.releases else "releases": payload.expires
        for payload in (state.root, state.targets, state.releases, state.snapshot, state.timestamp)
    }
    text = "\n".join(f"{role:<9} expires {when:%Y-%m-%d}" for role, when in expiry.items())
    return _print(
        options, text, {role: f"{when:%Y-%m-%dT%H:%M:%SZ}" for role, when in expiry.items()}
    )


def _print(options: argparse.Namespace, text: str, value: Any) -> int:
    say(json.dumps(value, indent=2) if options.json else text)
    return 0


def _now() -> datetime:
    return datetime.now(UTC)


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
            "Sign anew what would expire; run it daily, and with --offline once a year.",
            _refresh_arguments,
            _refresh,
            "fedcore release refresh --repository releases --keys keys",
        ),
    },
    "Keep a signed repository of models: make it, list it, renew it, roll a model back.",
)
