"""Reads columns of targets: classes with names, or numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedcore.errors import DataError
from fedcore.observability.words import counted

Values = NDArray[Any]
_MOST_CLASSES = 20  # of whole numbers that are taken for classes
_KINDS = ("classification", "regression")


@dataclass(frozen=True)
class ReadTargets:
    """Targets of all clients in one form."""

    kind: str
    by_client: Mapping[str, Tensor]
    """Class numbers ``(N,)``, or float32 numbers ``(N,)`` or ``(N, K)``."""
    labels: tuple[str, ...]
    note: str


def read_targets(
    values: Mapping[str, Values], *, name: str, kind: str | None = None
) -> ReadTargets:
    """Reads the targets of all clients as classes or as numbers.

    Text, truth values, and up to 20 different whole numbers are classes, unless ``kind`` says
    otherwise; classes are numbered in the order of their sorted values over all clients.

    Args:
        values: One array of targets a client.
        name: Name of the target, for errors.
        kind: ``classification`` or ``regression``; None to decide by the values.

    Raises:
        DataError: a target is missing, of different types, or not a number in a regression.
    """
    if kind not in (None, *_KINDS):
        raise DataError(
            f"kind = {kind!r}: expected 'classification' or 'regression' here. Nothing was read; "
            "for another kind, make a fedcore.Task of the data."
        )
    for client, column in values.items():
        missing = _missing(column)
        if missing.any():
            count, row = int(missing.sum()), int(missing.argmax())
            raise DataError(
                f"client {client!r}: {counted(count, 'row')} {'has' if count == 1 else 'have'} no "
                f"target in {name!r}, the first is row {row}. Nothing was read; leave such rows "
                f"out, in pandas with frame.dropna(subset=[{name!r}])."
            )
    numbers = all(column.dtype.kind in "iuf" for column in values.values())
    distinct = _distinct(values, name) if not (numbers and kind == "regression") else []
    whole = numbers and all(_is_whole(column) for column in values.values())
    flat = all(column.ndim == 1 for column in values.values())
    is_class = not numbers or (whole and len(distinct) <= _MOST_CLASSES and flat)
    if kind == "regression" or (kind is None and not is_class):
        return _numbers(values, name, numbers)
    return _classes(values, distinct, name)


def _missing(column: Values) -> NDArray[np.bool_]:
    flat = column.reshape(len(column), -1)
    if column.dtype.kind == "f":
        return np.asarray(np.isnan(flat).any(axis=1))
    if column.dtype.kind == "O":
        return np.array([any(one is None or one != one for one in row) for row in flat], dtype=bool)
    return np.zeros(len(column), dtype=bool)


def _is_whole(column: Values) -> bool:
    return bool(np.isfinite(column).all() and (column == np.floor(column)).all())


def _distinct(values: Mapping[str, Values], name: str) -> list[Any]:
    found = {one.item() if hasattr(one, "item") else one for v in values.values() for one in v.flat}
    types = {type(one).__name__ for one in found if not isinstance(one, int | float)}
    types |= {"number" for one in found if isinstance(one, int | float)}
    if len(types) > 1:
        raise DataError(
            f"target {name!r}: its values are of different types ({', '.join(sorted(types))}). "
            "Nothing was read; give all clients numbers, or all of them text."
        )
    return sorted(found)


def _numbers(values: Mapping[str, Values], name: str, numbers: bool) -> ReadTargets:
    if not numbers and any(column.dtype.kind not in "iufb" for column in values.values()):
        raise DataError(
            f"target {name!r}: it holds text, and a regression needs numbers. Nothing was read; "
            "leave kind out, or convert the column."
        )
    found = {
        client: torch.as_tensor(np.asarray(column, dtype=np.float32))
        for client, column in values.items()
    }
    return ReadTargets("regression", found, (), f"{name}: numbers, for a regression")


def _classes(values: Mapping[str, Values], distinct: list[Any], name: str) -> ReadTargets:
    place = {value: number for number, value in enumerate(distinct)}
    labels = tuple(_text(value) for value in distinct)
    found = {
        client: torch.tensor([place[one.item() if hasattr(one, "item") else one] for one in column])
        for client, column in values.items()
    }
    shown = ", ".join(labels[:6]) + (", ..." if len(labels) > 6 else "")
    note = f"{name}: {len(labels)} {'class' if len(labels) == 1 else 'classes'} ({shown})"
    if isinstance(distinct[0], int | float) and not isinstance(distinct[0], bool):
        note += "; kind='regression' takes them as numbers"
    return ReadTargets("classification", found, labels, note)


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)
