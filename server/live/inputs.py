"""The server's own inputs of a deployment: the task, and the cloud's data.

They load lazily. Importing torch takes seconds, and a server that resumes a run answers its devices
before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.config.run import RunConfig
from fedcore.errors import TaskError
from fedcore.observability.patience import report_loading
from fedcore.rpc.hello import declared_name
from server.process.memory import loading

if TYPE_CHECKING:
    from fedcore.task.definition import Task
    from server.cloud import CloudData


class Inputs:
    """The task and the cloud's data of a run, each loaded on first use."""

    def __init__(self, run: RunConfig) -> None:
        """Stores the configuration; reads nothing yet."""
        self._run = run
        self._checked: list[CloudData | None] = []
        """The cloud's data that `check` has read, until `take_cloud` returns them."""

    @cached_property
    def task(self) -> Task:
        """The run's task, loaded on first access.

        Raises:
            TaskError: the task cannot be loaded, or its name differs from the one in its file.
        """
        return load_named_task(self._run.path(self._run.task))

    def check(self, folder: Path, devices: Sequence[str]) -> None:
        """Runs all checks that can reject the run, before the results in ``folder`` are replaced.

        Args:
            folder: Folder for the run's results.
            devices: Names of the enrolled devices.

        Raises:
            FedcoreError: a check failed, so the run would fail later.
        """
        from server.live.finish import check_finish
        from server.preflight import check_rounds

        check_rounds(self._run, self.task, folder, clients=devices)
        released = self._run.release.repository is not None
        self._checked = [check_finish(self._run, self.task) if released else self._read_cloud()]

    def take_cloud(self) -> CloudData | None:
        """Returns the cloud's data without keeping a reference; None if the task has none."""
        return self._checked.pop() if self._checked else self._read_cloud()

    def _read_cloud(self) -> CloudData | None:
        from fedcore.task.definition import data_folder
        from server.cloud import cloud_data_of

        return cloud_data_of(self._run, self.task, data_folder())


def load_named_task(path: Path) -> Task:
    """Loads a task from its file, and checks its name against the literal one in the source.

    A resumed server sends devices the name in the source before it has loaded the task.

    Raises:
        TaskError: the task cannot be loaded, or its name differs from the one in its file.
    """
    with report_loading(), loading():
        import server.rounds.app  # noqa: F401 - the other slow import that rounds need
        from fedcore.task.definition import load_task

        task = load_task(path)
    declared = declared_name(path)
    if declared not in (None, task.name):
        raise TaskError(
            f"{path}: the file contains `task = Task(name={declared!r}, ...)`, but the task's "
            f"name is {task.name!r}. Nothing was trained; write that name literally in the file, "
            "and start again."
        )
    return task
