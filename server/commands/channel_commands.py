"""The commands ``fedcore release show | promote | verify | gc``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from fedcore.artifacts.feedback import latency_text
from fedcore.cli import Command, show
from fedcore.observability.words import counted
from server.api.releases import (
    clean_repository,
    list_rollouts,
    promote_canary,
    verify_repository,
)
from server.commands.release_options import reports_option, repository_options

_MOST_SHOWN = 8
"""Most features that are listed; JSON has all."""


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
        drawn = [f"{points / 100:g} % of the devices"] if (points := canary["basis_points"]) else []
        named = [", ".join(canary["cohort"])] if canary["cohort"] else []
        lines.append(
            f"  version {canary['version']} is on trial on {' and '.join([*drawn, *named])}"
        )
    lines += [
        f"  version {each['version']} was rolled back: {each['why']}" for each in row["rolled_back"]
    ]
    for version, tally in row["devices"].items():
        if any(tally.values()):
            told = ", ".join(f"{count} {outcome}" for outcome, count in tally.items() if count)
            lines.append(f"  version {version} on devices: {told}")
    for version, serving in row["serving"].items():
        if serving["devices"] or serving["left_out"]:
            lines += [f"  version {version} serves", *drift_lines(serving, indent=4)]
    return "\n".join(lines)


def drift_lines(row: Mapping[str, Any], *, indent: int = 2) -> list[str]:
    """Returns how devices use a version as lines: requests, the features that moved, a device."""
    lines = [_usage(row)]
    if row["left_out"]:
        lines.append(f"{counted(row['left_out'], 'device')} left out: counts of another form")
    moved = [one for one in row["features"] if one["reading"] != "stable"]
    if row["features"]:
        lines.append(
            f"{counted(row['rows'], 'row')}: {len(moved)} of "
            f"{counted(len(row['features']), 'feature')} moved, largest index {row['psi']:.3f}"
        )
    elif row["devices"]:
        lines.append("no bins of enough rows were told, so nothing is known of drift")
    moved.sort(key=lambda one: -one["psi"])
    lines += [
        f"  {one['feature']}: {one['psi']:.3f}, {one['reading']}" for one in moved[:_MOST_SHOWN]
    ]
    if worst := row["worst"]:
        lines.append(f"furthest: device {worst['device']}, {worst['feature']}: {worst['psi']:.3f}")
    return [" " * indent + line for line in lines]


def _usage(row: Mapping[str, Any]) -> str:
    if not row["devices"]:
        return "no device has told how it is used"
    failed = row["error_rate"]
    return (
        f"{counted(row['requests'], 'request')} on {counted(row['devices'], 'device')}"
        f"{'' if failed is None else f', {100 * failed:.2g} % failed'}, "
        f"p50 {latency_text(row['p50_us'])}, p99 {latency_text(row['p99_us'])}"
    )


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
