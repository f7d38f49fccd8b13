"""Subcommand ``fedcore finetune``; torch is imported only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedcore.cli import Command
from fedcore.config.run import RunConfig
from fedcore.config.settings import load_run
from fedcore.errors import INTERRUPTED, ConfigError
from fedcore.files import check_file
from fedcore.observability.foreign import say
from fedcore.observability.patience import report_loading
from server.options import run_options

_RUNS = Path("runs")


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
    run_options(parser)
    parser.add_argument(
        "--from",
        dest="start",
        type=Path,
        metavar="FILE",
        help="a checkpoint to start from, e.g. --from model.safetensors (default: the federated "
        "model of the run, global.safetensors in its folder)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the fine-tuned model goes if the gate keeps it, e.g. --out tuned.safetensors "
        "(default: finetuned.safetensors in the run's folder)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=_RUNS,
        help="parent folder of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--nnodes",
        type=int,
        metavar="N",
        help="machines that train together, like --set finetune.nodes=N",
    )
    parser.add_argument(
        "--rdzv-endpoint",
        metavar="HOST:PORT",
        help="where they meet, like --set finetune.rendezvous=HOST:PORT",
    )
    parser.add_argument(
        "--join",
        action="store_true",
        help="lend this machine to the node that has the model, and keep no result",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="train nothing; measure time, efficiency and cost by number of processes, e.g. --set "
        "finetune.processes=4 --report, into finetune_scaling.json and .png beside the result",
    )
    parser.add_argument("--json", action="store_true", help="print events and the result as JSON")


def _finetune(options: argparse.Namespace) -> int:
    if options.nnodes is not None:
        options.overrides.append(f"finetune.nodes={options.nnodes}")
    if options.rdzv_endpoint is not None:
        options.overrides.append(f"finetune.rendezvous={json.dumps(options.rdzv_endpoint)}")
    run = load_run(options.config, options.overrides)  # before torch: errors show at once
    folder = options.runs / run.name
    start = options.start or folder / "global.safetensors"
    out = options.out or folder / "finetuned.safetensors"
    check_file(out, option="--out")
    if options.report and options.join:
        raise ConfigError(
            "--report and --join: scaling is measured on one machine. Nothing was measured; leave "
            "one of them out."
        )
    if options.report:
        return _report(options, run, start, out.parent)
    with report_loading():
        from fedcore.files import write_atomic
        from fedcore.observability.console import choose
        from fedcore.task.model import checkpoint_bytes
        from server.api.joining import join_finetuning
        from server.api.steps import finetune as finetuned

    shown_on = sys.stdout
    with redirect_stdout(sys.stderr):  # keeps output of the task out of machine-readable output
        try:
            if options.join:
                join_finetuning(None, run)
                return 0
            with choose(shown_on, json=options.json) as shown:
                # A folder that no run has made would be in the way of one.
                there = out.parent.is_dir()
                board = out.parent / "tensorboard" / "finetune" if there else None
                tuned = finetuned(None, run, start, progress=shown, tensorboard=board)
        except KeyboardInterrupt:
            if run.finetune.checkpoints is None:
                raise
            say("Interrupted: the same command continues it.", to=sys.stderr)
            return INTERRUPTED
    if tuned.kept:
        write_atomic(out, checkpoint_bytes(tuned.model))
    if options.json:
        figures: dict[str, Any] = {"kept": tuned.kept, "before": tuned.before, "after": tuned.after}
        if tuned.auto:
            figures["auto"] = asdict(tuned.auto)
        say(json.dumps({"event": "finetuned", **figures, "file": str(out) if tuned.kept else None}))
    else:
        if tuned.auto:
            say(tuned.auto.table())
        say(f"model: {out}" if tuned.kept else "The gate kept the model as it was.")
    return 0


def _report(options: argparse.Namespace, run: RunConfig, start: Path, folder: Path) -> int:
    """Measures how fine-tuning scales, in place of training; figures go to ``folder``."""
    with report_loading():
        from fedcore.files import write_json
        from fedcore.observability.console import choose
        from server.api.scaling import measure_scaling

    shown_on = sys.stdout
    with redirect_stdout(sys.stderr), choose(shown_on, json=options.json) as shown:
        report = measure_scaling(None, run, start, progress=shown)
    # A folder that no run has made would be in the way of one.
    picture = (folder if folder.is_dir() else Path()) / "finetune_scaling.png"
    report.plot(picture)
    write_json(picture.with_suffix(".json"), report.to_dict())
    if options.json:
        say(json.dumps({"event": "scaling", **report.to_dict(), "plot": str(picture)}))
    else:
        say(f"{report.table()}\nplot: {picture}")
    return 0


finetune = Command(
    help="train a model on the cloud's data, on one or several machines, and judge it",
    arguments=_finetune_arguments,
    run=_finetune,
    example="fedcore finetune run.toml --set finetune.processes=2",
)
