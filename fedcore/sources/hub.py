"""`from_datasets`: Hugging Face `datasets`, without a dependency on that package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedcore.errors import DataError
from fedcore.sources.client_data import ClientData, split_by_client
from fedcore.sources.images import ScalePixels, image_tensor
from fedcore.sources.targets import ReadTargets, read_targets
from fedcore.task.partition import by_column


def from_datasets(
    data: Any,
    *,
    inputs: str | Sequence[str],
    target: str,
    client: str | None = None,
    kind: str | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> ClientData:
    """Reads Hugging Face data sets: one for each client, or one with a column that names clients.

    Any object works that has ``column_names``, a length, and rows that are dicts. Rows are read
    when they are needed. Images become uint8 ``(C, H, W)``, lists of numbers float32 or int64.

    Example::

        data = fedcore.from_datasets(
            load_dataset("owner/speech", split="train"),
            inputs="features", target="word", client="speaker",
        )
        task = data.task("words")

    Args:
        data: A data set for each client, by the client's name; or one data set.
        inputs: Name of the input's column, or of several columns of numbers.
        target: Name of the column to predict; names of a ``ClassLabel`` become labels.
        client: Name of the column with the client's name, if ``data`` is one data set.
        kind: ``classification`` or ``regression``; None to decide by the target's values.
        test_share: Share of each client's rows that no training reads, drawn at random.
        seed: Determines the split.

    Returns:
        The data, with `ClientData.task` for a task.

    Raises:
        DataError: a column does not exist, or holds what cannot be an input; the message names
            client and column.
    """
    columns = [inputs] if isinstance(inputs, str) else list(inputs)
    whole, rows = _by_client(data, client, [*columns, target])
    found = read_targets(
        {name: np.asarray(_values(whole[name], target))[rows[name]] for name in rows},
        name=target,
        kind=kind,
    )
    found = _named(found, whole, target)
    parts = {
        name: HubExamples(whole[name], columns, rows[name], found.by_client[name]) for name in rows
    }
    train, test = split_by_client(parts, test_share=test_share, seed=seed)
    first = next(iter(parts.values()))[0][0]
    return ClientData(
        kind=found.kind,
        train=train,
        test=test,
        example_input=torch.zeros_like(first),
        preprocess=partial(_scaled) if first.dtype == torch.uint8 and first.dim() == 3 else None,
        labels=found.labels,
        columns=tuple(columns) if len(columns) > 1 else (),
        notes=(found.note,),
    )


def _scaled() -> nn.Module:
    return ScalePixels()


class HubExamples(Dataset[tuple[Tensor, Tensor]]):
    """Some rows of a data set of dicts, read when they are needed."""

    def __init__(
        self, data: Any, columns: Sequence[str], rows: Sequence[int], targets: Tensor
    ) -> None:
        self._data, self._columns = data, columns
        self._rows, self._targets = rows, targets

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        """Returns one example."""
        values = self._data[int(self._rows[row])]
        parts = [input_tensor(values[column], column) for column in self._columns]
        if len(parts) == 1:
            return parts[0], self._targets[row]
        return torch.cat([part.reshape(-1).float() for part in parts]), self._targets[row]


def input_tensor(value: Any, column: str) -> Tensor:
    """Returns a value of a data set as a tensor: an image, a number, or lists of numbers.

    Raises:
        DataError: it is something else, such as text.
    """
    if hasattr(value, "getbands"):  # an image of Pillow
        return image_tensor(value)
    if isinstance(value, Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "iufb":
        raise DataError(
            f"column {column!r}: got {type(value).__name__}, expected numbers or an image. Turn "
            "text into token numbers first, such as with data.map(tokenize)."
        )
    made = torch.from_numpy(np.array(array))
    return made.float() if made.is_floating_point() else made


def _by_client(
    data: Any, client: str | None, needed: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the data set of each client, and the rows of it that are the client's."""
    if isinstance(data, Mapping) and client is None:
        whole = {str(name): each for name, each in data.items()}
        for name, each in whole.items():
            _demand_columns(each, needed, f"client {name!r}")
        return whole, {name: np.arange(len(each)) for name, each in whole.items()}
    if isinstance(data, Mapping) or client is None:
        raise DataError(
            "from_datasets: expected a data set for each client, or one data set and the name of "
            "the column that names its clients, as client='speaker'. Nothing was read."
        )
    _demand_columns(data, [*needed, client], "data")
    rows = by_column(np.asarray(_values(data, client)))
    return dict.fromkeys(rows, data), dict(rows)


def _demand_columns(data: Any, needed: Sequence[str], what: str) -> None:
    names = list(getattr(data, "column_names", ()))
    missing = [name for name in needed if name not in names]
    if missing:
        raise DataError(
            f"{what}: it has no column {missing[0]!r}. Nothing was read; its columns are "
            f"{', '.join(map(str, names[:12])) or 'unknown: got a ' + type(data).__name__}."
        )


def _values(data: Any, column: str) -> list[Any]:
    return list(data[column])


def _named(found: ReadTargets, whole: Mapping[str, Any], target: str) -> ReadTargets:
    """Returns the targets with the names of a ``ClassLabel``, which number all of its classes."""
    features = getattr(next(iter(whole.values())), "features", None)
    names = getattr((features or {}).get(target), "names", None)
    if not names or found.kind != "classification":
        return found
    numbers = torch.tensor([int(label) for label in found.labels])
    by_client = {client: numbers[values] for client, values in found.by_client.items()}
    note = f"{target}: {len(names)} classes, named by the data set"
    return ReadTargets(found.kind, by_client, tuple(map(str, names)), note)
