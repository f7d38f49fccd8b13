"""`from_arrays`: inputs and targets of each client as NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import TensorDataset

from fedcore.errors import DataError
from fedcore.sources.client_data import ClientData, split_by_client
from fedcore.sources.targets import read_targets


def from_arrays(
    parts: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    kind: str | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> ClientData:
    """Reads inputs ``(N, ...)`` and targets ``(N,)`` or ``(N, K)`` of each client.

    Floats become float32, and whole numbers keep their type.

    Example::

        data = fedcore.from_arrays({"anna": (x_1, y_1), "ben": (x_2, y_2)})
        task = data.task("points")

    Args:
        parts: Inputs and targets for each client, by the client's name.
        kind: ``classification`` or ``regression``; None to decide by the targets. Text, truth
            values and up to 20 different whole numbers are classes.
        test_share: Share of each client's rows that no training reads, drawn at random.
        seed: Determines the split.

    Returns:
        The data, with `ClientData.task` for a task.

    Raises:
        DataError: shapes or types differ between clients, or a target is missing; the message names
            the client.
    """
    inputs = {client: _inputs(client, pair[0]) for client, pair in parts.items()}
    targets = {client: np.asarray(pair[1]) for client, pair in parts.items()}
    for client, values in inputs.items():
        first = next(iter(inputs.values()))
        if len(values) != len(targets[client]):
            raise DataError(
                f"client {client!r}: {len(values)} inputs and {len(targets[client])} targets, "
                "expected as many of both. Nothing was read."
            )
        if values.shape[1:] != first.shape[1:] or values.dtype != first.dtype:
            raise DataError(
                f"client {client!r}: inputs are {values.dtype} {values.shape[1:]}, those of the "
                f"first client {first.dtype} {first.shape[1:]}. Nothing was read; give all clients "
                "one type and shape."
            )
    found = read_targets(targets, name="targets", kind=kind)
    examples: dict[str, Any] = {
        client: TensorDataset(torch.from_numpy(values), found.by_client[client])
        for client, values in inputs.items()
    }
    train, test = split_by_client(examples, test_share=test_share, seed=seed)
    first = next(iter(inputs.values()))
    widths = {tensor.shape[1] if tensor.dim() > 1 else 1 for tensor in found.by_client.values()}
    return ClientData(
        kind=found.kind,
        train=train,
        test=test,
        example_input=torch.zeros(first.shape[1:], dtype=torch.from_numpy(first[:0]).dtype),
        labels=found.labels,
        targets=max(widths),
        notes=(found.note,),
    )


def _inputs(client: str, values: ArrayLike) -> Any:
    found = np.asarray(values)
    if found.dtype.kind not in "iufb" or found.ndim == 0:
        raise DataError(
            f"client {client!r}: inputs are {found.dtype} {found.shape}, expected numbers of shape "
            "(N, ...). Nothing was read."
        )
    kept = np.float32 if found.dtype.kind == "f" else found.dtype
    return np.array(found, dtype=kept, order="C")  # of our own: a view may be read-only
