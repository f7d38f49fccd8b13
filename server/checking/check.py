"""Checks a task and its data: looks at the data, then runs one step of every stage.

In: a run and its task. Out: a `TaskCheck` with the findings of each step. Start with `check_task`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fedcore.config.run import RunConfig
from fedcore.errors import DataFolderMissing, FedcoreError
from fedcore.task.definition import Task, data_folder
from server.checking import cloud_rehearsal, data_steps, rehearsal
from server.checking.findings import CheckFinding, Place, TaskCheck
from server.checking.progress import Tell
from server.checking.selection import Asked
from server.checking.state import CheckState, Fault, StepOutcome

NO_FOLDER = "data folder"
"""The fault that ends a check at once: no loader can read anything."""
_FIRST_STEPS = ("training", "privacy")
Findings = list[CheckFinding]


@dataclass(frozen=True)
class CheckStep:
    """A step of the check."""

    name: str
    required: bool
    """Whether the run needs it to succeed."""
    work: Callable[[], StepOutcome]
    last_of_group: bool = True
    """Whether the check ends here if this step, or one of its group before it, failed."""


def check_task(
    run: RunConfig,
    task: Task,
    *,
    clients: Asked = None,
    place: Place = "simulation",
    tell: Callable[[CheckFinding], None] = lambda finding: None,
    progress: Tell = lambda text: None,
    around_first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TaskCheck:
    """Runs the steps in order, each on the results of earlier steps.

    Steps that look at data all run; any other required step that fails ends the check. Failures
    become findings and are not raised.

    Args:
        run: The run whose settings apply.
        task: The task to check.
        clients: Whose rows are all looked at; see `server.checking.selection.Asked`.
        place: Where the task will run, which decides what data there must be.
        tell: Callback with each finding as soon as it is known.
        progress: Callback with a line of text while a step takes long.
        around_first: Context manager around steps that may run the first training of the process,
            which is slow.

    Returns:
        The findings up to the step that ended the check.
    """
    findings, failed = Findings(), False
    try:
        state = CheckState(run, task, place, clients, data_folder(), progress)
    except FedcoreError as error:
        findings.append(CheckFinding("clients", False, True, str(error), 0.0))
        tell(findings[0])
        return TaskCheck(tuple(findings))
    for step in _steps(state):
        with around_first() if step.name in _FIRST_STEPS else nullcontext():
            found = _run(step)
        for finding in found:
            findings.append(finding)
            tell(finding)
        failed = failed or any(one.required and not one.ok for one in found)
        if failed and (step.last_of_group or found[0].fault == NO_FOLDER):
            break
    return TaskCheck(tuple(findings))


def _run(step: CheckStep) -> Findings:
    started = time.monotonic()
    try:
        result = step.work()
    except DataFolderMissing as error:
        return [CheckFinding(step.name, False, True, str(error), 0.0, fault=NO_FOLDER)]
    except FedcoreError as error:
        result = StepOutcome(str(error))
        ok = False
    except (
        Exception,
        SystemExit,
    ) as error:  # the task's code may raise anything; that is a finding
        result = StepOutcome(f"{type(error).__name__}: {error}")
        ok = False
    else:
        ok = not any(fault.found.required for fault in result.faults)
    seconds = time.monotonic() - started
    whole = CheckFinding(step.name, ok, step.required, result.text, seconds)
    return [whole, *_of_faults(step, result.faults)]


def _of_faults(step: CheckStep, faults: Sequence[Fault]) -> Findings:
    """Returns faults as findings; those of one kind follow each other."""
    kinds = list(dict.fromkeys(fault.found.kind for fault in faults))
    ordered = sorted(faults, key=lambda fault: kinds.index(fault.found.kind))
    return [
        CheckFinding(
            step.name,
            False,
            step.required and fault.found.required,
            _named(fault),
            0.0,
            client=fault.client,
            row=fault.found.row,
            column=fault.found.column,
            fault=fault.found.kind,
        )
        for fault in ordered
    ]


def _named(fault: Fault) -> str:
    text, name = fault.found.text, fault.client
    if name is None or f"client {name!r}" in text:
        return text
    return f"client {name!r}{', ' if text.startswith('row ') else ': '}{text}"


def _steps(state: CheckState) -> list[CheckStep]:
    run, task = state.run, state.task
    data = [
        CheckStep("clients", True, lambda: data_steps.name_clients(state)),
        CheckStep("model", True, lambda: data_steps.make_model(state)),
        CheckStep("client data", True, lambda: data_steps.look_at_client_data(state), False),
        CheckStep(
            "cloud data",
            task.cloud_data is not None,
            lambda: data_steps.look_at_cloud_data(state),
            False,
        ),
        CheckStep("test data", True, lambda: data_steps.look_at_test_data(state)),
    ]
    training = [
        CheckStep("loss", True, lambda: rehearsal.compute_loss(state)),
        CheckStep("training", True, lambda: rehearsal.train_clients(state)),
        CheckStep("side by side", True, lambda: rehearsal.train_side_by_side(state)),
        CheckStep("state", True, lambda: rehearsal.keep_state(state)),
        CheckStep("metrics", True, lambda: rehearsal.compute_metrics(state)),
        CheckStep("strategy", True, lambda: rehearsal.try_strategy(state)),
        CheckStep("privacy", run.private, lambda: rehearsal.train_privately(state)),
        CheckStep("resume", True, lambda: cloud_rehearsal.try_resume(state)),
    ]
    return [*data, *training, *_cloud_steps(state)]


def _cloud_steps(state: CheckState) -> list[CheckStep]:
    run = state.run
    return [
        CheckStep("fine-tuning", True, lambda: cloud_rehearsal.fine_tune_here(state)),
        CheckStep(
            "distributed",
            run.finetune.processes > 1,
            lambda: cloud_rehearsal.fine_tune_distributed(state),
        ),
        CheckStep("export", True, lambda: cloud_rehearsal.build_candidates(state)),
        CheckStep(
            "release",
            run.release.repository is not None,
            lambda: cloud_rehearsal.try_release(state),
        ),
    ]
