from __future__ import annotations

import numpy as np
import pytest
import torch

from fedcore.config.run import ClientConfig
from fedcore.errors import PrivacyError
from fedcore.privacy.accounting import Charge
from fedcore.privacy.planning import PrivatePlan
from fedcore.seeds import Simulated
from fedcore.task.definition import Examples, Task
from fedcore.task.model import FullModel
from server.privacy.canaries import private_training, release

TINY = 1e-5  # a noise multiplier below which nothing is hidden


@pytest.mark.parametrize(("rate", "steps", "clip"), [(1.0, 1, 1.0), (1.0, 3, 0.2), (0.5, 8, 4.0)])
def test_scores_count_the_batches_that_each_canary_was_in(
    rate: float, steps: int, clip: float
) -> None:
    plan = PrivatePlan(Charge(1, TINY, rate, steps), clip)
    train = private_training(plan, Simulated(1))
    found = release(train, plan, canaries=40, rng=np.random.default_rng(0))
    assert np.abs(found.scores - np.rint(found.scores)).max() < 1e-3
    assert np.abs(found.scores[~found.included]).max() < 1e-3
    within = np.rint(found.scores[found.included])
    assert 0 < len(within) < 40
    if rate == 1:
        assert (within == steps).all()
    else:
        assert within.max() <= steps
        assert abs(within.mean() - rate * steps) < 1.5


def test_what_is_clipped_too_late_shows_in_the_scores() -> None:
    stated = PrivatePlan(Charge(1, TINY, 1.0, 1), 1.0)
    train = private_training(PrivatePlan(stated.charge, 3.0), Simulated(1))
    found = release(train, stated, canaries=30, rng=np.random.default_rng(0))
    assert found.scores[found.included] == pytest.approx(3.0, abs=1e-3)


def test_each_call_draws_noise_of_its_own() -> None:
    plan = PrivatePlan(Charge(1, 1.0, 1.0, 1), 1.0)
    train, seen = private_training(plan, Simulated(1)), []
    for _ in range(2):
        found = release(train, plan, canaries=30, rng=np.random.default_rng(0))
        seen.append(found.scores - found.included)
    assert np.abs(seen[0] - seen[1]).min() > 0


def test_a_release_that_is_not_finite_is_an_error() -> None:
    def broken(task: Task, model: FullModel, examples: Examples, settings: ClientConfig) -> None:
        with torch.no_grad():
            next(model.parameters())[0, 3] = torch.nan

    plan = PrivatePlan(Charge(1, 1.0, 1.0, 1), 1.0)
    with pytest.raises(PrivacyError, match="not finite"):
        release(broken, plan, canaries=10, rng=np.random.default_rng(0))
