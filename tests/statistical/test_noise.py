"""The noise that devices draw is Gaussian, far into its tails.

`SystemDraws` has no seed, so a key is put into its stream, and every run sees the same numbers.
Bounds are those at which right draws would fail under one key in a million, each test.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats

from fedcore.privacy.draws import SystemDraws, _KeyStream, grid_step
from fedcore.seeds import numpy_rng

ONE_IN_A_MILLION = 4.9  # standard deviations of a normal variable, both sides
RARE = 1e-6
COUNT = 10_000_000
Floats = NDArray[np.float64]


def draws(key: int) -> SystemDraws:
    return SystemDraws(_KeyStream(key.to_bytes(32, "big"), bytes(16)))


@pytest.fixture(scope="module")
def drawn() -> Floats:
    """In parts, as `add_noise` draws them."""
    of = draws(1)
    return np.concatenate([of.normal(1 << 16) for _ in range(-(-COUNT // (1 << 16)))])[:COUNT]


def check_uniform(shares: Floats) -> None:
    """Kolmogorov-Smirnov, and chi-square over 1,000 bins; reorders what it is given."""
    count = len(shares)
    cells = np.bincount((shares * 1000).astype(np.int64).clip(0, 999), minlength=1000)
    fit = float(np.square(cells - count / 1000).sum() / (count / 1000))
    assert stats.chi2.ppf(RARE / 2, 999) < fit < stats.chi2.isf(RARE / 2, 999)
    shares.sort()
    places = np.arange(count) / count
    distance = max(np.max(shares - places), np.max(places + 1 / count - shares))
    assert 2 * math.exp(-2 * count * distance**2) > RARE


def check_tails(z: Floats) -> None:
    """How many lie beyond 3, 4, 5 and 6 deviations on each side, against a Poisson number."""
    for beyond in (3.0, 4.0, 5.0, 6.0):
        expected = len(z) * float(special.ndtr(-beyond))
        low, high = stats.poisson.ppf(RARE / 16, expected), stats.poisson.isf(RARE / 16, expected)
        for side in (np.count_nonzero(z > beyond), np.count_nonzero(z < -beyond)):
            assert low <= side <= high, beyond


def check_independent(z: Floats) -> None:
    """Neighbours, and the two numbers that one pair of words gives, themselves and squared."""
    half = 1 << 15
    pairs = z[: len(z) // (2 * half) * 2 * half].reshape(-1, 2, half)
    squared = (np.square(z) - 1) / math.sqrt(2)
    squared_pairs = (np.square(pairs) - 1) / math.sqrt(2)
    for one, other in (
        (z[1:], z[:-1]),
        (z[2:], z[:-2]),
        (squared[1:], squared[:-1]),
        (pairs[:, 0].ravel(), pairs[:, 1].ravel()),
        (squared_pairs[:, 0].ravel(), squared_pairs[:, 1].ravel()),
    ):
        together = float(np.dot(one, other)) / len(one)
        assert abs(together) < ONE_IN_A_MILLION / math.sqrt(len(one))


def test_ten_million_numbers_have_the_distribution_of_a_gaussian(drawn: Floats) -> None:
    check_uniform(special.ndtr(drawn))


def test_their_tails_are_as_heavy_as_a_gaussians(drawn: Floats) -> None:
    check_tails(drawn)


def test_none_tells_of_another(drawn: Floats) -> None:
    check_independent(drawn)


def test_their_moments_are_a_gaussians(drawn: Floats) -> None:
    scale = ONE_IN_A_MILLION / math.sqrt(COUNT)
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float(np.mean(drawn**power)) - moment) < scale * deviation


@pytest.mark.parametrize("bound", [1.0, 1e4])
def test_what_is_added_on_the_grid_is_as_gaussian(bound: float) -> None:
    count, deviation = 2_000_000, 0.8
    sums = torch.from_numpy(numpy_rng(1, "sums").uniform(-bound, bound, count))
    noisy = sums.clone()
    draws(2).add_noise([noisy], deviation=deviation, bound=bound)
    step = grid_step(deviation, bound)
    assert step < 1e-9 * deviation  # so that rounding is out of every test's sight
    added = (noisy - sums).numpy() / deviation
    check_tails(added)
    check_independent(added)
    with_sum = float(np.dot(added, sums.numpy())) / count / (bound / math.sqrt(3))
    assert abs(with_sum) < ONE_IN_A_MILLION / math.sqrt(count)
    check_uniform(special.ndtr(added))


def test_low_order_bits_of_the_result_tell_nothing_of_the_sum() -> None:
    """The attack of Mironov 2012, on what a grid leaves: which of two sums was it?"""
    count = 200_000
    low = []
    for key, total in ((3, 0.0), (4, 1 / 3)):
        noisy = torch.full((count,), total, dtype=torch.float64)
        draws(key).add_noise([noisy], deviation=1.0, bound=1.0)
        steps = noisy.numpy() / grid_step(1.0, 1.0)
        assert np.array_equal(steps, np.rint(steps))
        low.append(np.bincount(steps.astype(np.int64) & 255, minlength=256))
    for cells in low:
        fit = float(np.square(cells - count / 256).sum() / (count / 256))
        assert stats.chi2.ppf(RARE / 4, 255) < fit < stats.chi2.isf(RARE / 4, 255)


class Words:
    """A stream of given words, in place of the cipher's."""

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self.given = words

    def fill(self, words: NDArray[np.uint64]) -> None:
        assert len(words) == len(self.given)
        words[:] = self.given


def of_words(radius: NDArray[np.uint64], angle: NDArray[np.uint64]) -> Floats:
    """What pairs of words give, all cosines before all sines."""
    cosines, sines = [], []
    for start in range(0, len(radius), 1 << 14):  # a chunk holds so many pairs
        part = slice(start, start + (1 << 14))
        words: Any = Words(np.concatenate([angle[part], radius[part]]))
        found = SystemDraws(words).normal(2 * len(radius[part]))
        cosines.append(found[: len(radius[part])])
        sines.append(found[len(radius[part]) :])
    return np.concatenate([*cosines, *sines])


def test_the_farthest_numbers_lie_beyond_nine_deviations() -> None:
    last = np.uint64(2**63 - 1)  # the highest bit of a radius does not count
    found = of_words(np.array([0, 1, last, 2**63], np.uint64), np.zeros(4, np.uint64))
    assert found[0] == pytest.approx(math.sqrt(2 * 64 * math.log(2)), rel=1e-12)
    assert found[0] > 9.3
    assert np.isfinite(found).all()
    assert abs(found[2]) < 1e-8  # and the nearest at the mean
    assert found[3] == found[0]
    quarters = np.array([0, 1, 2, 3], np.uint64) << np.uint64(62)
    sides = of_words(np.zeros(4, np.uint64), quarters)
    assert sides[:4] / found[0] == pytest.approx([1, 0, -1, 0], abs=1e-12)
    assert sides[4:] / found[0] == pytest.approx([0, 1, 0, -1], abs=1e-12)


@pytest.mark.parametrize("zeros", [24, 32, 40])
def test_beyond_where_24_bits_end_the_tail_is_still_a_gaussians(zeros: int) -> None:
    """Words so small that their radius is what a rare one is, 5.77 and more."""
    rng, count = numpy_rng(5, "tail", zeros), 300_000
    radius = rng.integers(0, 2 ** (63 - zeros), count, np.uint64)
    angle = rng.integers(0, 2**64, count, np.uint64)
    found = of_words(radius, angle)
    lengths = np.hypot(found[:count], found[count:])
    least = math.sqrt(2 * zeros * math.log(2))
    assert lengths.min() > min(5.76, least - 1e-6)
    assert np.count_nonzero(np.abs(found) > 5.77) > 1000
    # Given that it is a rare one, half the squared radius exceeds its least value exponentially.
    check_uniform(np.exp(-(np.square(lengths) - least**2) / 2).clip(0, 1 - 1e-12))
    angles = np.arctan2(found[count:], found[:count]) / (2 * math.pi)
    check_uniform(np.mod(angles, 1.0))
