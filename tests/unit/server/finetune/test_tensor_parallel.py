"""Matrices divided among processes train as whole ones, and continue as whole ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from fedcore.errors import ConfigError
from fedcore.task.definition import Task
from server.finetune.sharding import whole_state
from server.finetune.tensor_parallel import pairs_of
from tests.unit.server.finetune.conftest import Grouped, make_run, make_task, trained_here


class Attending(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.think = nn.Sequential(
            nn.Linear(8, 24), nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 8), nn.Linear(8, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.first(x).unsqueeze(1))
        return self.last(x + self.think(x)).squeeze(1)  # type: ignore[no-any-return]


def attending(dropout: float = 0.0) -> Task:
    return make_task(model=lambda: Attending(dropout))


def trained(rank: int, world: int, *, task: Task, settings: dict[str, Any], **given: Any) -> Any:
    run = make_run(**settings)
    model, curve = trained_here(run, task, rank=rank, world=world, **given)
    local = sum(
        (each.to_local() if hasattr(each, "to_local") else each).numel()
        for each in model.parameters()
    )
    whole = {name: each.numpy() for name, each in whole_state(model).items()}
    return whole, curve.losses, local, [part.examples for part in curve.parts]


def test_divided_matrices_train_as_whole_ones(in_group: Grouped, place: Path) -> None:
    settings = {"epochs": 9, "checkpoint_steps": 20, "accumulate_steps": 2, "optimizer": "sgd"}
    (whole, exact, size, examples), _ = in_group(
        2, partial(trained, task=attending(), settings=settings)
    )
    tensor = settings | {"shard": "tensor"}
    work = partial(trained, task=attending(), settings=tensor, place=place)
    (divided, losses, part, seen), (other, *_) = in_group(2, work)
    assert len(losses) >= 50
    assert np.abs(np.subtract(losses, exact)).max() < 1e-4
    assert sum(seen) == sum(examples)
    for name, value in whole.items():
        assert np.allclose(divided[name], value, atol=1e-4)
        assert np.array_equal(divided[name], other[name])
    kept = 8 + 8 + 16 * 8 + 16 * 8 + 16 + 24 * 8 + 24 * 8 + 24  # of the two pairs
    assert size - part == (kept - 16) // 2  # the biases of second matrices are copied


@pytest.mark.parametrize(("before", "after"), [("tensor", "never"), ("never", "tensor")])
def test_a_training_continues_with_matrices_divided_otherwise(
    in_group: Grouped, place: Path, before: str, after: str
) -> None:
    settings = {"epochs": 5, "checkpoint_steps": 8, "learning_rate": 0.001}
    (_, exact, *_), _ = in_group(2, partial(trained, task=attending(), settings=settings))

    def interrupted(rank: int, world: int) -> int:
        with pytest.raises(KeyboardInterrupt):
            trained(rank, world, task=attending(), settings=settings | {"shard": before},
                    place=place, stop=(place / "step-0000000008").exists)  # fmt: skip
        return max(int(each.name.removeprefix("step-")) for each in place.iterdir())

    assert 0 < in_group(2, interrupted)[0] < len(exact)
    given = settings | {"shard": after}
    (_, losses, *_), _ = in_group(
        2, partial(trained, task=attending(), settings=given, place=place)
    )
    assert np.abs(np.subtract(losses, exact[-len(losses) :])).max() < 1e-4


def test_dropout_and_a_teacher_leave_processes_alike(in_group: Grouped) -> None:
    settings = {"shard": "tensor", "activation_checkpointing": True}
    work = partial(trained, task=attending(0.3), settings=settings, remember=0.3)
    (first, *_), (second, *_) = in_group(2, work)
    for name, value in first.items():
        assert np.array_equal(value, second[name])


def test_only_pairs_of_unshared_dense_layers_are_divided() -> None:
    assert pairs_of(Attending(), 2) == [("layer.linear1", "layer.linear2"), ("think.0", "think.3")]
    assert pairs_of(Attending(), 3) == [("think.0", "think.3")]
    tied = Attending()
    tied.think[3].weight = nn.Parameter(tied.think[0].weight.detach().T.clone())  # type: ignore[union-attr]
    tied.last = nn.Linear(24, 3)
    tied.last.bias = tied.think[3].bias  # type: ignore[assignment,union-attr]
    assert pairs_of(tied, 2) == [("layer.linear1", "layer.linear2")]
    mixing = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert pairs_of(mixing, 2) == []


def test_a_model_without_pairs_is_refused(in_group: Grouped) -> None:
    def work(rank: int, world: int) -> Any:
        return trained(rank, world, task=make_task(), settings={"shard": "tensor"})

    with pytest.raises(ConfigError, match=r"no two dense layers.*set it to 'always'"):
        in_group(2, work)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"communication": "powersgd"},
        {"max_grad_norm": 1.0},
        {"fused": True},
        {"compile": True},
        {"auto": True},
        {"nodes": 2, "rendezvous": "a:1"},
    ],
)
def test_what_it_does_not_do_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"contradicts finetune\.shard = 'tensor'"):
        make_run(shard="tensor", **settings)
