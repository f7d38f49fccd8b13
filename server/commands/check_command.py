"""Subcommand ``fedcore check``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fedcore.cli import Command
from fedcore.config.settings import load_run, with_overrides
from fedcore.errors import TaskError
from fedcore.observability.foreign import say
from fedcore.observability.patience import LOADING, note_if_slow
from server.options import set_option


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, help="a task file, or the run's TOML file")
    set_option(parser)
    parser.add_argument(
        "--clients",
        metavar="WHICH",
        help=(
            "clients whose rows are all looked at: all, a number of them by chance, or names "
            "separated by commas, e.g. --clients all; when unset, six, and others as far as ten "
            "seconds allow"
        ),
    )
    parser.add_argument(
        "--on",
        choices=["simulation", "server", "device"],
        default="simulation",
        help=(
            "where the task will run: a simulation has all data, a server has no clients' data, a "
            "device has the data of the one client in --clients (default: %(default)s)"
        ),
    )
    parser.add_argument("--json", action="store_true", help="print findings as one JSON object")


def _check(options: argparse.Namespace) -> int:
    with note_if_slow(LOADING):
        from server.api.arguments import configured
        from server.api.checking import check as checked
        from server.checking.findings import CheckFinding, LineFilter
        from server.checking.selection import asked_of

    shown = LineFilter()

    def tell(finding: CheckFinding) -> None:
        if not options.json:
            for line in shown.lines(finding):
                say(line, flush=True)

    if options.task.suffix == ".toml":
        task, run = None, load_run(options.task, options.overrides)
    else:
        task = options.task
        run = with_overrides(configured(task, None, {}), options.overrides)
    which = None if options.clients is None else asked_of(options.clients)
    found = checked(task, run, clients=which, place=options.on, on_finding=tell)
    if options.json:
        findings = [asdict(finding) for finding in found.findings]
        say(json.dumps({"ok": found.ok, "findings": findings}))
    else:
        for line in shown.rest():
            say(line)
        say(found.verdict)
    return 0 if found.ok else TaskError.exit_code


check = Command(
    help="look at all data, run one step of everything, and say what would fail later",
    arguments=_check_arguments,
    run=_check,
    example="fedcore check task.py --clients all",
)
