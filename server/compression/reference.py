"""The reference of a release: what inputs and outputs are like in the cloud's data, in bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedcore.artifacts.parity import FloatArray
from fedcore.artifacts.presentation import Presentation
from fedcore.artifacts.reference import (
    MAX_REFERENCE_BYTES,
    BinnedFeature,
    Feature,
    Reference,
    Values,
    binned,
    edges_for,
    features_of,
    measured,
    ragged,
    reference_bytes,
)
from fedcore.seeds import numpy_rng
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.named import NamedInputs
from fedcore.training.batches import in_order

MIN_ROWS = 100
"""Rows of the cloud's data below which there is no reference: quantiles of fewer say little, and
too much about each."""
MAX_ROWS = 20_000
"""Rows that a reference is made from; of more, a random share is."""
_BATCH_SIZE = 512
_MAX_CLASSES = 30
"""Most classes that have a bin each; of more, only frequent ones do."""


def reference_of(
    task: Task, inputs: Examples, outputs: FloatArray | None, *, seed: int
) -> Reference | None:
    """Returns the reference of a model, from data of the cloud alone.

    Args:
        task: The model's task.
        inputs: Examples of the cloud.
        outputs: The released file's outputs for held-out examples of the cloud.
        seed: The run's seed; draws rows and places.

    Returns:
        The reference; None if there are fewer than 100 examples, or nothing to compare.
    """
    if size_of(inputs) < MIN_ROWS:
        return None
    if outputs is not None and len(outputs) < MIN_ROWS:
        outputs = None
    rng, presentation = numpy_rng(seed, "reference"), task.problem.presentation
    features = features_of(
        _forms(task),
        () if outputs is None else outputs.shape[1:],
        presentation,
    )
    of_inputs = [each for each in features if each.side == "input"]
    values = _input_values(task, inputs, of_inputs, presentation, rng) if of_inputs else None
    found = [] if values is None else binned_features(of_inputs, values, None)
    of_outputs = [each for each in features if each.side == "output"]
    if outputs is not None and of_outputs:
        values = measured(of_outputs, {"": outputs}, presentation, rng)
        found += binned_features(of_outputs, values, _classes(outputs, presentation))
    if not found:
        return None
    reference = Reference(presentation=presentation, features=tuple(found))
    return reference if len(reference_bytes(reference)) <= MAX_REFERENCE_BYTES else None


def _forms(task: Task) -> list[tuple[str, Sequence[int], str]]:
    """Returns name, shape and type of each input."""
    named = task.named_inputs
    if named is None:
        one = task.example_input
        return [("", tuple(one.shape), _numpy_name(one.dtype))]
    forms = zip(named.names, named.shapes, named.dtypes, strict=True)
    return [(name, tuple(shape), _numpy_name(dtype)) for name, shape, dtype in forms]


def _numpy_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _input_values(
    task: Task,
    examples: Examples,
    features: Sequence[Feature],
    presentation: Presentation,
    rng: np.random.Generator,
) -> Values:
    share, found = MAX_ROWS / size_of(examples), []
    for batch, _ in in_order(examples, _BATCH_SIZE):
        if share < 1:
            batch = batch[rng.random(len(batch)) < share]
        if len(batch):
            found.append(measured(features, _by_name(batch, task.named_inputs), presentation, rng))
    return np.concatenate(found)


def _by_name(batch: Tensor, named: NamedInputs | None) -> Mapping[str, NDArray[np.generic]]:
    """Returns a batch as devices receive it."""
    if named is None:
        return {"": batch.numpy()}
    return {name: tensor.numpy() for name, tensor in named.unpack(batch).items()}


def _classes(outputs: FloatArray, presentation: Presentation) -> int | None:
    """Returns how many classes outputs decide between; None if they decide none, or too many."""
    if presentation == "binary":
        return 2
    if presentation not in ("label", "tokens", "dense"):
        return None
    count = int(outputs.shape[1 if presentation == "dense" else -1])
    return count if count <= _MAX_CLASSES else None


def binned_features(
    features: Sequence[Feature], values: Values, classes: int | None
) -> list[BinnedFeature]:
    """Returns features with bins for their values, a bin for each class where there are some."""
    of_classes = tuple(n - 0.5 for n in range(1, classes or 0))
    edges = [
        of_classes if classes and one.measure == "class" else edges_for(values[:, column])
        for column, one in enumerate(features)
    ]
    counts = ragged(binned(values, edges), edges)
    return [
        BinnedFeature(**one.model_dump(), edges=each, counts=rows)
        for one, each, rows in zip(features, edges, counts, strict=True)
    ]
