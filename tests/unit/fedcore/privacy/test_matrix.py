"""Correlated noise, against dense linear algebra and against figures that were published."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedcore.privacy.matrix import Factor, Floats, factor_for, participations_of, square_root


def dense(factor: Factor, rounds: int) -> Floats:
    """The whole matrix."""
    matrix = np.zeros((rounds, rounds))
    for place, entry in enumerate(factor.column[:rounds]):
        matrix += entry * np.eye(rounds, k=-place)
    return matrix


def sums(rounds: int) -> Floats:
    return np.tril(np.ones((rounds, rounds)))


@pytest.mark.parametrize("rounds", [1, 2, 7, 40])
def test_all_bands_are_the_square_root_of_prefix_sums(rounds: int) -> None:
    root = dense(square_root(rounds), rounds)
    assert root @ root == pytest.approx(sums(rounds))


def test_the_first_entries_are_those_of_the_papers() -> None:
    # Fichtenberger et al. 2023, theorem 2: 1, 1/2, 3/8, 5/16, 35/128, ...
    assert square_root(5).column == pytest.approx([1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])


@pytest.mark.parametrize("rounds", [16, 256, 1024])
def test_the_error_is_the_published_one(rounds: int) -> None:
    # Dvijotham et al. 2024, arXiv:2404.16706: no Toeplitz factor has a smaller error than this one,
    # and it grows as (ln n + ln 16 + gamma) / pi, here within 1 / (2 pi n).
    root = square_root(rounds)
    published = (math.log(16 * rounds) + float(np.euler_gamma)) / math.pi
    assert root.norm * root.error(rounds) == pytest.approx(published, abs=0.2 / rounds)
    assert root.error(rounds) == pytest.approx(root.norm)  # both factors are the same


@pytest.mark.parametrize("bands", [1, 2, 3, 8])
def test_the_error_is_that_of_dense_algebra(bands: int) -> None:
    rounds, factor = 20, square_root(bands)
    noise = sums(rounds) @ np.linalg.inv(dense(factor, rounds))
    assert factor.error(rounds) == pytest.approx(np.linalg.norm(noise[-1]))
    assert factor.norm == pytest.approx(np.linalg.norm(dense(factor, rounds), axis=0).max())


@pytest.mark.parametrize(("rounds", "separation", "bands"), [(7, 3, 3), (8, 2, 2), (6, 3, 1)])
def test_no_client_moves_it_further_than_its_sensitivity(
    rounds: int, separation: int, bands: int
) -> None:
    factor = square_root(bands)
    matrix, most = dense(factor, rounds), 0.0
    rng = np.random.default_rng(0)
    for chosen in itertools.product([0, 1], repeat=rounds):
        places = np.flatnonzero(chosen)
        if len(places) and (np.diff(places) >= separation).all():
            for _ in range(3):  # vectors of norm 1, in any directions
                moved = np.zeros((rounds, 4))
                moved[places] = rng.normal(size=(len(places), 4))
                moved[places] /= np.linalg.norm(moved[places], axis=1, keepdims=True)
                most = max(most, float(np.linalg.norm(matrix @ moved)))
    bound = factor.sensitivity(participations_of(rounds, separation))
    assert 0.8 * bound < most <= bound * (1 + 1e-12)


def test_noise_that_is_made_round_by_round_is_that_of_the_inverse() -> None:
    rounds, factor = 12, square_root(4)
    fresh = np.random.default_rng(0).normal(size=(rounds, 5))
    made: list[Floats] = []
    for one in fresh:
        made.append(factor.correlated(one, made[-3:]))
    assert np.array(made) == pytest.approx(np.linalg.solve(dense(factor, rounds), fresh))


def test_more_rest_means_less_noise_for_the_same_privacy() -> None:
    rounds = 64

    def error(separation: int) -> float:
        factor = factor_for(rounds, separation)
        assert len(factor.column) <= separation
        return factor.sensitivity(participations_of(rounds, separation)) * factor.error(rounds)

    found = [error(separation) for separation in (1, 2, 4, 16, 64)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(rounds)  # sqrt(64) of participation, sqrt(64) of the sum
    assert found[-1] < 2.6
