"""Inputs in the dtype of ``example_input``, and targets in the form that an own loss takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

import fedcore
from fedcore.errors import DataError
from fedcore.task.definition import Examples, Task
from fedcore.task.kinds.conform import shape_safe
from fedcore.training.batches import gather, gather_all
from fedcore.training.evaluate import evaluate
from fedcore.training.examples import TaskExamples, canonical

VALUES = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])


def task_of(example: Tensor, **changed: Any) -> Task:
    values: dict[str, Any] = {
        "kind": "regression",
        "model": lambda: nn.Linear(2, 1),
        "preprocess": Floats,
        **changed,
    }
    return Task(
        name="inputs",
        clients=lambda folder: ["anna"],
        client_data=lambda client, folder: pairs(VALUES),
        example_input=example,
        **values,
    )


class Floats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def pairs(inputs: Tensor, targets: Tensor | None = None) -> Examples:
    given = torch.zeros(len(inputs)) if targets is None else targets
    return TensorDataset(inputs, given)  # type: ignore[return-value]


def read(example: Tensor, inputs: Tensor) -> Tensor:
    return gather_all(canonical(task_of(example), pairs(inputs), what="data of 'anna'"))[0]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8],
)
def test_inputs_take_the_dtype_of_the_example(dtype: torch.dtype) -> None:
    found = read(torch.zeros(2), VALUES.to(dtype))
    assert found.dtype == torch.float32
    assert torch.equal(found, VALUES)


def test_integers_become_narrower_ones_where_each_value_is_kept() -> None:
    assert torch.equal(read(torch.zeros(2).byte(), VALUES.long()), VALUES.byte())
    assert torch.equal(read(torch.zeros(2).long(), VALUES.short()), VALUES.long())
    assert read(torch.zeros(2).bool(), (VALUES > 2).long()).dtype == torch.bool
    assert torch.equal(read(torch.zeros(2), VALUES > 2), (VALUES > 2).float())


@pytest.mark.parametrize(
    ("example", "inputs", "said"),
    [
        (torch.zeros(2).byte(), VALUES / 5, "row 0: inputs are torch.float32, .*uint8 .*0 to 255"),
        (
            torch.zeros(2).byte(),
            VALUES.round(),
            "row 0: .*conversion could change their",
        ),
        (
            torch.zeros(2).long(),
            VALUES.double(),
            "row 0: inputs are torch.float64, but",
        ),
        (torch.zeros(2).byte(), VALUES.long() * 100, "row 1: .*the value 300 of torch.int64"),
        (torch.zeros(2).byte(), VALUES.long() - 3, "row 0: .*the value -3 .*cannot represent"),
        (torch.zeros(2).bool(), VALUES.long(), "row 1: .*the value 2 of torch.int64"),
        (torch.zeros(2), VALUES.long() + 2**24, "row 0: .*1.67772e\\+07 of torch.int64"),
        (torch.zeros(2), VALUES.double() * 1e60, "row 0: .*1e\\+60 of torch.float64"),
        (torch.zeros(2), VALUES.to(torch.complex64), "row 0: inputs are torch.complex64"),
    ],
)
def test_inputs_whose_meaning_would_change_are_refused(
    example: Tensor, inputs: Tensor, said: str
) -> None:
    with pytest.raises(DataError, match=rf"^data of 'anna': {said}"):
        read(example, inputs)


def test_what_is_not_finite_stays_so() -> None:
    given = torch.tensor([[torch.nan, torch.inf]], dtype=torch.float64)
    assert torch.equal(read(torch.zeros(2), given).isnan(), torch.tensor([[True, False]]))


def test_a_subset_of_another_dtype_is_converted_row_by_row() -> None:
    part = Subset(pairs(VALUES.double()), [2, 1])
    found = canonical(task_of(torch.zeros(2)), part, what="data")  # type: ignore[arg-type]
    assert isinstance(found, TaskExamples)
    assert torch.equal(gather(found, [0])[0], VALUES[2:])
    assert found[1][0].tolist() == [2.0, 3.0]


def squeezed(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.huber_loss(outputs.squeeze(-1), targets)


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (nn.HuberLoss(), (3, 1)),  # it would broadcast (B, 1) and (B,) to (B, B)
        (nn.L1Loss(), (3, 1)),
        (squeezed, (3,)),  # it handles both itself
        (lambda o, t: (o.flatten() - t.flatten()).square().mean(), (3,)),
        (lambda o, t: (o - t).square().mean().sqrt(), (3, 1)),  # no mean over examples
        (lambda o, t: (o.squeeze(-1) - t).square().mean().sqrt(), (3,)),
        (lambda o, t: (o[:, 0] - t).abs().mean(), (3,)),
    ],
)
def test_an_own_loss_gets_targets_that_do_not_broadcast(
    loss: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    targets = torch.tensor([1.0, 2.0, 4.0])
    task = task_of(torch.zeros(2), loss=loss)
    _, double = gather_all(canonical(task, pairs(VALUES, targets.double()), what="data"))
    _, found = gather_all(canonical(task, pairs(VALUES, targets), what="data"))
    assert tuple(found.shape) == shape
    assert torch.equal(double, found)
    outputs = torch.tensor([[1.0], [3.0], [0.0]])
    whole = task.loss_of(outputs, found)
    alone = [loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(3)]
    squared = torch.stack(alone).square().mean().sqrt()
    assert any(torch.allclose(whole, one) for one in (torch.stack(alone).mean(), squared))


def test_an_own_loss_keeps_targets_of_its_own_form() -> None:
    def hazard(outputs: Tensor, targets: Tensor) -> Tensor:  # two outputs, time and event
        return (outputs[:, 0] * targets[:, 0] * targets[:, 1] + targets[:, 2]).mean()

    task = task_of(torch.zeros(2), loss=hazard, model=lambda: nn.Linear(2, 2))
    targets = torch.tensor([[1, 0, 2]] * 3)
    _, found = gather_all(canonical(task, pairs(VALUES, targets), what="data"))
    assert found is targets


def test_integers_stay_where_an_own_loss_takes_them() -> None:
    ints = torch.tensor([1, 2, 3])

    def poisson(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.poisson_nll_loss(outputs.squeeze(-1), targets)

    for loss, dtype in ((poisson, torch.int64), (nn.MSELoss(), torch.float32)):
        task = task_of(torch.zeros(2), loss=loss)
        _, found = gather_all(canonical(task, pairs(VALUES, ints), what="data"))
        assert found.dtype == dtype


def bias(outputs: Tensor, targets: Tensor) -> float:
    return (outputs - targets).abs().mean().item()


def test_an_own_metric_does_not_broadcast_either() -> None:
    targets = torch.tensor([1.0, 2.0, 4.0])
    metric = fedcore.Metric("bias", bias, higher_is_better=False)
    task = task_of(torch.zeros(2), metrics=(metric,))
    model = nn.Linear(2, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    examples = canonical(task, pairs(VALUES, targets), what="data")
    right = {"bias": pytest.approx(targets.mean().item())}
    assert evaluate(model, examples, task.metrics) == right
    assert bias(torch.zeros(3, 1), targets) == pytest.approx(right["bias"])  # zeros: by chance
    own = shape_safe(fedcore.Metric("first", lambda o, t: (o[:, 0] - t).abs().max().item(), False))
    assert own.compute(torch.tensor([[1.0], [2.0], [5.0]]), targets) == 1.0
    spread = shape_safe(metric)
    assert spread.compute(targets[:, None], targets) == 0.0
    assert bias(targets[:, None], targets) > 1.0
