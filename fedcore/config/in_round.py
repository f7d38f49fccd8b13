"""Settings of one round: those of the run's file, after its schedules."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fedcore.config.schedule import NO_SCHEDULE, Schedule

if TYPE_CHECKING:
    from fedcore.config.run import ClientConfig, Privacy, RunConfig


def client_in_round(run: RunConfig, number: int) -> ClientConfig:
    """Returns ``[client]`` in round ``number``, from 1: each setting has the value of this round.

    Settings that a strategy or an algorithm sends take precedence, see
    `fedcore.config.client_settings.settings_with`.
    """
    client = run.client
    if not client.schedule.names:
        return client
    changed: dict[str, object] = {"schedule": NO_SCHEDULE}
    rounds, schedule = run.federation.rounds, client.schedule
    if schedule.learning_rate is not None:
        rate = schedule.learning_rate.value(client.learning_rate, number, rounds)
        changed["learning_rate"] = rate
    if schedule.epochs is not None:
        changed["epochs"] = _whole(schedule.epochs.value(client.epochs, number, rounds))
    if schedule.clip_norm is not None and client.max_grad_norm is not None:
        bound = schedule.clip_norm.value(client.max_grad_norm, number, rounds)
        changed["max_grad_norm"] = bound
    return client.model_copy(update=changed)


def privacy_in_round(run: RunConfig, number: int) -> Privacy:
    """Returns ``[privacy]`` in round ``number``: its ``clip_norm`` may have a schedule.

    Guarantee:
        Noise multiplier, sampling and budget are those of every round. Noise is relative to
        ``clip_norm``, so a round's charge does not depend on it.
    """
    schedule = run.client.schedule.clip_norm
    if schedule is None or not run.private:
        return run.privacy
    bound = schedule.value(run.privacy.clip_norm, number, run.federation.rounds)
    return run.privacy.model_copy(update={"clip_norm": bound})


def planned_epochs(run: RunConfig, participations: int) -> int | None:
    """Returns the most epochs that one client trains in so many rounds; None without a schedule.

    The noise of a budget is planned for the rounds with the most epochs, whichever a client takes
    part in.
    """
    each = epochs_by_round(run)
    return sum(sorted(each, reverse=True)[:participations]) if each else None


def epochs_by_round(run: RunConfig) -> tuple[int, ...]:
    """Returns the epochs of every round; empty where they have no schedule."""
    schedule = run.client.schedule.epochs
    if schedule is None:
        return ()
    return _epochs_by_round(schedule, run.client.epochs, run.federation.rounds)


@lru_cache(maxsize=16)
def _epochs_by_round(schedule: Schedule, base: int, rounds: int) -> tuple[int, ...]:
    return tuple(_whole(schedule.value(base, number, rounds)) for number in range(1, rounds + 1))


def changed_in_round(run: RunConfig, number: int) -> dict[str, float]:
    """Returns the value in round ``number`` of each setting that has a schedule, by its name."""
    client = client_in_round(run, number)
    bound = privacy_in_round(run, number).clip_norm if run.private else client.max_grad_norm
    values = {"learning_rate": client.learning_rate, "epochs": client.epochs, "clip_norm": bound}
    return {name: values[name] or 0.0 for name in run.client.schedule.names}


def schedule_problems(run: RunConfig) -> Iterator[str]:
    """Yields what is wrong with the run's schedules, with the way out."""
    client, rounds = run.client, run.federation.rounds
    for name in client.schedule.names:
        schedule: Schedule = getattr(client.schedule, name)
        key = f"client.schedule.{name}"
        if schedule.problem:
            yield f"{key}: {schedule.problem}. Correct this schedule."
            return
    if client.schedule.epochs is not None and client.steps is not None:
        yield (
            f"client.schedule.epochs contradicts client.steps = {client.steps}, which replaces "
            "epochs. Leave one of them out."
        )
    if client.schedule.clip_norm is not None and client.max_grad_norm is None and not run.private:
        yield (
            "client.schedule.clip_norm needs client.max_grad_norm, whose value it changes: without "
            "it gradients are not bounded. Set it, or leave the schedule out."
        )
        return
    for name in client.schedule.names:
        yield from _out_of_bounds(run, name, rounds)


def _out_of_bounds(run: RunConfig, name: str, rounds: int) -> Iterator[str]:
    """Yields the first round whose value is out of the setting's own bounds."""
    schedule: Schedule = getattr(run.client.schedule, name)
    section: ClientConfig | Privacy = run.client
    key = {"clip_norm": "max_grad_norm"}.get(name, name)
    if name == "clip_norm" and run.private:
        section, key = run.privacy, "clip_norm"
    kind = type(section)
    for number in schedule.extremes(rounds):
        value: float = schedule.value(getattr(section, key), number, rounds)
        if name == "epochs" and value == value and value < 1e9:
            value = _whole(value)
        try:
            kind.__pydantic_validator__.validate_assignment(kind.model_construct(), key, value)
        except ValidationError as error:
            allowed = error.errors()[0]["msg"].partition(" should be ")[2]
            yield (
                f"client.schedule.{name} gives {value:.6g} in round {number} of {rounds}, expected "
                f"{allowed}, the bounds of {name}. Correct this schedule."
            )
            return


def _whole(epochs: float) -> int:
    return max(1, round(epochs))
