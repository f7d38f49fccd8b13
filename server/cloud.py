"""The cloud's own data, split into a training part and a held-out part."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedcore.config.run import RunConfig
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
    found = read_cloud_data(task, folder, holdout=run.finetune.holdout, seed=run.seed)
    learns = run.finetune.in_rounds or run.federation.strategy == "FedDF"
    if found is None or not learns or run.federation.evaluate_cohort:
        return found
    gate, rounds = split(found.heldout, 0.5, derive(run.seed, "cloud, rounds"))
    return replace(found, heldout=gate, apart=rounds)


def read_cloud_data(task: Task, folder: Folder, *, holdout: float, seed: int) -> CloudData | None:
    """Reads and splits the cloud's data; returns None if the task has none.

    ``holdout`` is the share held out at random, unless the task provides its own held-out data.

    Raises:
        DataError: the data can't be read.
    """
    loader = task.cloud_data
    if loader is None:
        return None
    what = f"task {task.name!r}: cloud data"
    examples = task_examples(task, lambda: loader(folder), what=what, folder=folder)
    judge = task.cloud_heldout
    if judge is not None:
        what = f"task {task.name!r}: held-out cloud data"
        heldout = task_examples(task, lambda: judge(folder), what=what, folder=folder)
        return CloudData(examples, heldout)
    train, heldout = split(examples, holdout, derive(seed, "cloud"))
    return CloudData(train, heldout)
