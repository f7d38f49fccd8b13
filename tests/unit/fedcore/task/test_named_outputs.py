"""Several outputs by name, each of its own kind: they train as one vector would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedcore
from fedcore.errors import DataError, TaskError
from fedcore.task.definition import Task
from fedcore.task.kinds.protocol import Kind
from fedcore.task.kinds.several import SeveralOutputs
from fedcore.task.model import build_model
from fedcore.training.batches import gather_all
from fedcore.training.examples import task_examples

KINDS = {"kind": "classification", "size": "regression", "mask": "segmentation"}
Named = Mapping[str, Tensor]


class Rows(Dataset[Any]):
    def __init__(self, change: Callable[[int, dict[str, Any]], None] | None = None) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(12, 4, generator=rng)
        self.change = change

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Any:
        x = self.x[row]
        targets: dict[str, Any] = {
            "size": x[:2] * 3,
            "mask": (x > 0).long(),
            "kind": int(x.argmax()) % 3,
        }
        if self.change:
            self.change(row, targets)
        return x, targets


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind, self.size, self.mask = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask = self.mask(x).reshape(-1, 2, 4)
        return {"mask": mask, "size": self.size(x), "kind": self.kind(x)}


def task_of(rows: Dataset[Any] | None = None, **changes: Any) -> Task:
    settings: dict[str, Any] = {
        "name": "parts",
        "kind": KINDS,
        "model": Network,
        "clients": lambda folder: ["anna", "ben"],
        "client_data": lambda name, folder: rows or Rows(),
        "cloud_data": lambda folder: rows or Rows(),
        "test_data": lambda folder: rows or Rows(),
        "example_input": torch.zeros(4),
        **changes,
    }
    return Task(**settings)


def batch(task: Task) -> tuple[Tensor, Tensor]:
    return gather_all(
        task_examples(task, lambda: task.client_data("anna", None), what="anna", folder=None)
    )


@pytest.fixture
def run() -> fedcore.RunConfig:
    return fedcore.RunConfig(name="run", task="task.py")


def test_loss_and_metrics_are_those_of_the_parts(run: fedcore.RunConfig) -> None:
    task = task_of()
    inputs, targets = batch(task)
    assert targets.shape == (12, 1 + 2 + 4)
    model = build_model(task, run)
    outputs = model(inputs)
    parts = Network.forward(model.model, inputs)  # type: ignore[arg-type]
    rows = [Rows()[row][1] for row in range(12)]
    kinds = torch.tensor([each["kind"] for each in rows])
    sizes, masks = (torch.stack([each[name] for each in rows]) for name in ("size", "mask"))
    expected = (
        nn.functional.cross_entropy(parts["kind"], kinds)
        + nn.functional.mse_loss(parts["size"], sizes)
        + nn.functional.cross_entropy(parts["mask"], masks)
    )
    assert torch.allclose(task.loss_of(outputs, targets), expected)
    names = [each.name for each in task.metrics]
    assert names[:3] == ["kind_accuracy", "size_rmse", "size_mae"]
    right = (parts["kind"].argmax(1) == kinds).float().mean()
    assert task.primary.compute(outputs.detach(), targets) == pytest.approx(float(right))


def test_own_loss_and_metrics_get_names(run: fedcore.RunConfig) -> None:
    def loss(outputs: Named, targets: Named) -> Tensor:
        assert targets["kind"].dtype == torch.int64
        return (outputs["size"] - targets["size"]).square().mean()

    def worst(outputs: Named, targets: Named) -> float:
        return float((outputs["size"] - targets["size"]).abs().max())

    metric = fedcore.Metric("worst", worst, higher_is_better=False)  # type: ignore[arg-type]
    task = replace(task_of(loss=loss, metrics=(metric,)))  # a copy wraps nothing twice
    inputs, targets = batch(task)
    outputs = build_model(task, run)(inputs)
    assert task.loss_of(outputs, targets).item() > 0
    assert task.primary.compute(outputs.detach(), targets) > 0
    teacher = outputs.detach() + 1
    far = task.problem.distance(outputs, teacher, targets, task.loss_of)
    assert far.item() == pytest.approx(1)


def test_a_copy_of_a_task_with_named_inputs_works_too(run: fedcore.RunConfig) -> None:
    class Both(Network):
        def forward(self, x: Any) -> dict[str, Tensor]:
            return super().forward(torch.cat([x["one"], x["two"]], dim=1))

    class ByName(Rows):
        def __getitem__(self, row: int) -> Any:
            x, targets = super().__getitem__(row)
            return {"one": x[:1], "two": x[1:]}, targets

    example = {"one": torch.zeros(1), "two": torch.zeros(3)}
    task = task_of(ByName(), model=Both, student=Both, example_input=example)
    for each in (task, replace(task), replace(replace(task), name="other")):
        inputs, targets = batch(each)
        outputs = build_model(each, run)(inputs)
        assert (inputs.shape, outputs.shape, targets.shape) == ((12, 4), (12, 13), (12, 7))
        assert each.student is not None


def test_agreement_is_that_of_the_worst_output() -> None:
    kind = task_of().problem
    assert isinstance(kind, SeveralOutputs)
    one = np.random.default_rng(0).normal(size=(50, 13)).astype(np.float32)
    other = one.copy()
    other[:, :3] = -other[:, :3]
    other[:, 3:] += 1e-4
    assert kind.agreement(one, one) == 1
    assert kind.agreement(one, other) < 0.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": {**KINDS, "age": "regression"}}, "kind names the outputs kind, size, mask, age"),
        ({"kind": {"kind": "classification"}}, r"the model gives \['mask', 'size', 'kind'\]"),
        ({"kind": {}}, "kind names the outputs none"),
        ({"kind": {**KINDS, "size": "classified"}}, "kind = 'classified'"),
        ({"kind": {**KINDS, "size": "binary"}}, "model's output 'size': outputs of one input"),
        ({"kind": {**KINDS, "size": Kind()}}, "kind is|has the name ''"),
        ({"labels": {"kind": ("a", "b")}}, "output 'kind' has 2 labels for 3 classes"),
        ({"labels": {"king": ("a", "b")}}, "labels name the output 'king'"),
        ({"model": lambda: nn.Linear(4, 3)}, "the model gives Tensor"),
        ({"model": lambda: nn.Linear(5, 3)}, "fails on example_input: RuntimeError"),
        ({"class_weights": (1.0, 2.0)}, "class_weights has no meaning for kind 'several'"),
    ],
)
def test_a_task_that_fits_no_model_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        task_of(**changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": 7}, r"row 3: the target is 7 for output 'kind', expected"),
        ({"kind": 0.5}, "for output 'kind'"),
        (
            {"size": torch.zeros(3)},
            r"its target 'size' is \(3,\), expected a tensor of shape \(2,\)",
        ),
        ({"size": None}, "its target 'size' is NoneType"),
        ({"else": 1}, "its targets are 'size', 'mask', 'kind', 'else', expected 'kind', 'size'"),
    ],
)
def test_targets_that_fit_no_output_are_told_by_row(change: dict[str, Any], said: str) -> None:
    def third(row: int, targets: dict[str, Any]) -> None:
        if row == 3:
            targets.update(change)

    with pytest.raises(DataError, match=said):
        batch(task_of(Rows(third)))


def test_check_and_private_training_take_them() -> None:
    done = fedcore.check(
        task_of(),
        fedcore.RunConfig(
            name="run",
            task="task.py",
            privacy={"unit": "example", "max_epsilon": 8.0, "target_delta": 1e-3},
            client={"batch_size": 4},
        ),
        progress=False,
    )
    assert done.ok, str(done)
