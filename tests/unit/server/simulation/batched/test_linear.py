"""Linear classifiers trained by a compiled loop learn what each would have learnt alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.errors import DataError
from fedcore.seeds import torch_rng
from fedcore.task.model import FullModel
from fedcore.training.local import proximal, train
from fedcore.training.per_example.graph import find_chain
from fedcore.updates.pack import pack
from server.simulation.batched.linear import fits, train_linear
from server.simulation.batched.work import LocalWork, TrainedClients

SIZES = (20, 13, 1, 7)


def work_of(sizes: Sequence[int], classes: int = 3, width: int = 6) -> list[LocalWork]:
    found = []
    for place, size in enumerate(sizes):
        rng = torch_rng(0, "data", place)
        inputs = torch.randn(size, 2, width // 2, generator=rng)
        targets = torch.randint(classes, (size,), generator=rng)
        found.append(
            LocalWork(
                TensorDataset(inputs, targets),  # type: ignore[arg-type]
                lambda place=place: torch_rng(0, "order", place),  # type: ignore[misc]
            )
        )
    return found


def full(classes: int = 3, width: int = 6, *, bias: bool = True, scaled: bool = False) -> FullModel:
    torch.manual_seed(0)
    scale = Scaled() if scaled else nn.Identity()
    return FullModel(scale, nn.Sequential(nn.Flatten(), nn.Linear(width, classes, bias=bias)))


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 - 1


def linear(
    model: FullModel, work: Sequence[LocalWork], settings: ClientConfig, mu: float
) -> TrainedClients:
    chain = find_chain(model.model, model.preprocess(work[0].examples[0][0].unsqueeze(0)))
    assert chain is not None
    assert fits(chain, model, settings)
    return train_linear(model, chain.layers[0], work, settings, proximal_mu=mu)


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(
    "settings",
    [
        ClientConfig(batch_size=5, learning_rate=0.1),
        ClientConfig(batch_size=3, learning_rate=0.1, weight_decay=0.05, epochs=3),
    ],
    ids=["plain", "decay"],
)
def test_each_learns_what_it_would_alone(
    classes: int, bias: bool, mu: float, settings: ClientConfig
) -> None:
    model = full(classes, bias=bias, scaled=mu > 0)
    before = torch.from_numpy(pack(model.model))
    work = work_of(SIZES, classes)
    together = linear(model, work, settings, mu)
    assert torch.equal(torch.from_numpy(pack(model.model)), before)
    for place, one in enumerate(work):
        alone = copy.deepcopy(model)
        value = train(
            alone,
            one.examples,
            functional.cross_entropy,
            settings,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            rng=one.order(),
            penalty=proximal(alone.model, mu) if mu else None,
        )
        expected = torch.from_numpy(pack(alone.model))
        gap = (expected - together.weights[place]).norm()
        assert gap <= 1e-5 * (expected - before).norm() + 1e-9  # one class: nothing is learnt
        assert together.losses[place] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_nobody_s_result_depends_on_who_else_is_there() -> None:
    model, work = full(10, 784), work_of([30, 20, 10], 10, 784)
    settings = ClientConfig(batch_size=8, learning_rate=0.1)
    together = linear(model, work, settings, 0.0)
    for place, one in enumerate(work):
        assert torch.equal(linear(model, [one], settings, 0.0).weights[0], together.weights[place])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_who_diverges_is_seen_to(value: float) -> None:
    work = work_of([8, 8])
    work[1].examples[5][0].fill_(value)
    found = linear(full(), work, ClientConfig(batch_size=4, learning_rate=0.1, epochs=2), 0.0)
    assert torch.isfinite(found.weights[0]).all()
    assert found.losses[0] is not None
    assert found.losses[0] < 10
    assert found.losses[1] != found.losses[1]


@pytest.mark.parametrize("target", [-100, -1, 3])
def test_a_target_that_the_model_has_no_output_for_is_refused(target: int) -> None:
    work = work_of([8])
    work[0].examples[5][1].fill_(target)
    with pytest.raises(DataError, match=f"example 5 has the target {target}, but the model has 3"):
        linear(full(), work, ClientConfig(batch_size=4, learning_rate=0.1), 0.0)


@pytest.mark.parametrize(
    ("inputs", "targets", "said"),
    [
        (torch.zeros(4, 7), torch.zeros(4, dtype=torch.long), "7 numbers each"),
        (torch.zeros(4, 6, dtype=torch.double), torch.zeros(4, dtype=torch.long), "float64"),
        (torch.zeros(4, 6), torch.zeros(4, dtype=torch.int32), "int32"),
        (torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.long), r"shape \(4, 1\)"),
    ],
)
def test_examples_of_another_kind_are_refused(inputs: Tensor, targets: Tensor, said: str) -> None:
    examples = TensorDataset(inputs, targets)
    work = [LocalWork(examples, lambda: torch_rng(0, "order"))]  # type: ignore[arg-type]
    settings = ClientConfig(batch_size=4, learning_rate=0.1)
    chain = find_chain(full().model, torch.zeros(2, 2, 3))
    assert chain is not None
    with pytest.raises(DataError, match=said):
        train_linear(full(), chain.layers[0], work, settings, proximal_mu=0.0)


@pytest.mark.parametrize(
    ("net", "settings"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), ClientConfig()),
        (nn.Sequential(nn.Linear(6, 3), nn.Tanh()), ClientConfig()),
        (nn.Linear(6, 3).double(), ClientConfig()),
        (nn.Linear(700, 100), ClientConfig()),  # more than a cache holds
        (nn.Linear(6, 3), ClientConfig(momentum=0.9)),
        (nn.Linear(6, 3), ClientConfig(optimizer="adam")),
    ],
    ids=["two", "a function behind", "double", "large", "momentum", "adam"],
)
def test_what_it_is_not_for(net: nn.Module, settings: ClientConfig) -> None:
    first = next(net.parameters())
    chain = find_chain(net, torch.zeros(2, first.shape[1], dtype=first.dtype))
    assert chain is not None
    assert not fits(chain, FullModel(nn.Identity(), net), settings)
