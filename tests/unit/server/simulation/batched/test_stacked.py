"""Clients trained side by side learn what each would have learnt alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.seeds import global_streams, torch_rng
from fedcore.task.definition import Examples, Loss
from fedcore.task.model import FullModel
from fedcore.training.local import proximal, train
from fedcore.updates.pack import pack
from server.simulation.batched.stacked.supported import unsupported_parts
from server.simulation.batched.stacked.train import train_stacked
from server.simulation.batched.work import LocalWork

Make = Callable[[int, torch.Generator], Examples]


def classify(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 6, generator=rng)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))  # type: ignore[return-value]


def images(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 1, 6, 6, generator=rng)
    return TensorDataset(inputs, inputs.mean((1, 2, 3)).gt(0).long())  # type: ignore[return-value]


def regress(count: int, rng: torch.Generator) -> Examples:
    inputs = torch.randn(count, 6, generator=rng)
    return TensorDataset(inputs, inputs.sum(1))  # type: ignore[return-value]


def tokens(count: int, rng: torch.Generator) -> Examples:
    rows = torch.randint(0, 7, (count, 5), generator=rng)
    return TensorDataset(rows[:, :-1], rows[:, 1:])  # type: ignore[return-value]


def squared(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output.reshape(target.shape), target)


def next_token(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.transpose(1, 2), target)


torch.manual_seed(0)  # what the nets below start from
DENSE = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
CONV = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
LINE = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
TOKENS = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
CASES = {
    "dense": (DENSE, classify, nn.functional.cross_entropy),
    "convolution": (CONV, images, nn.functional.cross_entropy),
    "regression": (LINE, regress, squared),
    "next token": (TOKENS, tokens, next_token),
}
SIZES = (20, 20, 13, 1, 20, 7, 10)


def both(
    net: nn.Module, make: Make, loss: Loss, settings: ClientConfig, sizes: Sequence[int], mu: float
) -> list[tuple[float, float, float]]:
    """For each client: the relative distance of the updates, and its loss in both ways."""
    model = FullModel(nn.Identity(), copy.deepcopy(net))
    before = pack(model.model)
    data = [make(size, torch_rng(0, "data", place)) for place, size in enumerate(sizes)]
    work = [
        LocalWork(
            one,
            lambda place=place: torch_rng(0, "order", place),  # type: ignore[misc]
            layers=lambda place=place: torch_rng(0, "train", place),  # type: ignore[misc]
        )
        for place, one in enumerate(data)
    ]
    together = train_stacked(model, work, loss, settings, proximal_mu=mu)
    assert (pack(model.model) == before).all()
    found = []
    for place, one in enumerate(data):
        alone = copy.deepcopy(model)
        with global_streams(0, "train", place):
            value = train(
                alone,
                one,
                loss,
                settings,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                steps=settings.steps,
                rng=torch_rng(0, "order", place),
                penalty=proximal(alone.model, mu) if mu else None,
            )
        expected = torch.from_numpy(pack(alone.model))
        moved = (expected - torch.from_numpy(before)).norm().item()
        assert moved > 0
        distance = (expected - together.weights[place]).norm().item() / moved
        found.append((distance, value, together.losses[place]))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "settings",
    [
        ClientConfig(batch_size=5, learning_rate=0.1),
        ClientConfig(batch_size=8, learning_rate=0.01, momentum=0.9, weight_decay=0.01, epochs=3),
        ClientConfig(batch_size=8, learning_rate=0.01, optimizer="adam", epochs=2),
        ClientConfig(batch_size=8, learning_rate=0.01, optimizer="adamw", weight_decay=0.1),
        ClientConfig(batch_size=5, momentum=0.9, nesterov=True, max_grad_norm=0.3, steps=7),
    ],
    ids=["sgd", "momentum", "adam", "adamw", "nesterov, clipped, by steps"],
)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_each_learns_what_it_would_alone(name: str, settings: ClientConfig, mu: float) -> None:
    net, make, loss = CASES[name]
    for distance, alone, together in both(net, make, loss, settings, SIZES, mu):
        assert distance <= 1e-5
        assert together == pytest.approx(alone, rel=1e-5)


def test_preprocessing_runs_before_training() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    examples = classify(10, torch_rng(0))
    model = FullModel(Half(), copy.deepcopy(DENSE))
    settings = ClientConfig(batch_size=5)
    work = [LocalWork(examples, lambda: torch_rng(0, "order"))]
    got = train_stacked(model, work, nn.functional.cross_entropy, settings, proximal_mu=0.0)
    train(
        model,
        examples,
        nn.functional.cross_entropy,
        settings,
        epochs=1,
        batch_size=5,
        rng=torch_rng(0, "order"),
    )
    assert torch.allclose(got.weights[0], torch.from_numpy(pack(model.model)), atol=1e-6)


def test_a_client_that_diverges_does_not_take_others_with_it() -> None:
    model = FullModel(nn.Identity(), copy.deepcopy(LINE))
    bad = TensorDataset(torch.full((4, 6), float("nan")), torch.zeros(4))
    data: list[Examples] = [regress(4, torch_rng(0)), bad]  # type: ignore[list-item]
    work = [LocalWork(one, lambda: torch_rng(0)) for one in data]
    trained = train_stacked(model, work, squared, ClientConfig(batch_size=4), proximal_mu=0.0)
    good, lost = trained.losses
    assert torch.isfinite(trained.weights[0]).all()
    assert good == good
    assert lost != lost


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.BatchNorm1d(6), "BatchNorm1d"),
        (nn.RReLU(), "RReLU"),
    ],
)
def test_what_would_come_out_otherwise_is_named(layer: nn.Module, named: str) -> None:
    model = FullModel(nn.Identity(), nn.Sequential(layer, nn.Linear(6, 2)))
    assert named in unsupported_parts(model)
