from __future__ import annotations

import numpy as np
import pytest

from fedcore.config.run import FederationConfig, RunConfig
from fedcore.errors import RoundFailed
from server.rounds.cohort import quorum_of, select, selection_size

NODES = [101, 7, 55, 23, 88, 42]


def draw(size: int, *, seed: int = 0, number: int = 1) -> list[int]:
    return select(NODES, size, seed=seed, words=("round", number))


def test_the_same_seed_and_round_draw_the_same_nodes_in_whatever_order_they_came() -> None:
    assert draw(3) == select(reversed(NODES), 3, seed=0, words=("round", 1))


def test_other_rounds_and_seeds_draw_others() -> None:
    assert len({tuple(draw(3, number=number)) for number in range(20)}) > 5
    assert len({tuple(draw(3, seed=seed)) for seed in range(20)}) > 5


def test_a_cohort_has_no_node_twice_and_stands_in_order() -> None:
    for number in range(20):
        drawn = draw(4, number=number)
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(NODES)
        assert len(drawn) == 4


def test_everyone_can_be_asked() -> None:
    assert draw(6) == sorted(NODES)


def test_every_node_is_drawn_as_often_as_any_other() -> None:
    counts = np.zeros(len(NODES))
    for number in range(3000):
        for node in draw(2, number=number):
            counts[NODES.index(node)] += 1
    # 1,000 times each, with a deviation of 26; five of those on either side
    assert np.abs(counts - 1000).max() < 130


def test_too_few_nodes_are_an_error_with_both_numbers() -> None:
    with pytest.raises(RoundFailed, match=r"round 3: 6 clients are connected, but .* needs 7"):
        draw(7, number=3)


@pytest.mark.parametrize(
    ("over", "cohort", "asked"),
    [(1.0, 7, 7), (1.3, 10, 13), (1.1, 100, 110), (1.01, 10, 11), (1.5, 1, 2), (10.0, 3, 30)],
)
def test_so_many_more_are_asked_as_the_run_says(over: float, cohort: int, asked: int) -> None:
    federation = {"over_selection": over, "cohort": cohort}
    values = {"name": "run", "task": "task.py", "federation": federation}
    run = RunConfig.model_validate(values)
    assert selection_size(run, cohort, simulated=False) == asked
    assert selection_size(run, cohort, simulated=True) == cohort, "nobody is late without devices"
    classes = {"devices": ({"name": "phone", "examples_per_s": 10.0},)}
    clocked = RunConfig.model_validate(values | {"simulation": classes})
    assert selection_size(clocked, cohort, simulated=True) == asked


def test_a_short_draw_takes_all_who_are_there_but_no_fewer_than_the_least() -> None:
    found = select([3, 1], 3, seed=0, words=("round", 1), least=2)
    assert found == [1, 3]
    assert len(select(range(5), 3, seed=0, words=("round", 1), least=2)) == 3
    with pytest.raises(RoundFailed, match=r"but federation.quorum of federation.cohort needs 2"):
        select([3], 3, seed=0, words=("round", 1), least=2)


@pytest.mark.parametrize(
    ("quorum", "clients", "needed"),
    [(0.75, 4, 3), (0.8, 4, 4), (0.6, 3, 2), (0.55, 20, 11), (1.0, 3, 3), (0.01, 3, 1)],
)
def test_a_quorum_is_a_share_rounded_up(quorum: float, clients: int, needed: int) -> None:
    assert quorum_of(quorum, clients) == needed


def test_by_default_one_of_four_may_be_missing() -> None:
    assert quorum_of(FederationConfig().quorum, 4) == 3
