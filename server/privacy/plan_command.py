"""Subcommand ``fedcore privacy plan``: forecasts the privacy cost of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from fedcore.cli import Command
from fedcore.config.run import RunConfig
from fedcore.config.schedule import NO_SCHEDULE
from fedcore.config.section import Section
from fedcore.config.settings import load_run
from fedcore.errors import ConfigError
from fedcore.files import check_picture
from fedcore.observability.foreign import say
from fedcore.observability.patience import LOADING, note_if_slow

if TYPE_CHECKING:
    from server.privacy.plan import ExamplePrivacyPlan

_Model = TypeVar("_Model", bound=Section)
_CLIENT = {"batch": "batch_size", "epochs": "epochs"}
_PRIVACY = {
    "epsilon": "max_epsilon",
    "delta": "target_delta",
    "noise": "noise_multiplier",
    "accountant": "accountant",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        help="a run's TOML file, for values that the options leave unset",
    )
    planned = parser.add_mutually_exclusive_group(required=True)
    planned.add_argument(
        "--examples",
        type=int,
        help="examples of one client, e.g. --examples 6000: plans privacy of examples",
    )
    planned.add_argument(
        "--clients",
        type=int,
        help="clients that rounds draw from, e.g. --clients 500: plans privacy of clients",
    )
    parser.add_argument(
        "--cohort", type=int, help="federation.cohort, e.g. --cohort 50; with --clients"
    )
    parser.add_argument("--batch", type=int, help="client.batch_size, e.g. --batch 64")
    parser.add_argument("--epochs", type=int, help="client.epochs, e.g. --epochs 1")
    parser.add_argument(
        "--rounds",
        type=int,
        help="rounds that the client takes part in (privacy.participations), e.g. --rounds 30",
    )
    parser.add_argument("--epsilon", type=float, help="privacy.max_epsilon, e.g. --epsilon 3")
    parser.add_argument("--delta", type=float, help="privacy.target_delta, e.g. --delta 1e-5")
    parser.add_argument(
        "--noise",
        type=float,
        help=(
            "a fixed privacy.noise_multiplier instead of the smallest for --epsilon, e.g. --noise 1"
        ),
    )
    parser.add_argument("--accountant", choices=["prv", "rdp"], help="privacy.accountant")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot the plan, e.g. --plot plan.png (.pdf, .svg)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as one JSON object")


def _run(options: argparse.Namespace) -> int:
    if options.clients is not None:
        return _of_clients(options)
    if options.cohort is not None:
        raise ConfigError(
            "--cohort: it does not apply to privacy of examples, which each client accounts for "
            "itself. Nothing was planned; leave it out, or plan privacy of clients with "
            "--clients."
        )
    if options.plot is not None:
        check_picture(options.plot, option="--plot")
    with note_if_slow(LOADING):
        run = _of_examples(options)  # before torch: errors show at once
        from server.privacy.plan import plan_example_privacy

    found = plan_example_privacy(options.examples, run)
    say(json.dumps(_record(found)) if options.json else str(found))
    if options.plot is not None:
        found.plot(options.plot)
    return 0


def _of_examples(options: argparse.Namespace) -> RunConfig:
    """Returns the run to plan for: its file, with the options' values."""
    run = _loaded(options)
    client = _changed(run.client, options, _CLIENT)
    if options.epochs is not None:
        client = client.model_copy(update={"steps": None, "schedule": NO_SCHEDULE})
    privacy = _changed(run.privacy, options, {**_PRIVACY, "rounds": "participations"})
    return run.model_copy(update={"client": client, "privacy": privacy})


def _of_clients(options: argparse.Namespace) -> int:
    """Plans client-level privacy: ``privacy.unit`` "client", and that part of "both"."""
    for name in ("batch", "epochs", "plot"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name}: it does not apply to privacy of clients. Nothing was planned; leave "
                "it out, or plan privacy of examples with --examples."
            )
    run = _loaded(options)
    with note_if_slow(LOADING):
        settings = _changed(run.privacy.client, options, _PRIVACY)
        federation = _changed(run.federation, options, {"rounds": "rounds", "cohort": "cohort"})
        privacy = run.privacy.model_copy(
            update={"client": settings} | ({} if options.config else {"unit": "client"})
        )
        run = run.model_copy(update={"privacy": privacy, "federation": federation})
        from server.privacy.plan_clients import plan_client_privacy

        found = plan_client_privacy(options.clients, run)
    say(json.dumps({"unit": "client", **asdict(found)}) if options.json else str(found))
    return 0


def _loaded(options: argparse.Namespace) -> RunConfig:
    return load_run(options.config) if options.config else RunConfig(name="plan", task="task.py")


def _changed(section: _Model, options: argparse.Namespace, names: dict[str, str]) -> _Model:
    """Returns a section of the run with the command line's overrides."""
    given = {key: getattr(options, name) for name, key in names.items()}
    values = section.model_dump() | {k: v for k, v in given.items() if v is not None}
    try:
        return type(section).model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        flag = next(name for name, key in names.items() if key == first["loc"][0])
        message = first["msg"].replace("Input", "it")
        raise ConfigError(
            f"--{flag} = {values[names[flag]]}: {message}. Nothing was planned; "
            "`fedcore privacy plan --help` gives an example."
        ) from None


def _record(found: ExamplePrivacyPlan) -> dict[str, object]:
    question, privacy, client = found.question, found.question.privacy, found.question.client
    return {
        "unit": "example",
        "max_epsilon": privacy.max_epsilon,
        "target_delta": privacy.target_delta,
        "accountant": privacy.accountant,
        "epochs": client.epochs if client.steps is None else None,
        "steps": client.steps,
        "epochs_by_round": question.epochs or None,
        "plan": asdict(found.forecast),
        "budget_lasts_rounds": found.lasts,
        "epsilon_by_round": [
            {"round": number, "epsilon": epsilon} for number, epsilon in found.epsilons
        ],
        "what_if": [asdict(each) for each in found.what_if],
    }


plan = Command(
    help=(
        "show the cost of example-level privacy to a client: noise, epsilon by round, what would "
        "help"
    ),
    arguments=_arguments,
    run=_run,
    example="fedcore privacy plan --examples 6000 --batch 64 --rounds 30 --epsilon 3 --delta 1e-5",
)
