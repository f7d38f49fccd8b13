"""`fedcore.measure_scaling`: how fine-tuning scales with workers, without training a model."""

from __future__ import annotations

from typing import Any

from fedcore.config.run import IN_MEMORY
from fedcore.errors import ConfigError
from fedcore.flower.quiet import quiet
from fedcore.observability.console import shown
from fedcore.observability.events import Sink, counted_steps
from fedcore.task.definition import data_folder
from server.after_rounds import StageLog
from server.api.arguments import AnyModel, AnyRun, AnyTask, configured, loaded, model_of
from server.cloud import read_cloud_data
from server.finetune.scaling import ScalingReport, measure_steps, workers_of


def measure_scaling(
    task: AnyTask | None,
    run: AnyRun | None,
    model: AnyModel,
    *,
    progress: bool | Sink = True,
    **settings: Any,
) -> ScalingReport:
    """Times some steps of fine-tuning with 1, 2, 4, ... processes, up to ``finetune.processes``.

    Nothing is trained: steps are computed, and their results dropped. Figures are honest only on a
    machine that does nothing else.

    Example::

        report = fedcore.measure_scaling("churn/task.py", "run.toml", "global.safetensors",
                                         finetune={"processes": 4, "price_per_hour": 2.5})
        print(report.table())
        report.plot("scaling.png")

    Args:
        task: A task's file; None for the one that the run names.
        run: The run, or its file; ``[finetune]`` and the seed are used. None for default settings.
        model: The model to start from, or its checkpoint. Not changed.
        progress: Whether to show progress, or a callback that receives the events.
        settings: Sections or settings of the run to override.

    Returns:
        Time against workers, with efficiency, communication, load balance, use of the processors,
        memory, energy and cost.

    Raises:
        ConfigError: the task was made in memory or has no cloud data, or several nodes are set.
        TrainingError: not even one process could compute steps.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    if config.task == IN_MEMORY:
        raise ConfigError(
            f"task {found.name!r} was created in memory, and processes that are timed load it from "
            "its file. Nothing was measured; write it to a file and pass the file's name."
        )
    if config.finetune.private:
        raise ConfigError(
            "finetune.privacy.unit = 'example': timed steps would read private data without a "
            "charge. Nothing was measured; set it to 'none', and measure with other data."
        )
    if config.finetune.nodes > 1:
        raise ConfigError(
            f"finetune.nodes = {config.finetune.nodes}: scaling is measured on one machine. "
            "Nothing was measured; set it to 1."
        )
    cloud = read_cloud_data(found, data_folder(), holdout=config.finetune.holdout, seed=config.seed)
    if cloud is None:
        raise ConfigError(
            f"task {found.name!r}: it has no cloud_data, so there is nothing to fine-tune on. "
            "Nothing was measured; give the task cloud_data."
        )
    quiet()
    start = model_of(model, found, config)
    with shown(progress) as emit, StageLog(emit).stage("scaling", len(workers_of(config))):
        return measure_steps(config, start, counted_steps(emit, "scaling"))
