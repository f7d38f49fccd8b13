"""Noise on counts of what is served: as much as stated, and of nothing but the deviation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedcore.privacy.count_noise import count_deviation, noised_counts
from fedcore.privacy.losses import gaussian_epsilon


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("features", [1, 9, 72])
def test_the_noise_suffices_for_the_epsilon(epsilon: float, features: int) -> None:
    deviation = count_deviation(features, epsilon=epsilon, target_delta=1e-6)
    spent = gaussian_epsilon(math.sqrt(features) / deviation, 1e-6)
    assert 0.4 * epsilon < spent <= epsilon


def test_the_noise_has_the_deviation_and_keeps_the_form() -> None:
    counts = [[100] * 21, [0] * 32]
    noise = np.concatenate(
        [
            np.concatenate([np.subtract(*pair) for pair in zip(noised, counts, strict=True)])
            for noised in (noised_counts(counts, deviation=20.0) for _ in range(400))
        ]
    )
    assert [len(row) for row in noised_counts(counts, deviation=1.0)] == [21, 32]
    assert noise.dtype.kind == "i"
    assert abs(noise.mean()) < 5 * 20 / math.sqrt(len(noise))
    assert abs(noise.std() / 20 - 1) < 0.03
    assert abs(np.mean(np.abs(noise) > 40) - 0.0429) < 0.01  # beyond 40.5 of deviation 20


def test_equal_entropy_gives_equal_noise_whatever_the_counts() -> None:
    def entropy(size: int) -> bytes:
        return np.random.default_rng(3).bytes(size)

    one = noised_counts([[1, 2, 3]], deviation=9.0, entropy=entropy)[0]
    other = noised_counts([[1001, 2, 50_003]], deviation=9.0, entropy=entropy)[0]
    assert np.subtract(other, one).tolist() == [1000, 0, 50_000]
    assert noised_counts([], deviation=9.0) == ()
