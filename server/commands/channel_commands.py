"""The commands ``fedcore release show | promote | verify | gc``."""

from __future__ import annotations

import argparse
from typing import Any

from fedcore.cli import Command, show
from server.api.releases import (
    clean_repository,
    list_rollouts,
    promote_canary,
    verify_repository,
)
from server.commands.release_options import reports_option, repository_options


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    reports_option(parser)


def _show(options: argparse.Namespace) -> int:
    rows = list_rollouts(options.repository, options.keys, reports=options.reports)
    text = "\n".join(map(_text, rows)) or "nothing has been published yet"
    return show(options, text, rows)


def _text(row: dict[str, Any]) -> str:
    lines = [f"{row['model']}: version {row['stable']} is stable"]
    if canary := row["canary"]:
        named = f" and {', '.join(canary['cohort'])}" if canary["cohort"] else ""
        share = f"{canary['basis_points'] / 100:g} % of the devices{named}"
        lines.append(f"  version {canary['version']} is on trial on {share}")
    lines += [
        f"  version {each['version']} was rolled back: {each['why']}" for each in row["rolled_back"]
    ]
    for version, tally in row["devices"].items():
        if any(tally.values()):
            told = ", ".join(f"{count} {outcome}" for outcome, count in tally.items() if count)
            lines.append(f"  version {version} on devices: {told}")
    return "\n".join(lines)


def _promote_arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    parser.add_argument(
        "--model", required=True, metavar="NAME", help="name of the model, e.g. --model digits"
    )


def _promote(options: argparse.Namespace) -> int:
    manifest = promote_canary(options.model, repository=options.repository, keys=options.keys)
    text = f"{manifest.model}: version {manifest.version} is stable now, for all devices"
    return show(options, text, manifest.model_dump(mode="json"))


def _verify(options: argparse.Namespace) -> int:
    checked = verify_repository(options.repository, options.keys)
    text = f"{options.repository}: {checked} files are as they were signed"
    return show(options, text, {"files": checked})


def _gc(options: argparse.Namespace) -> int:
    freed_bytes = clean_repository(options.repository, options.keys)
    text = f"{options.repository}: {freed_bytes} bytes freed"
    return show(options, text, {"bytes": freed_bytes})


CHANNEL_VERBS = {
    "show": Command(
        "Show which versions devices get, what was rolled back and why, and devices' reports.",
        _show_arguments,
        _show,
        "fedcore release show --repository releases --keys keys",
    ),
    "promote": Command(
        "Give the version on trial to all devices.",
        _promote_arguments,
        _promote,
        "fedcore release promote --repository releases --keys keys --model digits",
    ),
    "verify": Command(
        "Check every published file against its signature.",
        repository_options,
        _verify,
        "fedcore release verify --repository releases --keys keys",
    ),
    "gc": Command(
        "Remove files that no signed metadata names.",
        repository_options,
        _gc,
        "fedcore release gc --repository releases --keys keys",
    ),
}
