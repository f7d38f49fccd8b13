"""Joining other machines that fine-tune."""

from __future__ import annotations

from typing import Any

from fedcore.errors import ConfigError
from fedcore.task.definition import data_folder
from server.api.arguments import AnyRun, AnyTask, configured, loaded, refuse_elsewhere
from server.cloud import read_cloud_data
from server.finetune.launch import join


def join_finetuning(task: AnyTask | None, run: AnyRun, **settings: Any) -> None:
    """Lends this machine's processes to another one's fine-tuning, until it ends.

    Args:
        task: A task file; None for the one that the run names.
        run: The run, or its file, with the same settings as on the other nodes.
        settings: Sections or settings of the run to override.

    Raises:
        ConfigError: ``finetune.nodes`` is 1, the task has no cloud data, or nodes differ.
        TrainingError: the nodes did not meet within ``finetune.rendezvous_s``, or training failed.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    refuse_elsewhere(config, found, rounds=False)
    tuning = config.finetune
    cloud = read_cloud_data(
        found, data_folder(), holdout=tuning.holdout, seed=config.seed, private=tuning.private
    )
    if cloud is None:
        raise ConfigError(
            f"task {found.name!r}: it has no cloud_data, so there is nothing to fine-tune on. "
            "Nothing was trained; give the task cloud_data."
        )
    join(found, config, cloud)
