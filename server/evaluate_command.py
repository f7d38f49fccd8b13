"""Subcommand ``evaluate``: a model's metrics on the data of each simulated client."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from fedcore.cli import Command
from fedcore.config.owner import OPEN_POLICY, load_owner
from fedcore.config.settings import load_run
from fedcore.errors import ConfigError
from fedcore.observability.foreign import say
from fedcore.observability.patience import report_loading
from server.options import set_option

__all__ = ["evaluate"]
_PARTS = ("heldout", "test", "all")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        help="a checkpoint (.safetensors, also that of an interrupted run) or an ONNX file (.onnx, "
        "a candidate or a released model)",
    )
    parser.add_argument("config", type=Path, help="the run's TOML file")
    set_option(parser)
    parser.add_argument(
        "--data",
        choices=_PARTS,
        help="which of a client's examples: held back from training, its own test data, or all; "
        "the first that there is when unset",
    )
    parser.add_argument(
        "--clients",
        default=None,
        metavar="NUMBER|NAMES",
        help="how many clients to draw, or their names with commas, e.g. --clients anna,ben "
        "(default: all, at most 1000)",
    )
    parser.add_argument(
        "--owner",
        type=Path,
        help="an owner.toml that every virtual client keeps to, e.g. --owner owner.toml",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one JSON object")


def _evaluate(options: argparse.Namespace) -> int:
    run = load_run(options.config, options.overrides)  # before torch: errors show at once
    owner = load_owner(options.owner) if options.owner else OPEN_POLICY
    clients = _clients(options.clients)
    with report_loading():
        from fedcore.observability.console import choose
        from server.api.evaluating import evaluate as evaluated

    with redirect_stdout(sys.stderr), choose(sys.stderr, json=False) as shown:
        found = evaluated(
            None,
            run,
            options.model,
            clients=clients,
            data=options.data,
            owner=owner,
            progress=shown,
        )
    say(json.dumps(found.as_json()) if options.json else str(found))
    return 0


def _clients(text: str | None) -> int | list[str] | None:
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    names = [name for name in text.split(",") if name]
    if not names:
        raise ConfigError(
            f"--clients {text!r}: expected a number of clients, or their names with commas between "
            "them. Nothing was evaluated."
        )
    return names


evaluate = Command(
    help="evaluate a model on the data of each simulated client",
    arguments=_arguments,
    run=_evaluate,
    example="fedcore evaluate runs/churn/global.safetensors churn/run.toml",
)
