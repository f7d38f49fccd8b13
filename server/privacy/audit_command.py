"""Subcommand ``fedcore privacy audit``: attacks the training function and reports its leakage."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedcore.cli import Command
from fedcore.errors import ConfigError, FedcoreError, PrivacyError
from fedcore.files import check_file, check_folder
from fedcore.observability.foreign import say
from fedcore.observability.patience import LOADING, note_if_slow
from fedcore.observability.words import counted, epsilon_floor_text, epsilon_text

if TYPE_CHECKING:
    from fedcore.config.run import RunConfig
    from fedcore.observability.events import Sink
    from fedcore.task.definition import Examples
    from server.privacy.audit import Audited, Statement
    from server.privacy.inversion import Picture

_CONFIDENCE = 0.95
_PICTURES = 3
_SHOW_EVERY_S = 2.0
_MAX_SEEDS = 10_000
_MAX_EXAMPLES = 10**9
_SHOWN = 40  # characters shown of an invalid value


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        help="a run's TOML file, whose noise, clip norm, sample rate and steps are audited "
        "(default: one step with noise multiplier 1)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the file, e.g. --set privacy.max_epsilon=4; may be repeated",
    )
    parser.add_argument(
        "--examples",
        type=_examples,
        metavar="N",
        help="number of examples of the planned client, e.g. --examples 600 (default: that of "
        "the task's first client)",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        default=5,
        help=f"independent audits, at most {_MAX_SEEDS:,}, each with canaries from its own "
        "seed; the noise comes from the operating system, as on devices (default: 5)",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="write report.html and inversion.png into this folder, which is created if missing, "
        "e.g. --report runs/audit",
    )
    parser.add_argument(
        "--json", action="store_true", help="print progress and the findings as JSON"
    )


def _seeds(text: str) -> int:
    return _number(text, _MAX_SEEDS)


def _examples(text: str) -> int:
    return _number(text, _MAX_EXAMPLES)


def _number(text: str, maximum: int) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= len(str(maximum)):
        number = int(text)
        if 1 <= number <= maximum:
            return number
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    raise argparse.ArgumentTypeError(
        f"expected a whole number from 1 to {maximum:,}, got {shown!r}. Nothing was audited"
    )


def _audit(options: argparse.Namespace) -> int:
    if options.config is None and (options.overrides or options.examples):
        raise ConfigError(
            "audit: --set and --examples apply to a run, but no run's file was given. Nothing "
            "was audited; add the file's path."
        )
    if options.report is not None:
        check_folder(options.report, option="--report")
        for name in ("report.html", "inversion.png"):
            check_file(options.report / name, option="--report")
    with note_if_slow(LOADING):
        statements = _statements(options)
        from fedcore.observability.console import choose
        from fedcore.observability.events import Noted
        from server.privacy.audit_report import summary, text, write_report

    audited: list[Audited] = []
    pictures: list[Picture] = []
    try:
        with choose(sys.stdout, json=options.json) as emit:
            for statement in statements:
                alone = 1 - (1 - _CONFIDENCE) / len(statements)
                audited.append(_audited(statement, options.seeds, alone, emit))
            pictures += _pictures(statements[0], emit)
            if options.report is not None:
                write_report(options.report, audited, pictures)
                emit(Noted(f"report: {options.report / 'report.html'}"))
    except FedcoreError as error:
        if not any(one.refuted for one in audited):
            raise
        say(f"{type(error).__name__}: {error}", to=sys.stderr)  # a refutation is the graver error
    finally:  # findings so far survive any error
        if audited and options.json:
            say(json.dumps({"event": "summary", **summary(audited, pictures)}))
        elif audited:
            say(text(audited, pictures))
    _check(audited)
    return 0


def _statements(options: argparse.Namespace) -> list[Statement]:
    """Returns the statements to audit: one step with every example, and a round as planned."""
    if options.config is None:
        from fedcore.privacy.accounting import Charge
        from fedcore.privacy.planning import PrivatePlan
        from server.privacy.audit import Statement

        plan = PrivatePlan(Charge(1, 1.0, 1.0, 1), clip_norm=1.0)
        return [Statement("one step with every example", plan, target_delta=1e-5)]
    from fedcore.config.settings import load_run

    run = load_run(options.config, options.overrides)
    if not run.private:
        raise ConfigError(
            f"{options.config}: privacy.unit is {run.privacy.unit!r}, so the run states no "
            "epsilon of examples that an audit could refute. Nothing was audited; set "
            "privacy.unit to 'example' or 'both'."
        )
    with redirect_stdout(sys.stderr):  # keeps output of the task out of machine-readable output
        return _of_run(run, options.examples)


def _of_run(run: RunConfig, examples: int | None) -> list[Statement]:
    from dataclasses import replace

    from fedcore.config.in_round import client_in_round, planned_epochs, privacy_in_round
    from fedcore.privacy.planning import plan
    from server.privacy.audit import Statement

    data = _first_client(run) if examples is None else cast("Examples", range(examples))
    participations = run.privacy.participations or run.federation.rounds
    planned = plan(
        data,
        client_in_round(run, 1),
        privacy_in_round(run, 1),
        round=1,
        participations=participations,
        epochs_in_all=planned_epochs(run, participations),
    )
    delta, accountant = run.privacy.target_delta, run.privacy.accountant
    one = replace(planned, charge=replace(planned.charge, sample_rate=1.0, steps=1))
    found = [Statement("one step with every example", one, delta, accountant)]
    if planned != one:
        found.append(Statement("one round as planned", planned, delta, accountant))
    return found


def _first_client(run: RunConfig) -> Examples:
    from fedcore.errors import DataError
    from fedcore.task.definition import data_folder, load_task
    from fedcore.training.examples import task_examples

    task, folder = load_task(run.path(run.task)), data_folder()
    name = next(iter(task.clients(folder)), None)
    if name is None:
        raise DataError(
            f"task {task.name!r}: clients() returned none, but the audit needs the number of "
            "examples of the first. Nothing was audited; pass it with --examples."
        )
    what = f"data of client {name!r}"
    return task_examples(task, lambda: task.client_data(name, folder), what=what, folder=folder)


def _audited(statement: Statement, seeds: int, confidence: float, emit: Sink) -> Audited:
    from fedcore.observability.events import StageAdvanced, StageFinished, StageStarted
    from fedcore.seeds import SystemEntropy
    from server.privacy.audit import USUAL_EFFORT, audit
    from server.privacy.canaries import private_training

    stage, started_s = f"audit: {statement.name}", time.monotonic()
    total = seeds * USUAL_EFFORT.within(statement.plan.charge.steps).trainings
    emit(StageStarted(stage, total))
    found = audit(
        private_training(statement.plan, SystemEntropy()),
        statement,
        seeds=range(1, seeds + 1),
        confidence=confidence,
        done=_remaining(
            total, "trainings", lambda done, note: emit(StageAdvanced(stage, done, note))
        ),
    )
    said = "refuted" if found.refuted else "not refuted"
    emit(StageFinished(stage, time.monotonic() - started_s, said))
    return found


def _remaining(total: int, what: str, show: Callable[[int, str], None]) -> Callable[[int], None]:
    """Returns a callback that reports progress and remaining time, every other second.

    Time is measured from the end of the first item, which includes set-up.
    """
    from fedcore.observability.words import seconds_text

    first_s = shown_s = 0.0

    def done(count: int) -> None:
        nonlocal first_s, shown_s
        now_s = time.monotonic()
        if count == 1:
            first_s = shown_s = now_s
        elif now_s - shown_s >= _SHOW_EVERY_S:
            shown_s = now_s
            left_s = (now_s - first_s) / (count - 1) * (total - count)
            show(count, f"of {total} {what}, {seconds_text(left_s)} left")

    return done


def _pictures(statement: Statement, emit: Sink) -> list[Picture]:
    from fedcore.observability.events import Noted, StageAdvanced, StageFinished, StageStarted
    from fedcore.seeds import SystemEntropy
    from server.privacy.inversion import invert_digits

    stage, started_s = "gradient inversion", time.monotonic()
    emit(StageStarted(stage, _PICTURES))
    noise, clip_norm = statement.plan.charge.noise_multiplier, statement.plan.clip_norm
    step = _remaining(
        _PICTURES, "pictures", lambda done, note: emit(StageAdvanced(stage, done, note))
    )
    found: list[Picture] = []
    try:
        for picture in invert_digits(noise, clip_norm, SystemEntropy(), pictures=_PICTURES, seed=1):
            found.append(picture)
            step(len(found))
    except ModuleNotFoundError as error:
        emit(Noted(f"gradient inversion skipped: {error.name} is not installed"))
    emit(StageFinished(stage, time.monotonic() - started_s, counted(len(found), "picture")))
    return found


def _check(audited: Sequence[Audited]) -> None:
    """Raises `PrivacyError` if the releases contradict a statement."""
    for one in audited:
        if one.refuted:
            noise = one.statement.plan.charge.noise_multiplier
            seen = ", ".join(f"{seed.measured_noise:.3f}" for seed in one.seeds)
            raise PrivacyError(
                f"audit: {one.statement.name}: epsilon is at least "
                f"{epsilon_floor_text(one.epsilon)}, stated {epsilon_text(one.stated)}, which is "
                f"{one.epsilon - one.stated:.2g} too little (confidence {one.confidence:.1%}). "
                "The training function leaks more than its ledger says; noise multiplier "
                f"{noise:g} is stated, and {seen} was measured. Do not train with privacy on "
                "this installation until the cause is found."
            )


audit = Command(
    help="attack the training that devices run, and compare what leaks with the stated epsilon",
    arguments=_arguments,
    run=_audit,
    example="fedcore privacy audit run.toml --seeds 5 --report runs/audit",
)
