"""Every kind of problem goes the whole way: rounds, privacy, fine-tuning, release, a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import fedcore

pytestmark = pytest.mark.xdist_group("kinds")

SETTINGS: dict[str, Any] = {
    "federation": {"rounds": 2, "holdout": 0.2, "evaluate_cohort": 2},
    "client": {"learning_rate": 0.5, "batch_size": 8},
    "finetune": {"epochs": 1, "max_metric_drop": 1.0},
    "simulation": {"training": "vectorised", "workers": 1},
    "compression": {"timing_runs": 100, "candidates": ("fp32",)},
    "release": {"max_test_drop": 1.0},
    "progress": False,
}


class Ranking(fedcore.Kind):
    """Items of which one is preferred to another: outputs ``(B, items)``, targets ``(B, 2)``."""

    name = "ranking"

    def loss(self, options: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return _pairwise

    def metrics(self, options: Any) -> tuple[fedcore.Metric, ...]:
        return (fedcore.Metric("right_order", _right_order, True, low=0.0, high=1.0),)

    def synthetic(self, outputs: Tensor, rng: torch.Generator) -> Any:
        first = torch.randint(outputs.shape[1], (len(outputs),), generator=rng)
        yield torch.stack([first, (first + 1) % outputs.shape[1]], dim=1)


def _pairwise(outputs: Tensor, targets: Tensor) -> Tensor:
    preferred, other = outputs.gather(1, targets).unbind(1)
    return -functional.logsigmoid(preferred - other).mean()


def _right_order(outputs: Tensor, targets: Tensor) -> float:
    preferred, other = outputs.gather(1, targets).unbind(1)
    return (preferred > other).double().mean().item()


class PerPosition(nn.Module):
    """Scores of three classes at each position of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def _data(kind: str, name: str, count: int = 20) -> TensorDataset:
    rng = torch.Generator().manual_seed(sum(map(ord, name)))
    x = torch.randn(count, *SHAPES[kind], generator=rng)
    if kind == "binary":
        return TensorDataset(x, x[:, 0] > 0)  # bools
    if kind == "multilabel":
        return TensorDataset(x, (x[:, :3] > 0).to(torch.uint8))
    if kind == "segmentation":
        return TensorDataset(x, (x > 0).to(torch.uint8))  # (B, 1, 4, 4) for (B, 4, 4)
    if kind == "sequence":
        y = (x[..., 0] > 0).int() + (x[..., 1] > 0).int()
        lengths = torch.randint(1, 6, (count, 1), generator=rng)
        return TensorDataset(x, torch.where(torch.arange(5) < lengths, y, -100))
    order = x[:, :3].argsort(dim=1, descending=True)
    return TensorDataset(x, order[:, [0, 2]])


SHAPES = {
    "binary": (4,),
    "multilabel": (4,),
    "segmentation": (1, 4, 4),
    "sequence": (5, 2),
    "ranking": (4,),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "binary": lambda: nn.Linear(4, 1),
    "multilabel": lambda: nn.Linear(4, 3),
    "segmentation": lambda: nn.Conv2d(1, 2, 1),
    "sequence": PerPosition,
    "ranking": lambda: nn.Linear(4, 3),
}
KINDS = list(SHAPES)


def task_of(kind: str) -> fedcore.Task:
    return fedcore.Task(
        name=kind,
        kind=Ranking() if kind == "ranking" else kind,  # type: ignore[arg-type]
        model=MODELS[kind],
        clients=lambda folder: ["anna", "ben", "cleo"],
        client_data=lambda client, folder: _data(kind, client),  # type: ignore[arg-type,return-value]
        cloud_data=lambda folder: _data(kind, "cloud", 40),  # type: ignore[arg-type,return-value]
        test_data=lambda folder: _data(kind, "test", 60),  # type: ignore[arg-type,return-value]
        example_input=torch.zeros(SHAPES[kind]),
        labels={"binary": ("no", "yes"), "multilabel": ("a", "b", "c")}.get(kind, ()),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_goes_the_whole_way_to_a_devices_answer(kind: str, tmp_path: Path) -> None:
    task = task_of(kind)
    result = fedcore.simulate(task, **SETTINGS)
    assert result.metrics[task.primary.name]["released"] > 0.5
    places = {"repository": tmp_path / "releases", "keys": tmp_path / "keys"}
    fedcore.create_repository(**places)
    manifest = fedcore.publish(result.compressed, result, **places)
    assert (manifest.kind, manifest.presents) == (kind, task.problem.presentation)
    fedcore.update_model(
        tmp_path / "store", kind, repository=places["repository"], root=places["keys"] / "root.json"
    )
    model = fedcore.open_model(tmp_path / "store", kind)
    x = _data(kind, "test").tensors[0]
    with torch.no_grad():
        expected = result.model(x).numpy()
    assert np.allclose(model.predict(x.numpy()), expected, atol=1e-4)
    if kind == "binary":
        assert model.predict_labels(x.numpy()) == ["yes" if one > 0 else "no" for one in expected]
    if kind == "multilabel":
        names = [[n for n, one in zip("abc", row, strict=True) if one > 0] for row in expected]
        assert model.predict_labels(x.numpy()) == names
        assert model.predict_labels(x[0].numpy()) == names[0]
        found = model.predict_probabilities(x.numpy())
        assert np.allclose(found, torch.from_numpy(expected).sigmoid(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_under_example_level_privacy(kind: str) -> None:
    """Alone and side by side, with the same weights up to the order of float32 sums."""
    trained = []
    for way in ("loop", "auto"):
        changed = {
            "federation": {"rounds": 1},
            "privacy": {"unit": "example", "max_epsilon": 8.0, "target_delta": 1e-3},
            "simulation": {"training": way, "workers": 1},
            "compression": {"candidates": ("fp32",), "timing_runs": 100},
            "finetune": {"epochs": 0},
        }
        result = fedcore.simulate(task_of(kind), progress=False, **changed)
        trained.append(torch.nn.utils.parameters_to_vector(result.federated.parameters()))
    assert torch.allclose(*trained, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_side_by_side_training_gives_what_the_loop_gives(kind: str) -> None:
    trained = []
    for way in ("loop", "vectorised"):
        changed = {**SETTINGS, "simulation": {"training": way, "workers": 1}}
        changed["finetune"] = {"epochs": 0}
        result = fedcore.simulate(task_of(kind), **changed)
        trained.append(torch.nn.utils.parameters_to_vector(result.federated.parameters()))
    assert torch.allclose(*trained, atol=1e-5)
