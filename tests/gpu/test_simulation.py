"""Clients trained side by side on a GPU learn what each would have learnt alone on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config.run import ClientConfig
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SimulatedDraws
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples
from fedcore.task.model import FullModel
from fedcore.training.local import train
from fedcore.training.per_example.chain import torch_run
from fedcore.training.per_example.graph import find_chain
from fedcore.training.private import train_private
from fedcore.updates.pack import pack
from server.simulation.batched.chained import train_chained
from server.simulation.batched.stacked.train import train_stacked
from server.simulation.batched.work import LocalWork, PrivateWork, TrainedClients
from tests.ways import way_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SETTINGS = ClientConfig(batch_size=5, learning_rate=0.1)
SIZES = (20, 13, 7)


def data(place: int) -> Examples:
    inputs = torch.randn(SIZES[place], 1, 6, 6, generator=torch_rng(0, place))
    return TensorDataset(inputs, inputs.flatten(1)[:, :3].argmax(1))  # type: ignore[return-value]


def work(*, private: bool) -> list[LocalWork]:
    def one(place: int) -> LocalWork:
        steps = -(-SIZES[place] // SETTINGS.batch_size)
        plan = PrivatePlan(Charge(1, 0.7, 1 / steps, steps), clip_norm=0.5)
        noise = PrivateWork(plan, lambda device: torch_rng(0, place, device=str(device)))
        return LocalWork(
            data(place), lambda: torch_rng(0, "order", place), noise if private else None
        )

    return [one(place) for place in range(len(SIZES))]


NETS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3)),
    "cnn": lambda: nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 2), nn.Flatten()),
        nn.Linear(8, 3),
    ),
}


def model(net: str) -> FullModel:
    torch.manual_seed(0)
    return FullModel(nn.Identity(), NETS[net]()).to(CUDA)


def distances(before: FullModel, together: TrainedClients, alone: list[FullModel]) -> list[float]:
    start = torch.from_numpy(pack(before.model))
    found = []
    for row, one in zip(together.weights.cpu(), alone, strict=True):
        expected = torch.from_numpy(pack(one.model))
        found.append(((expected - row).norm() / (expected - start).norm()).item())
    return found


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["chain", "stacked"])
def test_without_privacy(method: str, net: str) -> None:
    before, asked = model(net), work(private=False)
    if method == "chain":
        chain = find_chain(before.model, torch.randn(2, 1, 6, 6, device=CUDA))
        assert chain is not None
        loss = functional.cross_entropy
        got = train_chained(
            before, chain, asked, loss, SETTINGS, proximal_mu=0.0, run=torch_run(chain)
        )
    else:
        got = train_stacked(before, asked, functional.cross_entropy, SETTINGS, proximal_mu=0.0)
    alone = []
    for one in asked:
        alone.append(copy.deepcopy(before))
        train(
            alone[-1], one.examples, functional.cross_entropy, SETTINGS,
            epochs=1, batch_size=SETTINGS.batch_size, rng=one.order(),
        )  # fmt: skip
    assert max(distances(before, got, alone)) <= 1e-4


@pytest.mark.parametrize("net", NETS)
def test_with_privacy_and_the_same_noise(net: str) -> None:
    before, asked = model(net), work(private=True)
    chain = find_chain(before.model, torch.randn(2, 1, 6, 6, device=CUDA))
    assert chain is not None
    got = train_chained(
        before,
        chain,
        asked,
        functional.cross_entropy,
        SETTINGS,
        proximal_mu=0.0,
        run=torch_run(chain),
    )
    alone = []
    method = way_of(before.model, functional.cross_entropy, torch.zeros(1, 6, 6))
    for one in asked:
        assert one.private is not None
        alone.append(copy.deepcopy(before))
        train_private(
            alone[-1].preprocess, alone[-1].model, one.examples, functional.cross_entropy, SETTINGS,
            one.private.plan, method=method,
            draws=SimulatedDraws(one.order(), one.private.noise(CUDA)),
        )  # fmt: skip
    assert max(distances(before, got, alone)) <= 1e-4
