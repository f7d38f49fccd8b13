"""Subcommand ``fedcore check``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from fedcore.cli import Command
from fedcore.errors import TaskError
from fedcore.observability.foreign import say
from fedcore.observability.patience import LOADING, note_if_slow


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, help="a task file, or the run's TOML file")
    parser.add_argument("--client", help="the client to check with; the first one when unset")
    parser.add_argument("--json", action="store_true", help="print findings as one JSON object")


def _check(options: argparse.Namespace) -> int:
    with note_if_slow(LOADING):
        from server.api.checking import check as checked
        from server.check import CheckFinding

    def tell(finding: CheckFinding) -> None:
        if not options.json:
            say(finding.line, flush=True)

    asked = (None, options.task) if options.task.suffix == ".toml" else (options.task,)
    found = checked(*asked, client=options.client, on_finding=tell)
    if options.json:
        findings = [asdict(finding) for finding in found.findings]
        say(json.dumps({"ok": found.ok, "findings": findings}))
    else:
        say(found.verdict)
    return 0 if found.ok else TaskError.exit_code


check = Command(
    help="run one step of everything on one client's data and say what would fail later",
    arguments=_check_arguments,
    run=_check,
    example="fedcore check task.py",
)
