"""What a run over devices reads of its own: the task, and the cloud's data.

Nothing here imports torch before it is needed: that takes seconds, and a server that resumes a run
answers its devices before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.config.run import RunConfig
from fedcore.errors import TaskError
from fedcore.observability.patience import loading_told
from fedcore.rpc.hello import declared_name
from server.process.memory import loading

if TYPE_CHECKING:
    from fedcore.task.definition import Task
    from server.cloud import CloudData


class Inputs:
    """The task and the cloud's data of a run, each read when it is first needed."""

    def __init__(self, run: RunConfig) -> None:
        """Reads nothing yet."""
        self._run = run
        self._checked: list[CloudData | None] = []
        """The cloud's data, where `check` has read them and nobody has taken them."""

    @cached_property
    def task(self) -> Task:
        """The task.

        Raises:
            TaskError: it cannot be loaded, or has another name than its file states.
        """
        return load_named_task(self._run.path(self._run.task))

    def check(self, folder: Path, devices: Sequence[str]) -> None:
        """Refuses a run that could only fail after the results in ``folder`` were replaced.

        Args:
            folder: Where results will go.
            devices: The names of those that are enrolled.

        Raises:
            FedcoreError: whatever would have stopped it.
        """
        from server.live.finish import check_finish
        from server.preflight import check_rounds

        check_rounds(self._run, self.task, folder, clients=devices)
        released = self._run.release.repository is not None
        self._checked = [check_finish(self._run, self.task) if released else self._read_cloud()]

    def take_cloud(self) -> CloudData | None:
        """The cloud's data, which are not kept here; None where the task has none."""
        return self._checked.pop() if self._checked else self._read_cloud()

    def _read_cloud(self) -> CloudData | None:
        from fedcore.task.definition import data_folder
        from server.cloud import read_cloud_data

        holdout, seed = self._run.finetune.holdout, self._run.seed
        return read_cloud_data(self.task, data_folder(), holdout=holdout, seed=seed)


def load_named_task(path: Path) -> Task:
    """The task of a file, whose name is what devices are told while it is being loaded.

    Raises:
        TaskError: it cannot be loaded, or has another name than its file states.
    """
    with loading_told(), loading():
        import server.rounds.app  # noqa: F401 - what rounds need, beside the task itself
        from fedcore.task.definition import load_task

        task = load_task(path)
    declared = declared_name(path)
    if declared not in (None, task.name):
        raise TaskError(
            f"{path}: the file says `task = Task(name={declared!r}, ...)`, and the task is called "
            f"{task.name!r}. Nothing was trained; write its name out there, and start again."
        )
    return task
