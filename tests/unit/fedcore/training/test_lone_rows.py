from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.errors import DataError
from fedcore.seeds import torch_rng
from fedcore.training.batches import batches_of
from fedcore.training.lone_rows import least_rows, use_running_statistics

LOSS = nn.functional.cross_entropy


class Standardised(nn.Module):
    """Statistics over the batch that are not a number for a batch of one."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / x.std(0)


def flat(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3))


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 2, 2)), *layers)


MODELS = {
    "linear": (flat(nn.ReLU()), 1),
    "dropout": (flat(nn.Dropout()), 1),
    "LayerNorm": (flat(nn.LayerNorm(6)), 1),
    "BatchNorm": (flat(nn.BatchNorm1d(6)), 2),
    "BatchNorm without statistics": (flat(nn.BatchNorm1d(6, track_running_stats=False)), 2),
    "own": (flat(Standardised()), 2),
    "BatchNorm of images": (images(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3)), 1),
    "BatchNorm of pooled images": (
        images(nn.AvgPool2d(2), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 3)),
        2,
    ),
    "fails on anything": (flat(nn.Linear(5, 5)), 1),
}


def examples(count: int) -> Any:
    rng = torch_rng(0, "rows")
    return TensorDataset(torch.randn(count, 4, generator=rng), torch.arange(count) % 3)


@pytest.mark.parametrize("kind", MODELS)
def test_two_rows_are_needed_where_one_fails(kind: str) -> None:
    model, least = MODELS[kind]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    assert least_rows(model, LOSS, examples(17), count=17, batch_size=8) == least
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize(("count", "size", "part"), [(34, 17, 8), (66, 64, 9), (50, 49, None)])
def test_a_lone_row_in_a_part_of_a_batch_counts(count: int, size: int, part: int | None) -> None:
    sizes = {"batch_size": size, "physical_batch_size": part}
    model, _ = MODELS["BatchNorm"]
    assert least_rows(model, LOSS, examples(count), count=count, **sizes) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "size"), [(16, 8), (18, 8), (5, 8), (3, 1), (1, 1)])
def test_nothing_is_tried_where_no_epoch_has_a_lone_row(count: int, size: int) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError("tried")

    model, _ = MODELS["BatchNorm"]
    assert least_rows(model, refuse, examples(count), count=count, batch_size=size) == 1


@pytest.mark.parametrize(
    ("count", "least", "sizes"),
    [(17, 2, [8, 9]), (17, 1, [8, 8, 1]), (18, 2, [8, 8, 2]), (1, 2, [1]), (9, 2, [9])],
)
def test_a_lone_last_row_joins_the_batch_before(count: int, least: int, sizes: list[int]) -> None:
    batches = batches_of(torch.arange(count), 8, least=least)
    assert [len(batch) for batch in batches] == sizes
    assert torch.cat(batches).tolist() == list(range(count))


def test_running_statistics_serve_until_training_is_switched_on_again() -> None:
    model = flat(nn.BatchNorm1d(6)).train()
    use_running_statistics(model)
    assert [layer.training for layer in model] == [True, False, True]  # type: ignore[attr-defined]
    model(torch.randn(1, 4))
    assert model.train()[1].training  # type: ignore[index]
    with pytest.raises(DataError, match=r"1 \(BatchNorm1d\), which keeps no running statistics"):
        use_running_statistics(flat(nn.BatchNorm1d(6, track_running_stats=False)))
