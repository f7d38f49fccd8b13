"""The cloud's own data, split into a training part and a held-out part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Folder, Task
from fedcore.training.batches import split
from fedcore.training.examples import task_examples


@dataclass(frozen=True)
class CloudData:
    """The cloud's data in disjoint parts, none of which overlaps the final test split."""

    train: Examples
    """Evaluates rounds, which don't train on it; fine-tuning, pruning and calibration use it
    afterwards."""
    heldout: Examples
    """Decides the fine-tuning gate and the choice among candidates. It doesn't evaluate rounds:
    selecting the best round on it would inflate that round's score, and the gate would reject real
    progress."""
    apart: Examples | None = None
    """Evaluates rounds in place of ``train``, where the global model learns from that between
    rounds (fine-tuning, FedDF). Disjoint from both other parts."""
    private: Examples | None = None
    """What fine-tuning trains on in place of ``train``, with DP-SGD (``finetune.privacy``). No
    other step reads it: all other parts are then of the task's ``cloud_heldout``."""

    @property
    def of_tuning(self) -> Examples:
        """Data that fine-tuning trains on."""
        return self.train if self.private is None else self.private

    @property
    def of_rounds(self) -> Examples:
        """Data that evaluate rounds: no round has trained on them, directly or by fine-tuning."""
        return self.train if self.apart is None else self.apart


def cloud_data_of(run: RunConfig, task: Task, folder: Folder) -> CloudData | None:
    """Reads and splits the cloud's data as a run needs them; returns None if the task has none.

    Where the global model learns from the cloud's data between rounds, and the cloud evaluates
    rounds, it does so by half of what is held out.

    Raises:
        DataError: the data can't be read.
    """
    settings = run.finetune
    found = read_cloud_data(
        task, folder, holdout=settings.holdout, seed=run.seed, private=settings.private
    )
    learns = run.finetune.in_rounds or run.federation.strategy == "FedDF"
    if found is None or not learns or run.federation.evaluate_cohort:
        return found
    gate, rounds = split(found.heldout, 0.5, derive(run.seed, "cloud, rounds"))
    return replace(found, heldout=gate, apart=rounds)


def read_cloud_data(
    task: Task, folder: Folder, *, holdout: float, seed: int, private: bool = False
) -> CloudData | None:
    """Reads and splits the cloud's data; returns None if the task has none.

    Args:
        task: The task.
        folder: What ``FEDCORE_DATA`` names.
        holdout: The share held out at random, unless the task provides its own held-out data.
        seed: The run's seed.
        private: Whether DP-SGD protects the data, so that other steps use held-out data alone.

    Raises:
        ConfigError: ``private``, and the task has no held-out data of its own.
        DataError: the data can't be read.
    """
    loader = task.cloud_data
    if loader is None:
        return None
    what = f"task {task.name!r}: cloud data"
    examples = task_examples(task, lambda: loader(folder), what=what, folder=folder)
    judge = task.cloud_heldout
    if private and judge is None:
        raise ConfigError(
            f"task {task.name!r}: finetune.privacy.unit = 'example' needs cloud_heldout: the gate, "
            "calibration and the choice of a candidate read data without noise, which must not be "
            "of those that are protected. Nothing was trained; give the task public held-out data."
        )
    if judge is not None:
        what = f"task {task.name!r}: held-out cloud data"
        heldout = task_examples(task, lambda: judge(folder), what=what, folder=folder)
        if private:
            public, heldout = split(heldout, 0.5, derive(seed, "cloud, public"))
            return CloudData(public, heldout, private=examples)
        return CloudData(examples, heldout)
    train, heldout = split(examples, holdout, derive(seed, "cloud"))
    return CloudData(train, heldout)
