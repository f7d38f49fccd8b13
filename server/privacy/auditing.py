"""Audit of what private training states: `audit_privacy`, part of the Python API.

``fedcore privacy audit`` iterates over the same `findings`. `server.privacy.audit` is the attack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

from fedcore.config.in_round import client_in_round, planned_epochs, privacy_in_round
from fedcore.config.run import RunConfig
from fedcore.config.settings import run_with
from fedcore.errors import ConfigError, DataError, PrivacyError
from fedcore.observability.console import shown
from fedcore.observability.events import Noted, Sink, StageAdvanced, StageFinished, StageStarted
from fedcore.observability.words import counted, epsilon_floor_text, epsilon_text, seconds_text
from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan, plan
from fedcore.seeds import SystemEntropy
from fedcore.task.definition import Examples, data_folder, load_task
from fedcore.training.examples import task_examples
from server.privacy.audit import USUAL_EFFORT, Audited, Statement, audit
from server.privacy.canaries import private_training
from server.privacy.inversion import Picture, invert_digits

_CONFIDENCE = 0.95
_PICTURES = 3
_SHOW_EVERY_S = 2.0


@dataclass(frozen=True)
class PrivacyAudit:
    """What an audit found, from `fedcore.audit_privacy`.

    Example::

        found = fedcore.audit_privacy("run.toml", seeds=5)
        print(found)
        found.write_report("runs/audit")
        found.require_sound()
    """

    statements: tuple[Audited, ...]
    """Each statement, with the lower bounds on its epsilon."""
    pictures: tuple[Picture, ...]
    """Reconstructions of training examples; empty if scikit-learn is not installed."""

    @property
    def refuted(self) -> bool:
        """Whether the releases contradict a statement. False proves nothing."""
        return any(one.refuted for one in self.statements)

    def __str__(self) -> str:
        """Returns the findings as text."""
        from server.privacy.audit_report import text

        return text(self.statements, self.pictures)

    def to_dict(self) -> dict[str, Any]:
        """Returns the findings for JSON."""
        from server.privacy.audit_report import summary

        return summary(self.statements, self.pictures)

    def write_report(self, folder: str | PathLike[str]) -> None:
        """Writes ``report.html`` and ``inversion.png`` into a folder, created if missing.

        Raises:
            ResourceError: a file cannot be written.
        """
        from server.privacy.audit_report import write_report

        write_report(Path(folder), self.statements, self.pictures)

    def require_sound(self) -> None:
        """Raises `PrivacyError` if the releases contradict a statement."""
        for one in self.statements:
            if one.refuted:
                noise = one.statement.plan.charge.noise_multiplier
                seen = ", ".join(f"{seed.measured_noise:.3f}" for seed in one.seeds)
                raise PrivacyError(
                    f"audit: {one.statement.name}: epsilon is at least "
                    f"{epsilon_floor_text(one.epsilon)}, stated {epsilon_text(one.stated)}, which "
                    f"is {one.epsilon - one.stated:.2g} too little (confidence "
                    f"{one.confidence:.1%}). The training function leaks more than its ledger "
                    f"says; noise multiplier {noise:g} is stated, and {seen} was measured. Do not "
                    "train with privacy on this installation until the cause is found."
                )


def audit_privacy(
    run: RunConfig | str | PathLike[str] | None = None,
    *,
    examples: int | None = None,
    seeds: int = 5,
    progress: bool | Sink = True,
    **settings: Any,
) -> PrivacyAudit:
    """Attacks the training that devices run, and compares what leaks with the stated epsilon.

    The training function runs unmodified on canaries, with noise from the operating system. A lower
    bound above the stated epsilon refutes the statement; one below it proves nothing.

    Example::

        found = fedcore.audit_privacy("run.toml", seeds=5)
        [(one.statement.name, one.stated, one.epsilon) for one in found.statements]

    Args:
        run: A run with example-level privacy, or its file, whose noise, clip norm, sample rate and
            steps are audited; one step with noise multiplier 1 when None.
        examples: Number of examples of the planned client; that of the task's first client when
            None.
        seeds: Number of independent audits, each with canaries of its own.
        progress: Whether to show progress, on standard error or in the notebook's cell; or a
            callback that receives the events instead.
        settings: Sections or settings of the run to override.

    Raises:
        ConfigError: a setting or ``seeds`` is not valid, or the run protects no examples.
        FedcoreError: the task or its data cannot be read, or training failed.
    """
    if seeds < 1 or (run is None and (settings or examples is not None)):
        raise ConfigError(
            f"audit: expected seeds of at least 1, and settings and examples only with a run; got "
            f"seeds = {seeds}, {'no run' if run is None else 'a run'}. Nothing was audited."
        )
    if run is None:
        statements = usual_statements()
    else:
        statements = statements_of(run_with(run, settings), examples)
    with shown(progress) as emit:
        found = list(findings(statements, seeds, emit))
    return PrivacyAudit(
        tuple(one for one in found if isinstance(one, Audited)),
        tuple(one for one in found if isinstance(one, Picture)),
    )


def findings(statements: list[Statement], seeds: int, emit: Sink) -> Iterator[Audited | Picture]:
    """Yields the audit of each statement, and then reconstructed pictures, as each is done.

    Args:
        statements: What is audited.
        seeds: Number of independent audits of each.
        emit: Receives progress.
    """
    for statement in statements:
        yield _audited(statement, seeds, 1 - (1 - _CONFIDENCE) / len(statements), emit)
    yield from _pictures(statements[0], emit)


def usual_statements() -> list[Statement]:
    """Returns what is audited without a run: one step with noise multiplier 1."""
    usual = PrivatePlan(Charge(1, 1.0, 1.0, 1), clip_norm=1.0)
    return [Statement("one step with every example", usual, target_delta=1e-5)]


def statements_of(run: RunConfig, examples: int | None) -> list[Statement]:
    """Returns what a run states: of one step with every example, and of a round as planned.

    Args:
        run: A run that protects examples.
        examples: Number of examples of the planned client; that of the task's first when None.

    Raises:
        ConfigError: the run protects no examples.
        FedcoreError: the task or its data cannot be read.
    """
    if not run.private:
        raise ConfigError(
            f"run {run.name!r}: privacy.unit is {run.privacy.unit!r}, so the run states no "
            "epsilon of examples that an audit could refute. Nothing was audited; set "
            "privacy.unit to 'example' or 'both'."
        )

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


def _pictures(statement: Statement, emit: Sink) -> Iterator[Picture]:
    stage, started_s = "gradient inversion", time.monotonic()
    emit(StageStarted(stage, _PICTURES))
    noise, clip_norm = statement.plan.charge.noise_multiplier, statement.plan.clip_norm
    step = _remaining(
        _PICTURES, "pictures", lambda done, note: emit(StageAdvanced(stage, done, note))
    )
    count = 0
    try:
        for picture in invert_digits(noise, clip_norm, SystemEntropy(), pictures=_PICTURES, seed=1):
            yield picture
            count += 1
            step(count)
    except ModuleNotFoundError as error:
        emit(Noted(f"gradient inversion skipped: {error.name} is not installed"))
    emit(StageFinished(stage, time.monotonic() - started_s, counted(count, "picture")))
