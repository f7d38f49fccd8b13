"""Clients trained side by side on a GPU learn what each would have learnt alone on it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from fedcore.config import Client
from fedcore.model import FullModel
from fedcore.privacy.accounting import Charge
from fedcore.seeds import torch_rng
from fedcore.task import Examples
from fedcore.training.local import train
from fedcore.training.private import PrivatePlan, train_private
from fedcore.updates.pack import pack
from server.simulation.chained import train_chained
from server.simulation.graph import find_chain
from server.simulation.vectorised import train_cohort
from server.simulation.work import LocalWork, PrivateWork, Trained

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SETTINGS = Client(batch_size=5, learning_rate=0.1)
SIZES = (20, 13, 7)


def data(place: int) -> Examples:
    inputs = torch.randn(SIZES[place], 6, generator=torch_rng(0, place))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))  # type: ignore[return-value]


def work(*, private: bool) -> list[LocalWork]:
    def one(place: int) -> LocalWork:
        steps = -(-SIZES[place] // SETTINGS.batch_size)
        plan = PrivatePlan(Charge(1, 0.7, 1 / steps, steps), clip_norm=0.5)
        noise = PrivateWork(plan, lambda device: torch_rng(0, place, device=str(device)))
        return LocalWork(
            data(place), lambda: torch_rng(0, "order", place), noise if private else None
        )

    return [one(place) for place in range(len(SIZES))]


def model() -> FullModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    return FullModel(nn.Identity(), net).to(CUDA)


def distances(before: FullModel, together: Trained, alone: list[FullModel]) -> list[float]:
    start = torch.from_numpy(pack(before.model))
    found = []
    for row, one in zip(together.weights.cpu(), alone, strict=True):
        expected = torch.from_numpy(pack(one.model))
        found.append(((expected - row).norm() / (expected - start).norm()).item())
    return found


@pytest.mark.parametrize("way", ["dense", "vmap"])
def test_without_privacy(way: str) -> None:
    before, asked = model(), work(private=False)
    if way == "dense":
        chain = find_chain(before.model, torch.randn(2, 6, device=CUDA))
        assert chain is not None
        loss = functional.cross_entropy
        got = train_chained(before, chain, asked, loss, SETTINGS, proximal_mu=0.0)
    else:
        got = train_cohort(before, asked, functional.cross_entropy, SETTINGS, proximal_mu=0.0)
    alone = []
    for one in asked:
        alone.append(copy.deepcopy(before))
        train(
            alone[-1], one.examples, functional.cross_entropy, SETTINGS,
            epochs=1, batch_size=SETTINGS.batch_size, rng=one.order(),
        )  # fmt: skip
    assert max(distances(before, got, alone)) <= 1e-4


def test_with_privacy_and_the_same_noise() -> None:
    before, asked = model(), work(private=True)
    chain = find_chain(before.model, torch.randn(2, 6, device=CUDA))
    assert chain is not None
    got = train_chained(before, chain, asked, functional.cross_entropy, SETTINGS, proximal_mu=0.0)
    alone = []
    for one in asked:
        assert one.private is not None
        alone.append(copy.deepcopy(before))
        train_private(
            alone[-1].preprocess, alone[-1].model, one.examples, functional.cross_entropy, SETTINGS,
            one.private.plan, sampling=one.order(), noise=one.private.noise(CUDA),
        )  # fmt: skip
    assert max(distances(before, got, alone)) <= 1e-4
