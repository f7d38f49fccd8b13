"""Data of named clients in the form that a task needs: splits, an example input, labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from fedcore.errors import DataError, TaskError
from fedcore.observability.words import counted
from fedcore.seeds import derive
from fedcore.task.definition import Examples, Task, size_of
from fedcore.training.batches import split

_HIDDEN = 64


@dataclass(frozen=True, kw_only=True)
class ClientData:
    """Data of several clients, from one of ``fedcore.from_frames``, ``from_arrays`` and others.

    Example::

        data = fedcore.from_frames({"site-a": one, "site-b": other}, target="outcome")
        print(*data.notes)
        task = data.task("outcomes")
        result = fedcore.simulate(task, federation={"normalisation": "federated"})
    """

    kind: str
    """The kind of problem, as in `fedcore.Task.kind`."""
    train: Mapping[str, Examples] = field(repr=False)
    """Examples of each client to train on, by the client's name."""
    test: Mapping[str, Examples] = field(repr=False)
    """Examples of each client that no training reads; empty without a test share."""
    example_input: Tensor = field(repr=False)
    """One input, without the batch dimension."""
    preprocess: Callable[[], nn.Module] | None = None
    """Builds the module that encodes inputs; it is exported with the model."""
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the outputs; empty for numbers."""
    targets: int = 1
    """Numbers in one target of a regression."""
    columns: tuple[str, ...] = ()
    """Names of an input's columns; empty where inputs have none."""
    notes: tuple[str, ...] = ()
    """How columns and targets were read and encoded, one sentence each."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names of the clients."""
        return tuple(self.train)

    @property
    def outputs(self) -> int:
        """Number of outputs that a model needs: classes, or numbers of a target."""
        return len(self.labels) or self.targets

    @property
    def features(self) -> int:
        """Number of numbers that a model receives for one example, after ``preprocess``."""
        with torch.inference_mode():
            module = self.preprocess() if self.preprocess else nn.Identity()
            found: Tensor = module(self.example_input[None])
        return found[0].numel()

    def task(self, name: str, model: Callable[[], nn.Module] | None = None, **fields: Any) -> Task:
        """Makes a task of these data.

        Args:
            name: Name of the task.
            model: Builds a model that takes what ``preprocess`` returns and gives ``outputs``
                numbers; when None, one hidden layer over all numbers of an input.
            fields: Other fields of `fedcore.Task`, which replace those given here. ``cloud_data``
                may be the name of a client, whose data the cloud may then use and which does not
                take part in the rounds.

        Raises:
            TaskError: a field is not valid.
        """
        cloud = fields.pop("cloud_data", None)
        if isinstance(cloud, str):
            if cloud not in self.train:
                raise TaskError(
                    f"task {name!r}: cloud_data is {cloud!r}, which is none of the "
                    f"{counted(len(self.train), 'client')}. Nothing was run; name one of them."
                )
            fields["cloud_data"] = lambda folder: self.train[cloud]
        elif cloud is not None:
            fields["cloud_data"] = cloud
        names = [one for one in self.train if one != cloud]
        empty = TensorDataset(*(tensor[:0] for tensor in _first(self.train)))
        values: dict[str, Any] = {
            "kind": self.kind,
            "model": model or self._default_model(),
            "clients": lambda folder: names,
            "client_data": lambda client, folder: self.train[client],
            "client_test": (lambda client, folder: self.test.get(client, empty))
            if self.test
            else None,
            "example_input": self.example_input,
            "preprocess": self.preprocess,
            "labels": self.labels,
        }
        return Task(name=name, **(values | fields))

    def _default_model(self) -> Callable[[], nn.Module]:
        features, outputs = self.features, self.outputs
        return lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, outputs)
        )


def _first(parts: Mapping[str, Examples]) -> tuple[Tensor, Tensor]:
    inputs, targets = next(iter(parts.values()))[0]
    return torch.as_tensor(inputs)[None], torch.as_tensor(targets)[None]


def split_by_client(
    parts: Mapping[str, Examples], *, test_share: float, seed: int
) -> tuple[dict[str, Examples], dict[str, Examples]]:
    """Splits each client's examples at random into those to train on and those to test on.

    Args:
        parts: Examples by client, at least one each.
        test_share: Share of each client's examples to test on; a client of one example has none.
        seed: Determines the split, together with the client's name.

    Returns:
        Examples to train on and to test on, by client; the latter without clients that have none.

    Raises:
        DataError: there are no clients, one of them has no examples, or the share is not from 0 to
            below 1.
    """
    if not 0 <= test_share < 1:
        raise DataError(f"test_share = {test_share}: expected from 0 to below 1. Nothing was read.")
    if not parts:
        raise DataError("data: got no clients, expected at least one. Nothing was read.")
    train, test = dict[str, Examples](), dict[str, Examples]()
    for name, examples in parts.items():
        if not size_of(examples):
            raise DataError(
                f"client {name!r}: it has no examples, expected at least 1. Nothing was read; "
                "leave this client out."
            )
        kept, held = split(examples, test_share, derive(seed, "test", name))
        train[name] = _whole(kept)
        if size_of(held):
            test[name] = _whole(held)
    return train, test


def _whole(examples: Examples) -> Examples:
    """Returns a part of a `TensorDataset` as one of its own, which reads faster."""
    if isinstance(examples, Subset) and isinstance(examples.dataset, TensorDataset):
        rows = torch.as_tensor(list(examples.indices), dtype=torch.long)
        tensors = (tensor[rows] for tensor in examples.dataset.tensors)
        return TensorDataset(*tensors)  # type: ignore[return-value]
    return examples
