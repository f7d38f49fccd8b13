"""Subcommand ``fedcore simulate``; torch is imported only when it runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path

from fedcore.cli import Command
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, load_owner
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.errors import INTERRUPTED, FedcoreError, ReleaseError, TaskError
from fedcore.observability.foreign import say
from fedcore.observability.patience import report_loading
from server.options import run_options

_RUNS = Path("runs")


def _simulate_arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--owner",
        type=Path,
        help="an owner.toml that applies to every virtual client, e.g. --owner owner.toml",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=_RUNS,
        help="parent folder of the results (default: runs)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="how many rounds the run has in all, like --set federation.rounds=N, e.g. "
        "--resume --rounds 40 to continue a run of 20",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted run from its last checkpoint; the result is the same, bit "
        "for bit. With more rounds, also a complete run",
    )
    again.add_argument(
        "--fresh", action="store_true", help="start over, and discard the run of this name"
    )
    again.add_argument(
        "--replay",
        metavar="ROUND:CLIENT",
        help="repeat the training of one client in one round and show its error in full, e.g. "
        "--replay 3:anna; nothing is written",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print events and the final summary as JSON lines",
    )


def _simulate(options: argparse.Namespace) -> int:
    if options.rounds is not None:
        options.overrides.append(f"federation.rounds={options.rounds}")
    run = load_run(options.config, options.overrides)  # before torch: errors show at once
    owner = load_owner(options.owner) if options.owner else OPEN_POLICY
    with report_loading():
        from fedcore.observability.console import choose
        from server.api.simulation import simulated
        from server.report.folder import CHECKPOINT

    if options.replay:
        return _replay(options, run, owner)
    out, command = sys.stdout, _command(options)
    with redirect_stdout(sys.stderr):  # keeps output of the task out of machine-readable output
        try:
            with choose(out, json=options.json) as shown:
                result = simulated(
                    None,
                    run,
                    owner=owner,
                    runs=options.runs,
                    fresh=options.fresh,
                    resume=options.resume,
                    progress=shown,
                    say_slow=True,
                    command=command,
                )
        except KeyboardInterrupt:
            if not (options.runs / run.name / CHECKPOINT).is_file():
                raise
            say(f"Interrupted: `{command} --resume` continues it.", to=sys.stderr)
            return INTERRUPTED
    if options.json:
        say(json.dumps({"event": "summary", **result.summary}))
    else:
        say(f"report: {os.path.relpath(result.folder / 'report.html')}")
    if refused := result.record.withheld or result.record.unreleased:
        raise ReleaseError(refused)
    return 0


def _replay(options: argparse.Namespace, run: RunConfig, owner: OwnerPolicy) -> int:
    """Trains one client of one round again to reproduce a failure; writes nothing."""
    from server.api.replaying import replayed

    with redirect_stdout(sys.stderr):  # keeps output of the task out of machine-readable output
        found = replayed(
            None,
            run,
            options.replay,
            owner=owner,
            runs=options.runs,
            on_note=lambda note: say(note, to=sys.stderr),
            say_slow=True,
        )
    if found.error is not None:
        traceback.print_exception(found.error, file=sys.stderr)
    if options.json:
        event = {"event": "replayed", "round": found.round, "client": found.client}
        said = {"ok": True, **found.figures()} if found.ok else {"ok": False, "error": found.reason}
        say(json.dumps({**event, **said}))
    else:
        say(found.line)
    if found.error is None:
        return 0
    error = found.error
    return error.exit_code if isinstance(error, FedcoreError) else TaskError.exit_code


def _command(options: argparse.Namespace) -> str:
    """Returns the command line that repeats this run."""
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
