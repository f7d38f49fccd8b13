"""A quick check of a task as a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fedcore.flower.quiet import quiet
from fedcore.observability.patience import FIRST_STEP, told_if_slow
from server.api.asked import AnyRun, AnyTask, configured, loaded
from server.check import CheckFinding, TaskCheck, check_task


def check(
    task: AnyTask | None,
    run: AnyRun | None = None,
    *,
    client: str | None = None,
    on_finding: Callable[[CheckFinding], None] = lambda finding: None,
    progress: bool = True,
    **settings: Any,
) -> TaskCheck:
    """Runs one step of everything on one client's data, and finds in seconds what would fail later.

    Steps are: clients, client data, model, schema, loss, training, metrics, privacy, export, test
    data, cloud data. The first that fails and is required ends it.

    Example::

        checked = fedcore.check(task, privacy={"unit": "example"})
        if not checked.ok:
            print(checked)

    Args:
        task: A task, or the file that defines one; None for the one that the run names.
        run: The run, or its file, whose settings decide what is required; every default when None.
        client: The client whose data is used; the first one when None.
        on_finding: Gets each finding as soon as there is one.
        progress: Whether standard error says so where a first step takes long.
        settings: Sections or settings of the run that are to be others.

    Returns:
        What each step found. A failure of the task is a finding, not an error.

    Raises:
        ConfigError: the run cannot be read, or a setting is wrong.
        TaskError: the task's file does not exist, or holds no task.
    """
    asked = configured(task, run, settings)
    found = loaded(task, asked)
    quiet()

    def around() -> AbstractContextManager[None]:
        return told_if_slow(FIRST_STEP) if progress else nullcontext()

    return check_task(asked, found, client=client, tell=on_finding, around_first=around)
