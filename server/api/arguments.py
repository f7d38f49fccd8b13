"""Parsing of the arguments that API functions share: task, run, settings, model and progress."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.config.settings import load_run, with_settings
from fedcore.errors import ConfigError
from fedcore.files import read_bytes
from fedcore.observability.words import counted
from fedcore.task.definition import Task, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, FullModel, build_model, load_checkpoint
from fedcore.training.device import available
from server.rounds.strategies.own import UserStrategy, check_user_strategy, label_of

_UNNAMED = re.compile(r"[^a-z0-9_-]+")  # characters that a run's name can't contain
_MAX_NAMED = 64
AnyTask = Task | str | PathLike[str]
"""A task, or the path of the file that defines it."""
AnyRun = RunConfig | str | PathLike[str]
"""A run, or the path of its file."""
AnyModel = FullModel | str | PathLike[str]
"""A model, or the path of its checkpoint in safetensors format."""


def configured(task: AnyTask | None, run: AnyRun | None, settings: Mapping[str, Any]) -> RunConfig:
    """Builds the run from its arguments: file or object, task, and overrides.

    Args:
        task: A task, or its file; None for the task that the run names.
        run: A run, or its file; None for a run with default settings, named after the task.
        settings: Sections or settings to override.

    Returns:
        The run with all overrides applied.

    Raises:
        ConfigError: the run can't be read, a setting is invalid, or neither argument names a task.
    """
    if run is None and task is None:
        raise ConfigError(
            "expected a task or a run, got neither. Nothing was run; pass a task, or the file of "
            "a run that names one."
        )
    file = None if task is None or isinstance(task, Task) else Path(task).resolve()
    if run is None:
        named = (task.name if isinstance(task, Task) else file.stem if file else "").lower()
        name = _UNNAMED.sub("-", named).lstrip("-_")[:_MAX_NAMED] or "run"
        found = RunConfig(name=name, task="task.py")
    else:
        found = run if isinstance(run, RunConfig) else load_run(Path(run))
    if task is not None:
        found = found.model_copy(update={"task": IN_MEMORY if file is None else str(file)})
    return with_settings(found, settings)


def with_strategy(
    run: RunConfig, strategy: UserStrategy | type[UserStrategy] | str | None
) -> tuple[RunConfig, UserStrategy | type[UserStrategy] | None]:
    """Applies a strategy argument to a run.

    Returns:
        The run with the strategy's name, and the strategy if it was made in Python, else None.

    Raises:
        ConfigError: the object is not a strategy.
    """
    if strategy is None:
        return run, None
    if isinstance(strategy, str):
        return with_settings(run, {"federation": {"strategy": strategy}}), None
    check_user_strategy(strategy)
    options = run.federation.strategy_options if isinstance(strategy, type) else {}
    named = {"strategy": label_of(strategy), "strategy_options": options}
    federation = run.federation.model_copy(update=named)
    return run.model_copy(update={"federation": federation}), strategy


def loaded(task: AnyTask | None, run: RunConfig) -> Task:
    """Returns the task, loaded from its file if necessary.

    Raises:
        ConfigError: the run's task was made in memory, and no task was given.
        TaskError: the file doesn't exist, or contains no task.
    """
    if isinstance(task, Task):
        return task
    if run.task == IN_MEMORY:
        raise ConfigError(
            f"run {run.name!r} belongs to a task created in memory. Nothing was run; pass that "
            "task along with the run."
        )
    return load_task(run.path(run.task))


def refuse_elsewhere(run: RunConfig, task: Task, *, rounds: bool) -> None:
    """Rejects a task made in memory if some step needs processes that load it from a file.

    Forked workers inherit such a task, and single-process fine-tuning runs in this process. Spawned
    processes could only load the task from its file.

    Args:
        run: The run from `configured`.
        task: Its task.
        rounds: Whether the call also trains clients.

    Raises:
        ConfigError: a step needs spawned processes, and the task was made in memory.
    """
    if run.task != IN_MEMORY:
        return
    needs = []
    if task.cloud_data is not None and run.finetune.epochs:
        several = {name: getattr(run.finetune, name) for name in ("processes", "nodes")}
        needs += [f"finetune.{name} = {number}" for name, number in several.items() if number > 1]
        needs += ["finetune.auto"] if run.finetune.auto else []
    if rounds and run.simulation.engine == "ray":
        needs.append("simulation.engine = 'ray'")
    gpus = torch.cuda.device_count() if available(run.client.device).type == "cuda" else 0
    if rounds and gpus and (run.simulation.workers or gpus) > 1:
        needs.append(f"simulation.workers = {run.simulation.workers} with {counted(gpus, 'GPU')}")
    if needs:
        raise ConfigError(
            f"{' and '.join(needs)}: this starts processes that load the task from its file, but "
            f"task {task.name!r} was created in memory. Nothing was run; write it to a file and "
            "pass the file's name instead, or pass finetune={'processes': 1} and "
            "simulation={'engine': 'local', 'workers': 1}."
        )


def model_of(model: AnyModel, task: Task, run: RunConfig) -> FullModel:
    """Returns the model, loaded from its checkpoint if a path is given.

    Raises:
        DataError: the file can't be read, or doesn't match the model.
    """
    if isinstance(model, FullModel):
        return model
    raw = read_bytes(Path(model), max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
    built = build_model(task, run)
    load_checkpoint(raw, built, where=str(model))
    return built.eval()
