"""The cloud's own data, split into a training part and a held-out part."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.seeds import derive
from fedcore.task.definition import Examples, Folder, Task
from fedcore.training.batches import split
from fedcore.training.examples import task_examples


@dataclass(frozen=True)
class CloudData:
    """The cloud's data in two disjoint parts, neither of which overlaps the final test split."""

    train: Examples
    """Evaluates rounds, which don't train on it; fine-tuning, pruning and calibration use it
    afterwards."""
    heldout: Examples
    """Decides the fine-tuning gate and the choice among candidates. It doesn't evaluate rounds:
    selecting the best round on it would inflate that round's score, and the gate would reject real
    progress."""


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
