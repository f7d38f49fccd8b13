"""What a call is given: a task, a run and settings of it, and where progress is shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.config.settings import load_run, with_settings
from fedcore.errors import ConfigError
from fedcore.files import read_bytes
from fedcore.observability.console import choose
from fedcore.observability.events import Sink, tee
from fedcore.observability.words import counted
from fedcore.task.definition import Task, load_task
from fedcore.task.model import MAX_CHECKPOINT_BYTES, FullModel, build_model, load_checkpoint
from fedcore.training.device import available
from server.rounds.own_strategy import Own, check_own, label_of

_UNNAMED = re.compile(r"[^a-z0-9_-]+")  # what the name of a run may not have
_MOST_NAMED = 64
AnyTask = Task | str | PathLike[str]
"""A task, or the file that defines it."""
AnyRun = RunConfig | str | PathLike[str]
"""A run, or its file."""
AnyModel = FullModel | str | PathLike[str]
"""A model, or a checkpoint of it in safetensors."""


def configured(task: AnyTask | None, run: AnyRun | None, settings: Mapping[str, Any]) -> RunConfig:
    """The run that is asked for, with its settings.

    Args:
        task: A task, or its file; None for the one that the run names.
        run: A run, or its file; None for one with every default, named after the task.
        settings: Sections or settings that are to be others.

    Raises:
        ConfigError: the run cannot be read, a setting is wrong, or neither names a task.
    """
    if run is None and task is None:
        raise ConfigError(
            "neither a task nor a run was given. Nothing was run; give a task, or the file of a "
            "run that names one."
        )
    file = None if task is None or isinstance(task, Task) else Path(task).resolve()
    if run is None:
        named = (task.name if isinstance(task, Task) else file.stem if file else "").lower()
        name = _UNNAMED.sub("-", named).lstrip("-_")[:_MOST_NAMED] or "run"
        found = RunConfig(name=name, task="task.py")
    else:
        found = run if isinstance(run, RunConfig) else load_run(Path(run))
    if task is not None:
        found = found.model_copy(update={"task": IN_MEMORY if file is None else str(file)})
    return with_settings(found, settings)


def with_strategy(
    run: RunConfig, strategy: Own | type[Own] | str | None
) -> tuple[RunConfig, Own | type[Own] | None]:
    """The run with that strategy, and the strategy itself where it was made in Python.

    Raises:
        ConfigError: it is none.
    """
    if strategy is None:
        return run, None
    if isinstance(strategy, str):
        return with_settings(run, {"federation": {"strategy": strategy}}), None
    check_own(strategy)
    options = run.federation.strategy_options if isinstance(strategy, type) else {}
    named = {"strategy": label_of(strategy), "strategy_options": options}
    federation = run.federation.model_copy(update=named)
    return run.model_copy(update={"federation": federation}), strategy


def loaded(task: AnyTask | None, run: RunConfig) -> Task:
    """The task itself.

    Raises:
        ConfigError: the run is of a task that was made in memory, which is not given.
        TaskError: there is no such file, or no task in it.
    """
    if isinstance(task, Task):
        return task
    if run.task == IN_MEMORY:
        raise ConfigError(
            f"run {run.name!r} is of a task that was made in memory. Nothing was run; give that "
            "task along with the run."
        )
    return load_task(run.path(run.task))


def refuse_elsewhere(run: RunConfig, task: Task, *, rounds: bool) -> None:
    """Refuses steps of a task made in memory that run in processes which load it from its file.

    Forked workers inherit such a task, and one process of fine-tuning is this one; processes that
    are started afresh have only the file.

    Args:
        run: As `configured` gives it.
        task: Its task.
        rounds: Whether clients are trained as well.

    Raises:
        ConfigError: there are such steps.
    """
    if run.task != IN_MEMORY:
        return
    needs = []
    if task.cloud_data is not None and run.finetune.epochs and run.finetune.processes > 1:
        needs.append(f"finetune.processes = {run.finetune.processes}")
    if rounds and run.simulation.engine == "ray":
        needs.append("simulation.engine = 'ray'")
    gpus = torch.cuda.device_count() if available(run.client.device).type == "cuda" else 0
    if rounds and gpus and (run.simulation.workers or gpus) > 1:
        needs.append(f"simulation.workers = {run.simulation.workers} with {counted(gpus, 'GPU')}")
    if needs:
        raise ConfigError(
            f"{' and '.join(needs)}: this starts processes that load the task from its file, and "
            f"task {task.name!r} was made in memory. Nothing was run; write it to a file and give "
            "that one's name in its place, or pass finetune={'processes': 1} and "
            "simulation={'engine': 'local', 'workers': 1}."
        )


def model_of(model: AnyModel, task: Task, run: RunConfig) -> FullModel:
    """The model, read from its checkpoint where a file is named.

    Raises:
        DataError: the file cannot be read, or is of another model.
    """
    if isinstance(model, FullModel):
        return model
    raw = read_bytes(Path(model), max_bytes=MAX_CHECKPOINT_BYTES, what="a checkpoint")
    built = build_model(task, run)
    load_checkpoint(raw, built, where=str(model))
    return built.eval()


def shown(progress: bool | Sink) -> AbstractContextManager[Sink]:
    """Where progress goes: to standard error or the notebook's cell, to a function, or nowhere."""
    if callable(progress):
        return nullcontext(progress)
    return choose(sys.stderr, json=False) if progress else nullcontext(tee())
