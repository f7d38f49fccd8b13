"""The verbs of a server: simulate, check, release. torch is imported when one runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from fedcore.cli import Command
from fedcore.config.owner import OPEN_POLICY, load_owner
from fedcore.config.settings import load_run
from fedcore.errors import INTERRUPTED, ReleaseError
from fedcore.observability.foreign import say
from fedcore.observability.patience import FIRST_STEP, LOADING, loading_told, told_if_slow
from server.options import run_options
from server.release.commands import release

__all__ = ["check", "release", "simulate"]
_RUNS = Path("runs")


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--owner",
        type=Path,
        help="an owner.toml that every virtual client keeps to, e.g. --owner owner.toml",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=_RUNS,
        help="folder that results go below (default: runs)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on with a run that was interrupted, from its last checkpoint; the result is the "
        "same, bit for bit",
    )
    again.add_argument(
        "--fresh", action="store_true", help="begin again, and drop a run that was interrupted"
    )
    again.add_argument(
        "--replay",
        metavar="ROUND:CLIENT",
        help="train one client of one round again, alone, and show in full how it fails, e.g. "
        "--replay 3:anna; nothing is written",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print events, and at the end the summary, as JSON lines",
    )


def _simulate(options: argparse.Namespace) -> int:
    started = time.monotonic()
    run = load_run(options.config, options.overrides)  # before torch: a mistake shows at once
    owner = load_owner(options.owner) if options.owner else OPEN_POLICY
    with loading_told():
        from fedcore.flower.quiet import quiet
        from fedcore.observability.console import choose
        from fedcore.task.definition import load_task
        from server.api import run_in
        from server.preflight import prepare
        from server.report.folder import CHECKPOINT, open_folder, reopen_folder
        from server.simulation.resume import pick_up
        from server.unfinished import drop_all, refuse_to_drop

    quiet()
    out, command = sys.stdout, _command(options)
    with redirect_stdout(sys.stderr):  # what a task prints is not among what a machine reads
        task = load_task(run.path(run.task))
        with told_if_slow(FIRST_STEP) if run.private else nullcontext():
            prepared = prepare(run, task, owner, options.runs / run.name)
        if options.replay:
            from server.simulation.replay import replay

            return replay(
                options.replay, run, task, owner, prepared, options.runs, out, json=options.json
            )
        if options.resume:
            opening = reopen_folder(run, options.runs)
        else:
            before = drop_all if options.fresh else refuse_to_drop
            opening = open_folder(run, options.runs, before=before)
        with opening as folder:
            resumed = pick_up(folder, run, owner) if options.resume else None
            try:
                with choose(out, json=options.json) as shown:
                    finished, summary = run_in(
                        folder,
                        run,
                        task,
                        owner,
                        prepared,
                        shown,
                        command=command,
                        started=started,
                        resumed=resumed,
                    )
            except KeyboardInterrupt:
                if not (folder / CHECKPOINT).is_file():
                    raise
                say(f"Interrupted: `{command} --resume` goes on with it.", to=sys.stderr)
                return INTERRUPTED
    if options.json:
        say(json.dumps({"event": "summary", **summary}))
    else:
        say(f"report: {os.path.relpath(folder / 'report.html')}")
    if finished.record.withheld:
        raise ReleaseError(finished.record.withheld)
    return 0


def _command(options: argparse.Namespace) -> str:
    """The command line that asks for the same run again."""
    words = ["fedcore", "simulate", str(options.config)]
    for override in options.overrides:
        words += ["--set", override]
    if options.owner:
        words += ["--owner", str(options.owner)]
    if options.runs != _RUNS:
        words += ["--runs", str(options.runs)]
    return shlex.join(words)


simulate = Command(
    help="train over simulated clients, then fine-tune, compress, test and publish",
    arguments=_simulate_arguments,
    run=_simulate,
    example="fedcore simulate run.toml --set federation.rounds=5",
)


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", type=Path, help="a task file, or the run's TOML file")
    parser.add_argument("--client", help="the client to check with; the first one when unset")
    parser.add_argument("--json", action="store_true", help="print findings as one JSON object")


def _check(options: argparse.Namespace) -> int:
    with told_if_slow(LOADING):
        from fedcore.flower.quiet import quiet
        from server.check import check_task, print_finding, print_findings

    quiet()
    if options.json:
        return print_findings(check_task(options.task, client=options.client), as_json=True)
    findings = check_task(options.task, client=options.client, tell=print_finding)
    return print_findings(findings, as_json=False, told=True)


check = Command(
    help="run one step of everything on one client's data and say what would fail later",
    arguments=_check_arguments,
    run=_check,
    example="fedcore check task.py",
)
