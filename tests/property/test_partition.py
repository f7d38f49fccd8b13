from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedcore.seeds import numpy_rng
from fedcore.task.partition import Rows, by_column, dirichlet, iid, shards

SEEDS = st.integers(0, 2**63 - 1)


def is_a_partition(parts: Sequence[Rows], count: int) -> bool:
    """Disjoint and complete: every row number stands in the parts exactly once."""
    return sorted(np.concatenate([*parts, np.array([], dtype=np.int64)]).tolist()) == list(
        range(count)
    )


def same(one: Sequence[Rows], other: Sequence[Rows]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(st.integers(1, 30), st.integers(0, 200), SEEDS)
def test_iid_deals_every_row_out_evenly(clients: int, more: int, seed: int) -> None:
    count = clients + more
    parts = iid(count, clients, seed=seed)
    assert len(parts) == clients
    assert is_a_partition(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert same(parts, iid(count, clients, seed=seed))


@given(
    st.lists(st.integers(0, 5), min_size=40, max_size=200),
    st.integers(1, 10),
    st.integers(1, 4),
    st.floats(1e-6, 1e6),
    SEEDS,
)
def test_dirichlet_leaves_every_client_enough(
    labels: list[int], clients: int, least: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(labels, clients, alpha=alpha, seed=seed, min_examples=least)
    assert len(parts) == clients
    assert is_a_partition(parts, len(labels))
    assert min(map(len, parts)) >= least
    assert same(parts, dirichlet(labels, clients, alpha=alpha, seed=seed, min_examples=least))


def plain_dirichlet(
    labels: list[int], clients: int, *, alpha: float, seed: int, least: int
) -> list[list[int]]:
    """The definition: a client with too few rows takes the last one of the largest client."""
    rng, column = numpy_rng(seed, "dirichlet"), np.asarray(labels)
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in np.unique(column):
        rows = rng.permutation(np.flatnonzero(column == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(rows, np.round(cuts).astype(int)), strict=True):
            part.extend(chunk.tolist())
    for part in parts:
        while len(part) < least:
            part.append(max(parts, key=len).pop())
    return [sorted(part) for part in parts]


@given(
    st.lists(st.integers(0, 5), min_size=40, max_size=120),
    st.integers(1, 10),
    st.integers(1, 4),
    st.sampled_from([0.01, 0.3, 10.0]),
    SEEDS,
)
def test_dirichlet_splits_as_its_definition_does(
    labels: list[int], clients: int, least: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(labels, clients, alpha=alpha, seed=seed, min_examples=least)
    plain = plain_dirichlet(labels, clients, alpha=alpha, seed=seed, least=least)
    assert [part.tolist() for part in parts] == plain


def test_dirichlet_splits_many_rows_among_many_clients() -> None:
    """Its work grows with the rows and not with rows times clients, which would take minutes."""
    parts = dirichlet(np.arange(200_000) % 10, 20_000, alpha=0.5, min_examples=10)
    assert {len(part) for part in parts} == {10}
    assert is_a_partition(parts, 200_000)


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=30, max_size=120),
    st.integers(1, 10),
    st.integers(1, 3),
    SEEDS,
)
def test_shards_hold_few_labels(labels: list[str], clients: int, each: int, seed: int) -> None:
    parts = shards(labels, clients, shards_a_client=each, seed=seed)
    assert len(parts) == clients
    assert is_a_partition(parts, len(labels))
    longest = -(-len(labels) // (clients * each))
    assert max(map(len, parts)) <= longest * each
    assert same(parts, shards(labels, clients, shards_a_client=each, seed=seed))


@given(st.lists(st.one_of(st.integers(-3, 3), st.just(float("nan"))), max_size=50))
def test_a_column_gives_a_client_for_each_value(values: list[float]) -> None:
    parts = by_column(values)
    assert is_a_partition(list(parts.values()), len(values))
    for rows in parts.values():
        assert len({repr(float(values[row])) for row in rows}) == 1
    assert len(parts) == len({repr(float(value)) for value in values})
