"""The noise in clients' evaluations is what their charges say, and an attacker finds no more.

The attack is on all that a device sends: it knows every example but one, and chooses the model.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn
from torch.utils.data import Subset, TensorDataset

from fedcore.config.run import RunConfig
from fedcore.flower.identity import assume_identity
from fedcore.privacy.evaluation_noise import evaluation_noise
from fedcore.seeds import derive
from fedcore.training.batches import split
from fedcore.updates.messages import ARRAYS
from tests.unit.fedcore.clients import context, data, device_app, instruct, make_task

RUNS = 1000
FEDERATION = {"rounds": 1, "holdout": 0.25, "evaluate_cohort": 1}
RARE = 1e-6
Floats = NDArray[np.float64]


def run_of(epsilon: float, *, evaluations: int, delta: float = 1e-3) -> RunConfig:
    privacy = {
        "unit": "example",
        "max_epsilon": epsilon,
        "target_delta": delta,
        "evaluations": evaluations,
    }
    values = {"name": "run", "task": "task.py", "federation": FEDERATION, "privacy": privacy}
    return RunConfig.model_validate(values)


def sent(run: RunConfig, *, missing: int | None, times: int) -> Floats:
    """What a device sends: sums of right and wrong decisions, ``(times, 2)``."""
    assume_identity(1)
    always = nn.Linear(6, 3)
    inputs, targets = (part.clone() for part in data().tensors)
    if missing is not None:
        targets[missing] = 99  # no class: it counts as zero
    rows = TensorDataset(inputs, targets)
    task = make_task(model=lambda: always, client_data=lambda client, folder: rows)
    with torch.no_grad():
        always.weight.zero_()
        always.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    app, asked = device_app(task, run), instruct(task, run, kind="evaluate")
    found = []
    for _ in range(times):
        reply = app(asked, context())
        assert not reply.has_error(), reply.error
        found.append(reply.content.array_records[ARRAYS]["accuracy"].numpy())
    return np.stack(found)


def held_out() -> list[int]:
    _, kept = split(data(), FEDERATION["holdout"], derive(0, "holdout", "anna"))
    assert isinstance(kept, Subset)
    return list(kept.indices)


def test_the_noise_is_gaussian_of_the_stated_deviation_and_independent() -> None:
    run = run_of(2.0, evaluations=3)
    sums = sent(run, missing=None, times=RUNS)
    rows, (_, targets) = held_out(), data().tensors
    right = int((targets[rows] == 0).sum())
    noise = (sums - [right, len(rows) - right]) / (evaluation_noise(run) * (1 + 1e-4))
    assert stats.kstest(noise.ravel(), "norm").pvalue > RARE
    spread = float(np.square(noise).sum())
    low, high = stats.chi2.ppf(RARE / 2, noise.size), stats.chi2.isf(RARE / 2, noise.size)
    assert low < spread < high
    for one, other in ((noise[:, 0], noise[:, 1]), (noise[1:, 0], noise[:-1, 0])):
        assert abs(float(np.corrcoef(one, other)[0, 1])) < 4.9 / math.sqrt(len(one))


def test_a_thousand_runs_each_way_tell_no_more_than_epsilon() -> None:
    """The best threshold on the best statistic, judged on runs that did not choose it."""
    epsilon, delta = 1.0, 1e-3
    run, row = run_of(epsilon, evaluations=1, delta=delta), held_out()[0]
    with_it = sent(run, missing=None, times=RUNS)
    without = sent(run, missing=row, times=RUNS)
    direction = with_it.mean(0) - without.mean(0)
    scores = [side @ (direction / np.linalg.norm(direction)) for side in (with_it, without)]
    half = RUNS // 2
    places = np.quantile(np.concatenate([one[:half] for one in scores]), np.linspace(0, 1, 41))
    assert least_epsilon(scores, half, places, delta) <= epsilon
    # The attack is a good one: with the noise of a budget four times as large it finds a lie.
    louder = run_of(4 * epsilon, evaluations=1, delta=delta)
    scale = evaluation_noise(louder) / evaluation_noise(run)
    told = [one.mean() + (one - one.mean()) * scale for one in scores]
    places = np.quantile(np.concatenate([one[:half] for one in told]), np.linspace(0, 1, 41))
    assert least_epsilon(told, half, places, delta) > 0.4 * epsilon


def least_epsilon(
    scores: list[Floats], half: int, places: Floats, delta: float, level: float = 1e-3
) -> float:
    """A lower bound on epsilon, by Clopper and Pearson on the second half of the runs."""

    def bound(threshold: float, told: list[Floats]) -> float:
        one, other = (int((each > threshold).sum()) for each in told)
        count = len(told[0])
        at_least = stats.beta.ppf(level / 2, one, count - one + 1) if one else 0.0
        at_most = stats.beta.isf(level / 2, other + 1, count - other) if other < count else 1.0
        return math.log(max((at_least - delta) / at_most, 1e-9))

    turned = [[-one for one in scores], [-one for one in reversed(scores)]]
    found = [0.0]
    for ordered, sign in ((scores, 1), (scores[::-1], 1), (turned[0], -1), (turned[1], -1)):
        first, second = [one[:half] for one in ordered], [one[half:] for one in ordered]
        best = max((sign * place for place in places), key=lambda place: bound(place, first))
        found.append(bound(best, second))
    return max(found)
