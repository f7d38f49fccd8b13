"""`fedcore.check`: a check of a task and its data, without a full run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fedcore.flower.quiet import quiet
from fedcore.observability.foreign import say
from fedcore.observability.patience import FIRST_STEP, note_if_slow
from server.api.arguments import AnyRun, AnyTask, configured, loaded
from server.checking.check import check_task
from server.checking.findings import CheckFinding, Place, TaskCheck
from server.checking.selection import Asked


def check(
    task: AnyTask | None,
    run: AnyRun | None = None,
    *,
    clients: Asked = None,
    place: Place = "simulation",
    on_finding: Callable[[CheckFinding], None] = lambda finding: None,
    progress: bool = True,
    **settings: Any,
) -> TaskCheck:
    """Looks at the data of all parties, runs one step of everything, and says what would fail.

    Steps in order: clients, model, client data, cloud data, test data, loss, training, side by
    side, state, metrics, strategy, privacy, resume, fine-tuning, distributed, export, release. The
    steps that look at data all run; any other required step that fails ends the check.

    Example::

        checked = fedcore.check(task, clients="all", privacy={"unit": "example"})
        if not checked.ok:
            print(checked)

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run, or its file, whose settings decide which steps are required; None for default
            settings.
        clients: Clients whose rows are all looked at: ``"all"``, a number of them by chance, or
            names. When None, six, and the others as far as ten seconds allow.
        place: ``"simulation"`` if all data are here, ``"server"`` without the clients' data,
            ``"device"`` with the data of the one client in ``clients``.
        on_finding: Callback with each finding as soon as it is known.
        progress: Whether to print a notice on standard error while a step takes long.
        settings: Sections or settings of the run to override.

    Returns:
        The findings of each step. A failure of the task is a finding, not an exception.

    Raises:
        ConfigError: the run can't be read, or a setting is invalid.
        TaskError: the task's file doesn't exist, or contains no task.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    quiet()

    def around() -> AbstractContextManager[None]:
        return note_if_slow(FIRST_STEP) if progress else nullcontext()

    def tell(text: str) -> None:
        if progress:
            say(f"note: {text}", to=sys.stderr, flush=True)

    return check_task(
        config,
        found,
        clients=clients,
        place=place,
        tell=on_finding,
        progress=tell,
        around_first=around,
    )
