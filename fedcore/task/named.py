"""Several inputs by name: examples ``({"image": x, "age": a}, target)`` and models that take them.

Between a task's data and its model, the inputs of an example are one vector of numbers, so that
everything that trains, protects and evaluates models takes them like any other input. A model, and
a preprocessing, receive the dictionary. Start with `NamedInputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from fedcore.errors import DataError, TaskError
from fedcore.task.reading import Examples

_EXACT_IN_FLOAT32 = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.float32)
_PARTS = (*_EXACT_IN_FLOAT32, torch.int32, torch.int64, torch.float64)


@dataclass(frozen=True)
class NamedInputs:
    """Names, shapes and dtypes of a task's inputs, in the order of its example."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, example: Mapping[Any, Any], *, task: str) -> NamedInputs:
        """Returns the form of an example, whose tensors have no batch dimension.

        Raises:
            TaskError: a name is no text, or a value is no tensor of real numbers.
        """
        for name, value in example.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                got = f"{name!r}: {type(value).__name__}"
            elif value.dtype not in _PARTS:
                got = f"{name!r}: {value.dtype}"
            else:
                continue
            raise TaskError(
                f"task {task!r}: example_input has {got}, expected tensors of floats, integers or "
                "bools by name. Nothing was run; correct the task file."
            )
        if not example:
            raise TaskError(f"task {task!r}: example_input names no inputs. Nothing was run.")
        values = tuple(example.values())
        return cls(tuple(example), tuple(v.shape for v in values), tuple(v.dtype for v in values))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vector: float32, or float64 where that would round large integers."""
        exact = all(dtype in _EXACT_IN_FLOAT32 for dtype in self.dtypes)
        return torch.float32 if exact else torch.float64

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each input."""
        return tuple(prod(shape) for shape in self.shapes)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Returns a batch ``(B, N)`` of vectors from a batch of each input ``(B, ...)``."""
        parts = [values[name].reshape(len(values[name]), -1) for name in self.names]
        return torch.cat([part.to(self.dtype) for part in parts], dim=1)

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Returns a batch of each input ``(B, ...)`` from vectors ``(B, N)``."""
        parts = torch.split(packed, list(self.sizes), dim=1)
        return {
            name: part.reshape(-1, *shape).to(dtype)
            for name, part, shape, dtype in zip(
                self.names, parts, self.shapes, self.dtypes, strict=True
            )
        }

    def vector(self, values: Any) -> Tensor:
        """Returns the vector of one example.

        Raises:
            DataError: the inputs differ from the example's in names, shapes or meaning.
        """
        if not isinstance(values, Mapping) or set(values) != set(self.names):
            named = isinstance(values, Mapping)
            got = ", ".join(map(repr, values)) if named else f"a {type(values).__name__}"
            raise DataError(f"its inputs are {got}, expected {', '.join(map(repr, self.names))}")
        forms = zip(self.names, self.shapes, self.dtypes, strict=True)
        return self.pack(
            {name: _fitting(name, values[name], shape, dtype) for name, shape, dtype in forms}
        )[0]

    @property
    def floats(self) -> Tensor:
        """Which numbers of the vector belong to inputs of floats: bool, shape ``(N,)``."""
        parts = zip(self.dtypes, self.sizes, strict=True)
        return torch.cat([torch.full((size,), dtype.is_floating_point) for dtype, size in parts])

    def place(self, number: int) -> str:
        """Returns the name of the input that a number of the vector belongs to, and its place."""
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            if number < size:
                at = tuple(int(n) for n in torch.unravel_index(torch.tensor(number), shape or (1,)))
                return f"input {name!r}{f' at {at}' if shape else ''}"
            number -= size
        raise IndexError(number)


def _fitting(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns one input as a batch of one, in the wanted dtype."""
    try:
        found = default_collate([value])
    except (RuntimeError, TypeError, ValueError):
        found = None
    if not isinstance(found, Tensor):
        raise DataError(f"its input {name!r} is {type(value).__name__}, expected a tensor")
    if found.shape[1:] != shape:
        raise DataError(
            f"its input {name!r} is {tuple(found.shape[1:])}, expected {tuple(shape)} as in "
            "example_input"
        )
    if found.dtype == dtype:
        return found
    made = found.to(dtype)
    floats = found.is_floating_point(), dtype.is_floating_point
    if floats == (True, False) or (not floats[0] and bool((made.to(found.dtype) != found).any())):
        raise DataError(
            f"its input {name!r} is {found.dtype}, and {dtype}, the dtype in example_input, could "
            "change what it means"
        )
    return made


class NamedExamples(Dataset[tuple[Tensor, Tensor]]):
    """A data set of named inputs whose examples are vectors."""

    def __init__(self, dataset: Dataset[Any], inputs: NamedInputs) -> None:
        self.dataset, self._inputs = dataset, inputs

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(cast(Sized, self.dataset))

    def __getitem__(self, row: int) -> Any:
        """Returns an example with its inputs as one vector; any other row stays as it is."""
        found: Any = self.dataset[row]
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        if not is_pair or isinstance(found[0], Tensor):
            return found
        return self._inputs.vector(found[0]), found[1]


@dataclass(frozen=True)
class NamedLoader:
    """A task's loader, for examples as vectors."""

    load: Callable[..., Any]
    inputs: NamedInputs

    def __call__(self, *arguments: Any) -> Examples:
        """Returns the data set that the loader returns; one of vectors stays as it is."""
        found = self.load(*arguments)
        whole = found
        while isinstance(whole, Subset):
            whole = whole.dataset
        if isinstance(whole, TensorDataset | NamedExamples) or not hasattr(found, "__getitem__"):
            return cast(Examples, found)
        return NamedExamples(found, self.inputs)


@dataclass(frozen=True)
class NamedModel:
    """A task's model builder, for models that take the inputs by name."""

    build: Callable[[], nn.Module]
    inputs: NamedInputs
    preprocess: Callable[[], nn.Module] | None
    example: Tensor
    """One example as a vector."""

    def __call__(self) -> nn.Module:
        """Returns the model, which takes what `NamedPreprocess` gives.

        The names of its weights stay those of the task's own model.
        """
        between: NamedInputs | None = self.inputs
        if self.preprocess is not None:
            before = self.preprocess()
            assert isinstance(before, NamedPreprocess)
            between = before.outputs
        model = self.build()
        if between is not None:
            model.register_forward_pre_hook(partial(_by_name, between))
        return model


def _by_name(inputs: NamedInputs, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs.unpack(arguments[0]),)


@dataclass(frozen=True)
class NamedBefore:
    """A task's preprocessing builder, for preprocessing that takes the inputs by name."""

    build: Callable[[], nn.Module]
    inputs: NamedInputs
    example: Tensor
    task: str

    def __call__(self) -> nn.Module:
        """Returns the preprocessing of vectors."""
        return NamedPreprocess(self.build(), self.inputs, self.example, task=self.task)


class NamedPreprocess(nn.Module):
    """A preprocessing of named inputs; if it gives a dictionary again, that becomes a vector."""

    def __init__(
        self, inner: nn.Module, inputs: NamedInputs, example: Tensor, *, task: str
    ) -> None:
        super().__init__()
        self.inner = inner
        self._inputs = inputs
        with torch.no_grad():
            found = inner.eval()(inputs.unpack(torch.stack([example] * 2)))
        self.outputs: NamedInputs | None = None
        if isinstance(found, Mapping):
            first = {name: value[0] for name, value in found.items()}
            self.outputs = NamedInputs.of(first, task=task)

    def forward(self, packed: Tensor) -> Tensor:
        """Maps vectors ``(B, N)`` to vectors, or to the one tensor that the model takes."""
        found = self.inner(self._inputs.unpack(packed))
        return found if self.outputs is None else self.outputs.pack(found)


def load_with(load: Callable[..., Any] | None, inputs: NamedInputs) -> Callable[..., Any] | None:
    """Returns a loader for examples as vectors; None for None."""
    if load is None or isinstance(load, NamedLoader):
        return load
    return NamedLoader(load, inputs)
