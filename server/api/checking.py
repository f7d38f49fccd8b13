"""`fedcore.check`: a quick check of a task, without a full run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fedcore.flower.quiet import quiet
from fedcore.observability.patience import FIRST_STEP, note_if_slow
from server.api.arguments import AnyRun, AnyTask, configured, loaded
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

    Steps in order: clients, client data, model, schema, loss, training, metrics, strategy, privacy,
    export, test data, cloud data. The first required step that fails ends the check.

    Example::

        checked = fedcore.check(task, privacy={"unit": "example"})
        if not checked.ok:
            print(checked)

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run, or its file, whose settings decide which steps are required; None for default
            settings.
        client: The client whose data is used; None for the first one.
        on_finding: Callback after each step, with its finding.
        progress: Whether to print a notice on standard error if the first training step takes long.
        settings: Sections or settings of the run to override.

    Returns:
        One finding per step. A failure of the task is a finding, not an exception.

    Raises:
        ConfigError: the run can't be read, or a setting is invalid.
        TaskError: the task's file doesn't exist, or contains no task.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    quiet()

    def around() -> AbstractContextManager[None]:
        return note_if_slow(FIRST_STEP) if progress else nullcontext()

    return check_task(config, found, client=client, tell=on_finding, around_first=around)
