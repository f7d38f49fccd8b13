"""Looks at the data of a simulation before its first round: rows that training could not use.

In: a prepared run. Out: nothing, or a `DataError` with client, row and remedy. Start with
`refuse_bad_rows`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Subset

from fedcore.config.run import RunConfig
from fedcore.errors import DataError
from fedcore.observability.words import counted
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.missing import missing_allowed
from fedcore.task.model import FullModel, build_model
from fedcore.training.examples import TaskExamples
from server.checking.clients import look_at_clients
from server.checking.looking import Expected, look_at
from server.checking.progress import StepProgress, Tell
from server.preflight import Prepared

LOOK_S = 3.0
"""Time for all rows of clients, again for first and last rows of the others, and for the server's
data."""
_NAMED = 5  # faults in the message
Found = tuple[str, str]
"""A kind of fault, and what it is and where."""


def refuse_bad_rows(run: RunConfig, task: Task, prepared: Prepared, tell: Tell) -> None:
    """Looks at as many rows as `LOOK_S` allows, and refuses a run some of whose rows are unusable.

    A client whose data cannot be read at all, or are empty, is left to the rounds, in which it
    fails alone as a device does that is away.

    Args:
        run: The run.
        task: Its task.
        prepared: The checked inputs of the run.
        tell: Callback with a line of text while this takes long.

    Raises:
        DataError: rows have another shape, dtype or number of values than the task's example,
            targets without a meaning, or values that are not finite where the model takes none.
    """
    model = _Model(run, task)
    nowhere = torch.zeros(task.example_input.shape, dtype=torch.bool)
    found = _faults(task, prepared, Expected(task, nowhere), model, tell)
    if any(kind == "not finite" for kind, _ in found):
        allowed = missing_allowed(model.built, task.example_input, task.named_inputs)
        if allowed.any():
            found = _faults(task, prepared, Expected(task, allowed), model, tell)
    if not found:
        return
    more = len(found) - _NAMED
    named = "; ".join(text for _, text in found[:_NAMED])
    if more > 0:
        named += f"; and {counted(more, 'other fault')}"
    raise DataError(
        f"task {task.name!r}: {named}. Nothing was run; `fedcore check`, or fedcore.check in "
        "Python, lists every fault."
    )


class _Model:
    """The run's model, built when it is first asked for."""

    def __init__(self, run: RunConfig, task: Task) -> None:
        self._run, self._task = run, task

    @cached_property
    def built(self) -> FullModel:
        return build_model(self._task, self._run).eval()

    def __call__(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.built(inputs)
        return found


def _faults(
    task: Task, prepared: Prepared, expected: Expected, model: _Model, tell: Tell
) -> list[Found]:
    looked = look_at_clients(
        task,
        prepared.data,
        prepared.clients,
        (),
        expected,
        accepts=model,
        only=False,
        progress=StepProgress("client data", tell),
        budget_s=LOOK_S,
        compared=False,
    )
    found = [
        (one.fault.kind, _of_client(one.client, one.fault.text))
        for one in looked.faults
        if one.fault.row is not None
    ]
    end_s = time.monotonic() + LOOK_S
    for what, examples in _on_server(task, prepared):
        rows: Sequence[int] = range(size_of(examples))
        seen = look_at(examples, expected, rows=rows, more=lambda: time.monotonic() < end_s)
        found += [(one.kind, f"{what}, {one.text}") for one in seen.faults]
    return found


def _of_client(name: str, text: str) -> str:
    return text if f"client {name!r}" in text else f"client {name!r}, {text}"


def _on_server(task: Task, prepared: Prepared) -> Iterator[tuple[str, Examples]]:
    """Yields the data that the server has, as the task's loaders gave them."""
    cloud, test = prepared.cloud, prepared.test
    if cloud is not None and task.cloud_heldout is not None:
        yield "cloud data", _given(cloud.train)
        yield "held-out cloud data", _given(cloud.heldout)
    elif cloud is not None:
        yield "cloud data", _given(cast(Subset[tuple[Tensor, Tensor]], cloud.train).dataset)
    if test is not None:
        if not test.pooled:
            yield "test data", _given(test.examples)
        for name, examples in test.clients.items():
            yield f"test data of client {name!r}", _given(examples)


def _given(examples: Examples) -> Examples:
    """Returns a data set without the conversions that would refuse a row at its first reading."""
    return examples.dataset if isinstance(examples, TaskExamples) else examples
