"""Checks before a run: finds foreseeable failures before anything is replaced or trained.

In: run, task and owner's policy. Out: a `Prepared` run, or a `FedcoreError`. Start with `prepare`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError
from fedcore.observability.words import counted
from fedcore.task.definition import (
    Folder,
    Task,
    check_inputs,
    data_folder,
    require_folder,
    without_folder,
)
from fedcore.task.model import FullModel, build_model, warm_start
from fedcore.training.device import available
from fedcore.training.evaluate import output_shape
from fedcore.training.per_example.trial import choose_method
from fedcore.training.roles import is_judge
from fedcore.training.state import check_integers
from fedcore.updates.pack import layout_of, pack
from server.cloud import CloudData, cloud_data_of
from server.release.final_test import FinalTest, read_final_test
from server.release.named import describable
from server.release.publish import check_publishable
from server.release.push import check_push
from server.report.folder import check_outside
from server.rounds.client_privacy.mechanism import protect
from server.rounds.expected import evaluation_of
from server.rounds.roles import check_roles
from server.rounds.strategies.algorithm import dry_run
from server.rounds.strategies.feddf import FEDDF
from server.rounds.strategies.flower import choose_strategy
from server.rounds.strategies.own import UserStrategy
from server.rounds.strategies.state import strategy_state_of

_NAMED = 5  # clients in a message
_REHEARSED = 1000
"""Maximum number of client names used to try a strategy; a task may have millions."""


@dataclass(frozen=True)
class Prepared:
    """The checked inputs of a run."""

    data: Folder
    clients: Sequence[str]
    """Client names as the task provides them; a lazy sequence stays lazy."""
    cloud: CloudData | None
    test: FinalTest | None
    """The final test split; None if the server has none and the clients' is out of reach."""
    strategy: UserStrategy | type[UserStrategy] | None = None
    """The user's own strategy if it was made in Python; None if the run names its strategy."""


def prepare(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    folder: Path,
    *,
    strategy: UserStrategy | type[UserStrategy] | None = None,
) -> Prepared:
    """Reads the server's inputs, and rejects runs that would fail later.

    Args:
        run: The run.
        task: Its task.
        owner: The policy that simulated clients enforce.
        folder: Folder for results; existing content is not touched.
        strategy: The user's own strategy if it was made in Python.

    Returns:
        The checked inputs.

    Raises:
        FedcoreError: the run would fail. Nothing was run or replaced.
    """
    asked = tighten(run, owner)
    available(asked.client.device)
    data = data_folder()
    clients = clients_of(task, run, data)
    cohort = run.federation.cohort or len(clients)
    some = training_clients(run, clients, most=min(cohort, _REHEARSED))
    check_rounds(run, task, folder, clients=some, strategy=strategy)
    if run.client_private:
        protect(run, clients=len(clients), cohort=cohort)
    cloud, test = read_for_release(run, task, data, clients)
    return Prepared(data, clients, cloud, test, strategy)


def check_rounds(
    run: RunConfig,
    task: Task,
    folder: Path,
    *,
    clients: Sequence[str] = (),
    strategy: UserStrategy | type[UserStrategy] | None = None,
) -> None:
    """Rejects rounds that can't start: checks the model, its initial weights and the strategy.

    Args:
        run: The run.
        task: Its task.
        folder: Folder for results; existing content is not touched.
        clients: Names of some clients that a round may ask; empty if not known yet.
        strategy: The user's own strategy if it was made in Python.

    Raises:
        FedcoreError: rounds can't start. Nothing was run or replaced.
    """
    refuse_patience(run, task)
    refuse_tuning(run, task)
    model = build_model(task, run)
    task.check_model()
    if run.federation.initial is not None:
        check_outside(run.path(run.federation.initial), folder)
        warm_start(run, model)
    if run.private:
        choose_method(task, model)
    if run.federation.evaluate_cohort:
        evaluation_of(run, task.metrics, output_shape(model, task.example_input))
    if run.client_private:
        check_integers(task, model)
    check_strategy(run, model, clients=clients, strategy=strategy)


def refuse_patience(run: RunConfig, task: Task) -> None:
    """Rejects ``federation.patience`` where no data judge a round.

    Raises:
        ConfigError: no client holds data back, and the cloud cannot judge.
    """
    settings, unjudged = run.federation, f"task {task.name!r} has no cloud_data"
    if run.client.local:
        unjudged = "layers stay on clients (client.local)"
    judged = task.cloud_data is not None and not run.client.local
    asked = settings.evaluate_cohort and not run.private
    if settings.patience and not asked and not judged:
        silent = "federation.evaluate_cohort is 0"
        if run.private:
            silent = "clients evaluate no rounds under privacy"
        raise ConfigError(
            f"federation.patience = {settings.patience}: it waits for a round that is better, and "
            f"no data judge the rounds: {unjudged}, and {silent}. Nothing was run; have clients "
            "hold data back (federation.evaluate_cohort and federation.holdout, without privacy), "
            "or leave patience out."
        )


def refuse_tuning(run: RunConfig, task: Task) -> None:
    """Rejects fine-tuning between rounds, and FedDF, where the cloud has no data.

    Raises:
        ConfigError: the task has no ``cloud_data``.
    """
    if run.federation.strategy == FEDDF and task.cloud_data is None:
        raise ConfigError(
            f"federation.strategy = 'FedDF': task {task.name!r} has no cloud_data, by whose inputs "
            "the clients' models teach the global one. Nothing was run; give the task cloud_data "
            "(its targets are not read), or choose another strategy."
        )
    if run.finetune.in_rounds and task.cloud_data is None:
        name = "every" if run.finetune.every is not None else "after_stall"
        raise ConfigError(
            f"finetune.{name}: task {task.name!r} has no cloud_data to fine-tune on. Nothing was "
            f"run; give the task cloud_data, or leave finetune.{name} out."
        )


def check_strategy(
    run: RunConfig,
    model: FullModel,
    *,
    clients: Sequence[str] = (),
    strategy: UserStrategy | type[UserStrategy] | None = None,
) -> str:
    """Rejects a strategy that doesn't work for this run; tries custom ones on synthetic updates.

    Returns:
        A short description of the strategy.

    Raises:
        ConfigError: there is no such strategy, or its behaviour is rejected. Nothing was run.
    """
    size, label = layout_of(model.model).size, run.federation.strategy
    cohort = run.federation.cohort or max(len(clients), 1)
    chosen = choose_strategy(run, strategy, cohort=cohort, size=size)
    strategy_state_of(chosen.strategy)  # fails now, not at the first checkpoint
    if chosen.own is not None:
        dry_run(chosen.own.checked, label, pack(model.model), clients)
    return f"{label}: {'folds updates' if chosen.folds else 'needs every update of a round'}"


def read_for_release(
    run: RunConfig, task: Task, data: Folder, clients: Sequence[str] = ()
) -> tuple[CloudData | None, FinalTest | None]:
    """Reads the cloud's data and the final test split, which the steps after the rounds use.

    Args:
        run: The run.
        task: Its task.
        data: The folder that loaders receive.
        clients: Names of the simulated clients; empty for devices, whose data are out of reach.

    Raises:
        ReleaseError: the result couldn't be published.
        FedcoreError: the data can't be read, or doesn't match the task's example.
    """
    if run.release.repository is not None and run.release.keys is not None:
        describable(task)  # fails now, not after the rounds
        check_publishable(
            run.model_name,
            repository=run.path(run.release.repository),
            keys=run.path(run.release.keys),
            now=datetime.now(UTC),
        )
        if run.release.push is not None:
            check_push(
                run.path(run.release.repository), run.path(run.release.keys), run.release.push
            )
    cloud = cloud_data_of(run, task, data)
    test = read_final_test(run, task, data, clients)
    if cloud is not None:
        check_inputs(task, cloud.heldout, what=f"task {task.name!r}: cloud data")
    return cloud, test


def clients_of(task: Task, run: RunConfig, data: Folder) -> Sequence[str]:
    """Returns the names of a task's clients: unique, and at least as many as a cohort.

    Raises:
        DataError: listing them failed, or a name is not a string or not unique.
        ConfigError: there are fewer than ``federation.cohort``, or too few of them judge.
    """
    try:
        clients = task.clients(data)
        if not isinstance(clients, Sequence) or isinstance(clients, str):
            clients = tuple(clients)
        odd = next((one for one in clients if not isinstance(one, str)), None)
        different = _different(clients)
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # the task's code: any failure is a data error
        require_folder(f"task {task.name!r}: the names of its clients", data, error)
        raise DataError(
            f"task {task.name!r}: listing its clients failed: {type(error).__name__}: {error}. "
            f"{without_folder(data)}Nothing was trained."
        ) from error
    if odd is not None:
        raise DataError(
            f"task {task.name!r}: clients() returned {odd!r} of type {type(odd).__name__}, "
            "expected strings. Nothing was trained."
        )
    if not clients or different < len(clients):
        raise DataError(
            f"task {task.name!r}: clients() returned {counted(len(clients), 'client')}, "
            f"{different} of them different{_repeated(clients)}, expected at least one, each once. "
            "Nothing was trained."
        )
    if (run.federation.cohort or 1) > len(clients):
        raise ConfigError(
            f"federation.cohort = {run.federation.cohort}: task {task.name!r} has "
            f"{counted(len(clients), 'client')}. Nothing was trained; lower the cohort."
        )
    check_roles(run.federation, clients)
    return clients


def training_clients(run: RunConfig, clients: Sequence[str], *, most: int) -> list[str]:
    """Returns the names of the first clients that train, at most ``most``."""
    each = (clients[place] for place in range(len(clients)))  # it may not support slices
    return list(islice((one for one in each if not is_judge(run.federation, one)), most))


def _repeated(clients: Sequence[str]) -> str:
    """Names some clients that are listed more than once."""
    twice = [name for name, count in Counter(clients).items() if count > 1]
    if not twice:
        return ""
    named = ", ".join(map(repr, twice[:_NAMED]))
    return f" ({named}{', ...' if len(twice) > _NAMED else ''} more than once)"


def _different(clients: Sequence[str]) -> int:
    """Counts distinct names with 8 bytes each, because there may be millions."""
    hashes = np.fromiter(map(hash, clients), np.int64, len(clients))
    different = len(np.unique(hashes))
    # On a hash collision, which is rare, compare the names themselves.
    return different if different == len(clients) else len(set(clients))
