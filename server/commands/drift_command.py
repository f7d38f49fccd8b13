"""The command ``fedcore release drift``, for timers that start the next training."""

from __future__ import annotations

import argparse

from fedcore.artifacts.stability import SHIFTED
from fedcore.cli import Command, show
from server.api.drift import measure_drift
from server.commands.channel_commands import drift_lines
from server.commands.release_options import reports_option, repository_options
from server.delivery.drift import as_row

DRIFTED = 12
"""Exit code when a feature has drifted."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    repository_options(parser)
    reports_option(parser)
    parser.add_argument(
        "--model", metavar="NAME", help="the model, e.g. --model digits (default: all)"
    )
    parser.add_argument(
        "--above",
        type=_index,
        default=SHIFTED,
        metavar="PSI",
        help="population stability index above which a feature has drifted, e.g. --above 0.1 "
        "(default: %(default)g)",
    )


def _index(text: str) -> float:
    try:
        index = float(text)
    except ValueError:
        index = 0.0
    if not 0 < index < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, e.g. 0.25, got {text!r}")
    return index


def _drift(options: argparse.Namespace) -> int:
    found = measure_drift(
        options.repository,
        options.keys,
        reports=options.reports,
        model=options.model,
        above=options.above,
    )
    rows = [as_row(drift) for drift in found]
    lines = [
        f"{row['model']}: version {row['version']}\n" + "\n".join(drift_lines(row)) for row in rows
    ]
    show(options, "\n".join(lines) or "nothing has been published yet", rows)
    return DRIFTED if any(drift.drifted for drift in found) else 0


drift_command = Command(
    "Tell whether inputs and outputs on devices have moved since the release; exits with 12 if so.",
    _arguments,
    _drift,
    "fedcore release drift --repository releases --keys keys --model digits --above 0.25",
)
