"""Splits a data set without natural clients into clients.

Every partitioner returns one array of row numbers per client; the arrays are disjoint and cover
all rows.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedcore.errors import DataError
from fedcore.observability.words import counted
from fedcore.seeds import numpy_rng

Rows = NDArray[np.int64]


def iid(count: int, clients: int, *, seed: int = 0) -> list[Rows]:
    """Splits ``count`` rows at random into clients of nearly equal size.

    Example::

        parts = fedcore.iid(len(data), 10, seed=1)
        client_data = lambda client, folder: Subset(data, parts[int(client)])

    Args:
        count: Number of rows.
        clients: Number of clients.
        seed: Determines the split.

    Returns:
        Row numbers of each client, ascending; disjoint and covering all rows.

    Raises:
        DataError: there are fewer rows than clients.
    """
    _check(count, clients, each=1)
    order = numpy_rng(seed, "iid").permutation(count)
    return [np.sort(part) for part in np.array_split(order, clients)]


def dirichlet(
    labels: ArrayLike, clients: int, *, alpha: float, seed: int = 0, min_examples: int = 1
) -> list[Rows]:
    """Draws, for each label, the clients' shares from a symmetric Dirichlet distribution.

    Example::

        parts = fedcore.dirichlet(labels, 10, alpha=0.3, seed=1)
        client_data = lambda client, folder: Subset(data, parts[int(client)])

    Args:
        labels: One label a row, shape ``(N,)``.
        clients: Number of clients.
        alpha: Concentration; small values give each client few labels, large ones approach IID.
        seed: Determines the split.
        min_examples: Least rows of each client; the largest clients give up rows to reach it.

    Returns:
        Row numbers of each client, ascending; disjoint and covering all rows.

    Raises:
        DataError: too few rows for ``min_examples``, or ``alpha`` is not positive and finite.

    Source:
        Hsu, Qi, Brown 2019, arXiv:1909.06335, section 3.
    """
    distinct, numbers = _column(labels)
    _check(len(numbers), clients, each=min_examples)
    if not 0 < alpha < np.inf:
        raise DataError(
            f"dirichlet: alpha = {alpha}; it must be above 0 and finite. Nothing was split."
        )
    rng = numpy_rng(seed, "dirichlet")
    rows, owners = [], []
    for label_rows in np.split(*_by_number(numbers, len(distinct))):
        shuffled = rng.permutation(label_rows)
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(shuffled)
        ends = np.clip(np.round(cuts).astype(np.int64), 0, len(shuffled))
        widths = np.diff(np.concatenate([[0], ends, [len(shuffled)]]))
        rows.append(shuffled)
        owners.append(np.repeat(np.arange(clients), widths))
    return [np.sort(part) for part in _filled(*_grouped(rows, owners, clients), min_examples)]


def _grouped(
    rows: Sequence[Rows], owners: Sequence[Rows], clients: int
) -> tuple[Rows, NDArray[np.int64]]:
    """Returns rows ordered by client, and where each client's begin; keeps the order within one."""
    owner = np.concatenate(owners)
    ordered = np.concatenate(rows)[np.argsort(owner, kind="stable")]
    counts = np.bincount(owner, minlength=clients)
    return ordered, np.concatenate([[0], np.cumsum(counts)])


def _filled(ordered: Rows, starts: NDArray[np.int64], least: int) -> list[Rows]:
    """Moves rows from the largest clients to those below ``least``, in time ``O(n log n)``.

    A heap holds the sizes of possible donors. A client that has received rows is none: while
    another has too few, the largest has more than ``least``.
    """
    counts = np.diff(starts)
    sizes = counts.tolist()
    donors = [(-size, client) for client, size in enumerate(sizes) if size > least]
    heapq.heapify(donors)
    received: dict[int, list[int]] = {}
    for client, size in enumerate(counts.tolist()):
        for _ in range(least - size):
            donor = donors[0][1]
            sizes[donor] -= 1
            received.setdefault(client, []).append(int(ordered[starts[donor] + sizes[donor]]))
            if sizes[donor] > least:
                heapq.heapreplace(donors, (-sizes[donor], donor))
            else:
                heapq.heappop(donors)
    parts = [ordered[first : first + size] for first, size in zip(starts[:-1], sizes, strict=True)]
    for client, extra in received.items():
        parts[client] = np.concatenate([parts[client], np.asarray(extra, dtype=np.int64)])
    return parts


def shards(labels: ArrayLike, clients: int, *, shards_a_client: int, seed: int = 0) -> list[Rows]:
    """Sorts rows by label, cuts them into equal shards and deals each client some of them.

    Example::

        parts = fedcore.shards(labels, 10, shards_a_client=2, seed=1)  # about two labels each

    Args:
        labels: One label a row, shape ``(N,)``.
        clients: Number of clients.
        shards_a_client: Shards that each client gets.
        seed: Determines the split.

    Returns:
        Row numbers of each client, ascending; disjoint and covering all rows.

    Raises:
        DataError: there are fewer rows than shards.

    Source:
        McMahan et al. 2017, arXiv:1602.05629, section 3 (two shards a client).
    """
    _, numbers = _column(labels)
    _check(len(numbers), clients, each=shards_a_client)
    pieces = np.array_split(np.argsort(numbers, kind="stable"), clients * shards_a_client)
    order = numpy_rng(seed, "shards").permutation(len(pieces)).reshape(clients, shards_a_client)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in order]


def by_column(values: Sequence[Hashable] | NDArray[np.generic]) -> dict[str, Rows]:
    """Makes one client of each distinct value of a column (a patient, a machine, a writer).

    Example::

        rows = fedcore.by_column(frame["patient"])
        clients = lambda folder: list(rows)
        client_data = lambda client, folder: Subset(data, rows[client])

    Args:
        values: One value a row, shape ``(N,)``.

    Returns:
        Row numbers by the value's text, in the order of the sorted values.

    Raises:
        DataError: the values are not one-dimensional.
    """
    distinct, numbers = _column(values)
    parts = np.split(*_by_number(numbers, len(distinct)))
    return {str(value): part for value, part in zip(distinct, parts, strict=False)}


def _by_number(numbers: Rows, count: int) -> tuple[Rows, NDArray[np.int64]]:
    """Returns rows ordered by number, ascending within one, and where the second to last begin."""
    ends = np.cumsum(np.bincount(numbers, minlength=count))
    return np.argsort(numbers, kind="stable"), ends[:-1]


def _column(values: object) -> tuple[NDArray[np.generic], Rows]:
    """Returns the sorted distinct values, and each row's index among them (all NaN share one)."""
    column: NDArray[np.generic] = np.asarray(values)
    if column.ndim != 1:
        raise DataError(
            f"partition: expected one value per row, got an array of shape {column.shape}. "
            "Nothing was split."
        )
    distinct, numbers = np.unique(column, return_inverse=True)
    return distinct, numbers.astype(np.int64)


def _check(count: int, clients: int, *, each: int) -> None:
    if clients < 1 or each < 1 or count < clients * each:
        raise DataError(
            f"partition: {counted(count, 'row')} cannot be split among "
            f"{counted(clients, 'client')} with at least {each} each. Nothing was split; use "
            "fewer clients, or require fewer rows each."
        )
