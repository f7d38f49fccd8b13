"""Quick check of a task: runs one step of everything on the data of one client.

In: a run and its task. Out: a `TaskCheck` with one finding per step. Start with `check_task`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from fedcore.config.in_round import client_in_round, planned_epochs
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, TaskError
from fedcore.observability.words import counted
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SystemDraws
from fedcore.privacy.planning import PrivatePlan, plan_for
from fedcore.task.definition import Examples, Task, data_folder, size_of
from fedcore.task.kinds.protocol import OutputForm
from fedcore.task.kinds.settings import check_outputs
from fedcore.task.model import FullModel, build_model
from fedcore.training.batches import gather
from fedcore.training.evaluate import measure
from fedcore.training.examples import task_examples
from fedcore.training.local import train
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import train_private
from server.compression.export import export_onnx
from server.compression.runtime import answer, open_session
from server.preflight import check_strategy

_MAX_EXAMPLES = 64
_FIRST_STEPS = ("training", "privacy")
_WAYS = {
    "chain": "fastest method, for a chain of dense layers and convolutions",
    "vmap": "all examples of a batch at once",
    "alone": "one example at a time, which is slow",
}


@dataclass(frozen=True)
class CheckFinding:
    """The result of one step."""

    step: str
    ok: bool
    required: bool
    """Whether the run's configuration needs this step to succeed."""
    detail: str
    seconds: float

    @property
    def line(self) -> str:
        """The finding as one line: mark, step, detail and duration."""
        mark = "ok  " if self.ok else ("FAIL" if self.required else "note")
        return f"{mark} {self.step:<12} {self.detail} [{self.seconds:.2f} s]"


@dataclass(frozen=True)
class TaskCheck:
    """The findings of a check, one per step; ``str`` gives one line for each.

    Example::

        checked = fedcore.check("task.py")
        assert checked.ok, checked
    """

    findings: tuple[CheckFinding, ...]

    @property
    def ok(self) -> bool:
        """Whether every required step succeeded."""
        return all(finding.ok or not finding.required for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The overall result as a sentence."""
        return "This task is ready." if self.ok else "This task would fail."

    def __str__(self) -> str:
        """Returns one line per step, and the verdict."""
        return "\n".join([*(finding.line for finding in self.findings), self.verdict])


def check_task(
    run: RunConfig,
    task: Task,
    *,
    client: str | None,
    tell: Callable[[CheckFinding], None] = lambda finding: None,
    around_first: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> TaskCheck:
    """Runs the steps in order, each on the results of earlier steps.

    A required step that fails ends the check. Failures become findings and are not raised.

    Args:
        run: The run whose settings apply.
        task: The task to check.
        client: The client whose data is used; None for the first one.
        tell: Callback after each step, with its finding.
        around_first: Context manager around steps that may run the first training of the process,
            which is slow.

    Returns:
        The findings up to the step that ended the check.
    """
    state = _State(run, task, client)
    findings: list[CheckFinding] = []
    for step, required, work in _steps(state):
        started = time.monotonic()
        try:
            with around_first() if step in _FIRST_STEPS else nullcontext():
                ok, detail = True, work()
        except FedcoreError as error:
            ok, detail = False, str(error)
        except Exception as error:  # the task's code may raise anything; that is a finding
            ok, detail = False, f"{type(error).__name__}: {error}"
        findings.append(CheckFinding(step, ok, required, detail, time.monotonic() - started))
        tell(findings[-1])
        if required and not ok:
            break
    return TaskCheck(tuple(findings))


class _State:
    """Results that earlier steps leave for later ones."""

    def __init__(self, run: RunConfig, task: Task, client: str | None) -> None:
        self.run, self.task, self.client = run, task, client
        self.names: Sequence[str] = ()
        self.examples: Examples | None = None
        self.model: FullModel | None = None

    def sample_batch(self) -> tuple[Tensor, Tensor]:
        """Returns a batch of the client's examples, at most 64."""
        examples = cast(Examples, self.examples)
        return gather(examples, list(range(min(size_of(examples), _MAX_EXAMPLES))))

    def few(self) -> Examples:
        """Returns `sample_batch` as a dataset, so that large clients take no longer."""
        return torch.utils.data.TensorDataset(*self.sample_batch())  # type: ignore[return-value]


Step = tuple[str, bool, Callable[[], str]]


def _steps(state: _State) -> list[Step]:
    task = state.task
    return [
        ("clients", True, lambda: _clients(state)),
        ("client data", True, lambda: _client_data(state)),
        ("model", True, lambda: _model(state)),
        ("schema", True, lambda: _schema(state)),
        ("loss", True, lambda: _loss(state)),
        ("training", True, lambda: _training(state)),
        ("metrics", True, lambda: _metrics(state)),
        ("strategy", True, lambda: _strategy(state)),
        ("privacy", state.run.private, lambda: _privacy(state)),
        ("export", True, lambda: _export(state)),
        ("test data", True, lambda: _tests(state)),
        ("cloud data", task.cloud_data is not None, lambda: _cloud(state)),
    ]


def _clients(state: _State) -> str:
    names = list(state.task.clients(data_folder()))
    if not names:
        raise TaskError("clients() returned none, expected at least one.")
    if state.client is not None and state.client not in names:
        raise TaskError(f"client {state.client!r}: not among the {counted(len(names), 'client')}.")
    state.client, state.names = state.client or names[0], names
    return f"{counted(len(names), 'client')}; checking with {state.client!r}"


def _client_data(state: _State) -> str:
    name = cast(str, state.client)
    state.examples = task_examples(
        state.task,
        lambda: state.task.client_data(name, data_folder()),
        what=f"data of client {name!r}",
    )
    inputs, targets = state.sample_batch()
    return (
        f"{counted(size_of(state.examples), 'example')}: inputs {inputs.dtype} "
        f"{tuple(inputs.shape[1:])}, targets {targets.dtype} {tuple(targets.shape[1:])}"
    )


def _model(state: _State) -> str:
    state.model = build_model(state.task, state.run)
    count = sum(p.numel() for p in state.model.parameters())
    return f"{count:,} parameters, {count * 4 / 1e6:,.2f} MB an update"


def _schema(state: _State) -> str:
    inputs, targets = state.sample_batch()
    example = state.task.example_input
    if inputs.shape[1:] != example.shape or inputs.dtype != example.dtype:
        raise TaskError(
            f"example_input is {example.dtype} {tuple(example.shape)}, the client's inputs are "
            f"{inputs.dtype} {tuple(inputs.shape[1:])}: the exported model would refuse them."
        )
    if not torch.isfinite(inputs.float()).all():
        raise TaskError("the client's inputs contain values that are not finite.")
    outputs, task = _outputs(state, inputs), state.task
    form = OutputForm(outputs.shape[1:], outputs.dtype)
    check_outputs(task.problem, task.options, form, task=task.name, labels=task.labels)
    said = f"outputs {tuple(form.shape)} for targets {tuple(targets.shape[1:])}"
    classes, labels = task.problem.labels(form), task.labels
    if classes is not None:
        said = f"{classes} classes" + (f", named {labels[0]!r} to {labels[-1]!r}" if labels else "")
    return said


def _outputs(state: _State, inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        return cast(Tensor, cast(FullModel, state.model).eval()(inputs))


def _loss(state: _State) -> str:
    inputs, targets = state.sample_batch()
    value = state.task.loss_of(_outputs(state, inputs), targets)
    if value.ndim or not torch.isfinite(value):
        raise TaskError(f"the loss is {value.tolist()}, expected one finite number, the mean.")
    return f"{value.item():.4g} before training"


def _training(state: _State) -> str:
    run, model = state.run, cast(FullModel, state.model)
    value = train(
        model,
        state.few(),
        state.task.loss_of,
        run.client,
        epochs=1,
        batch_size=run.client.batch_size,
        rng=torch.Generator().manual_seed(run.seed),
    )
    return f"one epoch on at most {_MAX_EXAMPLES} examples, mean loss {value:.4g}"


def _metrics(state: _State) -> str:
    measured = measure(cast(FullModel, state.model), state.few(), state.task.metrics)
    found = [(metric.name, *measured.judged(metric)) for metric in state.task.metrics]
    for name, _, why in found:
        if name in measured.faults:
            raise TaskError(
                f"metric {name!r} failed: {why}. Correct its function in the task file."
            )
    return ", ".join(
        f"{name} undefined ({why})" if why else f"{name} {value:.4g}" for name, value, why in found
    )


def _strategy(state: _State) -> str:
    clients = state.names[: state.run.federation.cohort]
    return check_strategy(state.run, cast(FullModel, state.model), clients=clients)


def _privacy(state: _State) -> str:
    """Runs one private step, even if privacy is off, so that enabling it later can't surprise."""
    model, run = build_model(state.task, state.run), state.run
    method = choose_method(state.task, model)
    if run.private:  # rejects a delta that protects nobody on a client of this size
        count = size_of(cast(Examples, state.examples))
        rounds = run.federation.rounds
        plan_for(
            count,
            client_in_round(run, 1),
            run.privacy,
            round=1,
            participations=rounds,
            epochs_in_all=planned_epochs(run, rounds),
        )
    examples = state.few()
    charge = Charge(round=1, noise_multiplier=1.0, sample_rate=0.5, steps=2)
    skipped = train_private(
        model.preprocess,
        model.model,
        examples,
        state.task.loss_of,
        state.run.client,
        PrivatePlan(charge, clip_norm=state.run.privacy.clip_norm),
        method=method,
        draws=SystemDraws(),
    )
    said = f"example-level privacy: {_WAYS[method.name]}" + (
        f" ({method.why})" if method.why else ""
    )
    if skipped:
        said += f"; {counted(skipped, 'example')} without a finite gradient counted as zero"
    return said


def _export(state: _State) -> str:
    inputs, _ = state.sample_batch()
    model = cast(FullModel, state.model).eval()
    example = torch.stack([state.task.example_input] * 2)
    onnx = export_onnx(model, example, labels=state.task.labels, kind=state.task.problem.name)
    answered = torch.from_numpy(answer(open_session(onnx, threads=1), inputs.numpy()))
    error = (answered - _outputs(state, inputs)).abs().max().item()
    return f"ONNX of {len(onnx):,} bytes; largest difference from torch {error:.2g}"


def _cloud(state: _State) -> str:
    loader = state.task.cloud_data
    if loader is None:
        return "none: fine-tuning, its gate and every candidate except fp32 are skipped"
    return _other(state, "cloud data", loader)


def _tests(state: _State) -> str:
    task, name = state.task, cast(str, state.client)
    found, on_client = list[str](), task.client_test
    if task.test_data is not None:
        found.append(_other(state, "test data", task.test_data))
    if on_client is not None:
        what = f"test data of client {name!r}"
        count = _other(state, what, partial(on_client, name), least=0)  # others may have some
        found.append(f"{count} of client {name!r}")
    return "; ".join(found) or "none: no final test can show whether the result is worse"


def _other(
    state: _State, what: str, loader: Callable[[Path | None], Examples], *, least: int = 1
) -> str:
    examples = task_examples(state.task, lambda: loader(data_folder()), what=what, least=least)
    if not size_of(examples):
        return "no examples"
    inputs, _ = gather(examples, list(range(min(size_of(examples), _MAX_EXAMPLES))))
    if inputs.shape[1:] != state.task.example_input.shape:
        raise TaskError(
            f"{what}: inputs are {tuple(inputs.shape[1:])}, the clients' "
            f"{tuple(state.task.example_input.shape)}."
        )
    return f"{counted(size_of(examples), 'example')}"
