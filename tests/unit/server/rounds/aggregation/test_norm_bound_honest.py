"""Honest runs of many kinds are bounded by their own history, and seldom feel it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.updates.pack import Vector, pack, unpack
from server.records import RoundRecord
from server.rounds.aggregation.norm_bound import MEDIAN_FACTOR, norm_bound
from tests.unit.server.live.journal.journals import record

ROUNDS, CLIENTS, COHORT, INPUTS, CLASSES = 40, 30, 8, 16, 4
RUN = RunConfig.model_validate({"name": "run", "task": "t.py"})


@dataclass(frozen=True)
class Honest:
    """A run in which everybody does what was asked."""

    layers: int
    activation: type[nn.Module] = nn.ReLU
    learning_rate: float = 0.1
    schedule: Callable[[int], float] = lambda number: 1.0
    scale: float = 1.0
    """Of the first weights: small ones begin on a plateau."""
    noise: float = 0.0


CASES = {
    "linear": Honest(0),
    "warm-up": Honest(0, schedule=lambda number: min(1.0, (number + 1) / 30)),
    "cosine": Honest(1, schedule=lambda number: (1 + math.cos(math.pi * number / ROUNDS)) / 2),
    "warm restarts": Honest(
        1, schedule=lambda number: (1 + math.cos(math.pi * (number % 10) / 10)) / 2 + 0.01
    ),
    "plateau": Honest(3, scale=0.3),
    "deep tanh": Honest(4, nn.Tanh, scale=0.2),
    "sigmoid": Honest(3, nn.Sigmoid, learning_rate=0.3),
    "noise": Honest(1, noise=0.5),
}


def made(case: Honest) -> nn.Module:
    sizes = [INPUTS, *[32] * case.layers]
    hidden: list[nn.Module] = []
    for first, second in pairwise(sizes):
        hidden += [nn.Linear(first, second), case.activation()]
    model = nn.Sequential(*hidden, nn.Linear(sizes[-1], CLASSES))
    unpack(pack(model) * np.float32(case.scale), model)
    return model


def lengths_of(case: Honest) -> list[list[float]]:
    """The lengths of each round's updates; clients differ in data, as devices do."""
    torch.manual_seed(0)
    draws = np.random.default_rng(0)
    centres = torch.randn(CLASSES, INPUTS) * 1.5
    data = []
    for _ in range(CLIENTS):
        size = int(np.clip(draws.lognormal(4, 0.7), 8, 500))
        labels = torch.tensor(draws.choice(CLASSES, size, p=draws.dirichlet([0.5] * CLASSES)))
        data.append((centres[labels] + torch.randn(size, INPUTS), labels))
    model, found = made(case), []
    weights = pack(model)
    for number in range(ROUNDS):
        moves: list[Vector] = []
        for client in draws.choice(CLIENTS, COHORT, replace=False):
            unpack(weights, model)
            rate = case.learning_rate * case.schedule(number)
            trained(model, *data[client], rate=rate, noise=case.noise)
            moves.append(pack(model) - weights)
        found.append([float(np.linalg.norm(move)) for move in moves])
        weights = weights + np.mean(moves, axis=0)
    return found


def trained(
    model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor, *, rate: float, noise: float
) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=rate)
    for start in range(0, len(labels), 16):
        batch = slice(start, start + 16)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
        optimiser.step()
        with torch.no_grad():
            for parameter in model.parameters() if noise else ():
                parameter.add_(torch.randn_like(parameter), alpha=noise * rate)


@pytest.mark.parametrize("name", CASES)
def test_honest_updates_are_seldom_clipped(name: str) -> None:
    records: list[RoundRecord] = []
    clipped = by_round_alone = 0
    rounds = lengths_of(CASES[name])
    for number, lengths in enumerate(rounds, 1):
        bound = norm_bound(RUN, np.zeros(1, np.float32), live=True, records=records)
        assert bound is not None
        limit = bound.limit(lengths)
        assert limit is not None
        clipped += sum(length > limit for length in lengths)
        alone = MEDIAN_FACTOR * statistics.median(lengths)
        by_round_alone += sum(length > alone for length in lengths)
        records.append(replace(record(number), median_norm=bound.measure(lengths)))
    updates = ROUNDS * COHORT
    assert clipped <= 0.03 * updates
    assert clipped - by_round_alone <= 0.005 * updates  # what earlier rounds add to it
