"""Splits a data set without natural clients into clients.

Every partitioner returns one array of row numbers per client; the arrays are disjoint and cover
all rows.
"""

from __future__ import annotations

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
    parts: list[list[int]] = [[] for _ in range(clients)]
    for label in range(len(distinct)):
        rows = rng.permutation(np.flatnonzero(numbers == label))
        cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
        for part, chunk in zip(parts, np.split(rows, np.round(cuts).astype(int)), strict=True):
            part.extend(chunk.tolist())
    for part in parts:
        while len(part) < min_examples:
            part.append(max(parts, key=len).pop())
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


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
    return {str(value): np.flatnonzero(numbers == i) for i, value in enumerate(distinct)}


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
