"""The cloud's own data, split once: what trains, and what judges."""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.seeds import derive
from fedcore.task.definition import Examples, Folder, Task, read_examples
from fedcore.training.batches import split


@dataclass(frozen=True)
class CloudData:
    """Disjoint parts of the cloud's data. The final test split is in neither."""

    train: Examples
    """Judges rounds, which have not seen it; then fine-tuning, pruning and calibration use it."""
    heldout: Examples
    """The gate and the choice among candidates. Had it judged rounds too, the best of them would
    look better on it than it is, and the gate would turn real progress away."""


def read_cloud_data(task: Task, folder: Folder, *, holdout: float, seed: int) -> CloudData | None:
    """The cloud's data, or None when the task has none.

    ``holdout`` is the share that is held out at random, unless the task names what is held out.
    """
    loader = task.cloud_data
    if loader is None:
        return None
    examples = read_examples(lambda: loader(folder), what=f"task {task.name!r}: cloud data")
    judge = task.cloud_heldout
    if judge is not None:
        what = f"task {task.name!r}: held-out cloud data"
        return CloudData(examples, read_examples(lambda: judge(folder), what=what))
    train, heldout = split(examples, holdout, derive(seed, "cloud"))
    return CloudData(train, heldout)
