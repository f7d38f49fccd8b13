"""`from_frames`: one pandas DataFrame a client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from fedcore.errors import DataError
from fedcore.sources.client_data import ClientData, split_by_client
from fedcore.sources.table import EncodeTable, TableColumn
from fedcore.sources.targets import read_targets

_MOST_CATEGORIES = 1000


def from_frames(
    frames: Mapping[str, Any],
    *,
    target: str,
    kind: str | None = None,
    categories: Sequence[str] = (),
    test_share: float = 0.2,
    seed: int = 0,
) -> ClientData:
    """Reads one pandas DataFrame for each client, with the same columns.

    Numbers stay as they are. Missing numbers become 0, and a further column marks them; text and
    categories become one column for each value. Both happen in the task's ``preprocess``, so a
    device gives NaN for what is missing, and a category's place for its name. ``notes`` says it for
    each column. The categories and labels are those of all clients together, so this is for
    simulations; on devices, a task file states them.

    Example::

        data = fedcore.from_frames({"site-a": one, "site-b": other}, target="outcome")
        result = fedcore.simulate(
            data.task("outcomes"), federation={"normalisation": "federated"}
        )

    Args:
        frames: A DataFrame for each client, by the client's name.
        target: Name of the column to predict. Text, truth values and up to 20 different whole
            numbers are classes.
        kind: ``classification`` or ``regression``; None to decide by the target's values.
        categories: Names of further columns whose numbers are categories.
        test_share: Share of each client's rows that no training reads, drawn at random.
        seed: Determines the split.

    Returns:
        The data, with `ClientData.task` for a task.

    Raises:
        DataError: columns differ between clients, a column has a type that cannot be encoded, or a
            target is missing; the message names client, column and row.
    """
    if not isinstance(frames, Mapping):
        raise DataError(
            f"from_frames: got one {type(frames).__name__}, expected a DataFrame for each client, "
            "by name. Nothing was read; split it by the column that names the site: "
            "dict(tuple(frame.groupby('site')))."
        )
    names = _columns(frames, target)
    unknown = sorted(set(categories) - set(names))
    if unknown:
        raise DataError(
            f"categories: {unknown[0]!r} is no column of the data. Nothing was read; name some of "
            f"{', '.join(names[:8])}."
        )
    found = read_targets(
        {client: _target(frame[target]) for client, frame in frames.items()}, name=target, kind=kind
    )
    columns, encoded = [], list[dict[str, NDArray[np.float32]]]()
    for name in names:
        column, values = _column(frames, name, as_category=name in categories)
        columns.append(column)
        encoded.append(values)
    parts: dict[str, Any] = {}
    for client in frames:
        inputs = np.stack([values[client] for values in encoded], axis=1)
        parts[client] = TensorDataset(torch.from_numpy(inputs), found.by_client[client])
    train, test = split_by_client(parts, test_share=test_share, seed=seed)
    plain = not any(column.categories or column.missing for column in columns)
    return ClientData(
        kind=found.kind,
        train=train,
        test=test,
        example_input=torch.zeros(len(columns)),
        preprocess=None if plain else partial(EncodeTable, tuple(columns)),
        labels=found.labels,
        columns=tuple(names),
        notes=(*(column.note for column in columns), found.note),
    )


def _columns(frames: Mapping[str, Any], target: str) -> list[str]:
    """Returns the names of the input columns, after a check that all frames have the same."""
    if not frames:
        raise DataError("from_frames: got no frames, expected one for each client.")
    first: str | None = None
    for client, frame in frames.items():
        if not hasattr(frame, "columns") or not hasattr(frame, "dtypes"):
            raise DataError(
                f"client {client!r}: got a {type(frame).__name__}, expected a pandas DataFrame. "
                "Nothing was read; convert it, such as with .to_pandas()."
            )
        if not len(frame):
            raise DataError(
                f"client {client!r}: it has no examples, expected at least 1. Nothing was read; "
                "leave this client out."
            )
        names = [str(name) for name in frame.columns]
        if len(set(names)) < len(names):
            raise DataError(f"client {client!r}: two columns have one name. Nothing was read.")
        if target not in names:
            raise DataError(
                f"client {client!r}: it has no column {target!r}, the target. Nothing was read; "
                f"its columns are {', '.join(names[:12])}."
            )
        first = client if first is None else first
        expected = [str(name) for name in frames[first].columns]
        if set(names) != set(expected):
            missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
            raise DataError(
                f"client {client!r}: its columns differ from those of {first!r}: missing "
                f"{missing}, extra {extra}. Nothing was read; give all frames the same columns."
            )
    assert first is not None
    names = [str(name) for name in frames[first].columns if str(name) != target]
    if not names:
        raise DataError(f"client {first!r}: it has no column besides the target. Nothing was read.")
    return names


def _target(series: Any) -> NDArray[Any]:
    values: NDArray[Any] = np.asarray(series)
    if values.dtype.kind != "O":
        return values
    gone = series.isna().to_numpy(dtype=bool)
    if not gone.any() and all(isinstance(one, int | float) for one in values):
        return np.asarray(values.tolist())  # of a nullable type
    values = values.copy()
    values[gone] = None
    return values


def _column(
    frames: Mapping[str, Any], name: str, *, as_category: bool
) -> tuple[TableColumn, dict[str, NDArray[np.float32]]]:
    """Returns how a column is encoded, and its numbers by client."""
    forms = {client: _form(client, frame[name], name) for client, frame in frames.items()}
    if not as_category and len(set(forms.values())) > 1:
        text = next(client for client, form in forms.items() if form == "text")
        other = next(client for client, form in forms.items() if form == "number")
        raise DataError(
            f"column {name!r}: it is text for client {text!r} and numbers for client {other!r}. "
            "Nothing was read; convert it, with pandas.to_numeric(..., errors='coerce') for "
            "numbers, or name it in `categories`."
        )
    if as_category or "text" in forms.values():
        return _category(frames, name)
    values = {}
    for client, frame in frames.items():
        numbers = frame[name].astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)
        _demand_bounded(numbers, client, name)
        values[client] = numbers.astype(np.float32)
    missing = any(bool(np.isnan(each).any()) for each in values.values())
    return TableColumn(name, missing=missing), values


def _demand_bounded(numbers: NDArray[np.float64], client: str, name: str) -> None:
    odd = np.abs(numbers) > np.finfo(np.float32).max  # infinity too; not NaN
    if odd.any():
        row = int(odd.argmax())
        raise DataError(
            f"client {client!r}, row {row}: column {name!r} is {numbers[row]:g}, expected a number "
            "that float32 can hold. Nothing was read; bound it, or make it missing."
        )


def _form(client: str, series: Any, name: str) -> str:
    """Returns whether a column holds text or numbers."""
    kind = getattr(series.dtype, "kind", "O")
    if kind in "iufb" or str(series.dtype).lower() in ("boolean", "bool"):
        return "number"
    values = series.dropna()
    found = {type(one) for one in values}
    if found <= {str} or str(series.dtype) == "category":
        return "text" if found or str(series.dtype) == "category" else "number"
    if all(issubclass(one, int | float | np.number | np.bool_) for one in found):
        return "number"
    raise DataError(
        f"client {client!r}: column {name!r} is of type {series.dtype}, which holds "
        f"{', '.join(sorted(one.__name__ for one in found)[:3])}; expected numbers, truth values "
        "or text. Nothing was read; make numbers of it (of a date the days since another), or "
        "leave it out."
    )


def _texts(series: Any) -> list[str | None]:
    missing = series.isna()
    return [None if gone else str(one) for one, gone in zip(series, missing, strict=True)]


def _category(
    frames: Mapping[str, Any], name: str
) -> tuple[TableColumn, dict[str, NDArray[np.float32]]]:
    """Returns a column of categories: the values of all clients, sorted."""
    texts = {client: _texts(frame[name]) for client, frame in frames.items()}
    found = sorted({text for column in texts.values() for text in column if text is not None})
    if len(found) > _MOST_CATEGORIES or not found:
        raise DataError(
            f"column {name!r}: it has {len(found)} different texts, expected 1 to "
            f"{_MOST_CATEGORIES}. Nothing was read; leave it out if it is a name or free text."
        )
    place: dict[str | None, float] = {text: float(number) for number, text in enumerate(found)}
    place[None] = np.nan
    values = {
        client: np.array([place[text] for text in column], dtype=np.float32)
        for client, column in texts.items()
    }
    return TableColumn(name, categories=tuple(found)), values
