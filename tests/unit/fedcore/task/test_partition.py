from __future__ import annotations

import numpy as np
import pytest

from fedcore.errors import DataError
from fedcore.task.partition import Rows, by_column, dirichlet, iid, shards

LABELS = np.arange(1000) % 10


def labels_held(parts: list[Rows]) -> float:
    """How many labels a client holds, on average."""
    return float(np.mean([len(np.unique(LABELS[part])) for part in parts]))


def test_a_small_alpha_gives_few_labels_and_a_large_one_all() -> None:
    assert labels_held(dirichlet(LABELS, 10, alpha=0.05)) < 4
    assert labels_held(dirichlet(LABELS, 10, alpha=1000.0)) == 10


def test_two_shards_hold_about_two_labels() -> None:
    assert labels_held(shards(LABELS, 50, shards_a_client=2)) <= 2
    assert labels_held(iid(1000, 50)) > 8


def test_another_seed_is_another_split() -> None:
    assert not np.array_equal(iid(100, 2, seed=0)[0], iid(100, 2, seed=1)[0])
    one, other = (dirichlet(LABELS, 4, alpha=1.0, seed=seed) for seed in (0, 1))
    assert not np.array_equal(one[0], other[0])


def test_a_column_names_its_clients_by_sorted_value() -> None:
    parts = by_column(["b", "a", "b", "c"])
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "a": [1],
        "b": [0, 2],
        "c": [3],
    }
    assert list(by_column([10, 9])) == ["9", "10"]


@pytest.mark.parametrize(("count", "clients"), [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_too_few_rows_are_refused_with_both_figures(count: int, clients: int) -> None:
    with pytest.raises(DataError, match=rf"{count} rows? cannot be split among {clients} clients?"):
        iid(count, clients)


def test_more_rows_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(DataError, match="30 rows cannot be split among 4 clients with at least 8"):
        dirichlet(LABELS[:30], 4, alpha=1.0, min_examples=8)
    with pytest.raises(DataError, match="cannot be split among 4 clients with at least 8"):
        shards(LABELS[:30], 4, shards_a_client=8)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_without_a_distribution_is_refused(alpha: float) -> None:
    with pytest.raises(DataError, match=r"alpha = .*; it must be above 0 and finite"):
        dirichlet(LABELS, 4, alpha=alpha)


def test_a_table_is_no_column() -> None:
    with pytest.raises(DataError, match=r"got an array of shape \(5, 2\)"):
        by_column(np.zeros((5, 2)))
    with pytest.raises(DataError, match=r"got an array of shape \(5, 2\)"):
        dirichlet(np.zeros((5, 2)), 2, alpha=1.0)
