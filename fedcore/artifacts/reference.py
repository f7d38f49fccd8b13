"""What inputs and outputs of a model were like at its release: features, each counted in bins.

A `Reference` travels in the golden file of a release, whose digest is signed, and devices count
what they serve in its bins. Each row falls into exactly one bin of each feature, so that one row
changes one count of each feature by one. Does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedcore.artifacts.presentation import Presentation
from fedcore.errors import TrustError
from fedcore.observability.faults import first_fault

Measure = Literal["value", "mean", "deviation", "least", "largest", "zeros", "token", "class"]
"""What is taken of a row: one of its numbers, a summary of all (``zeros`` is their share), one
token at a random place, or the class that it decides (at a random place, where there are many)."""
Values = NDArray[np.float64]
Counts = NDArray[np.int64]

MAX_FEATURES = 72
"""Most features of a reference: counts of all must fit a device's report."""
MAX_INPUT_FEATURES = 64
"""Most features of inputs. An input with more numbers than are left is summarised."""
MAX_BINS = 32
"""Most bins of a feature, with the one for missing values."""
MAX_REFERENCE_BYTES = 1 << 16
QUANTILES = 10
"""Bins that equal shares of a continuous feature's values fall into."""
_MAX_OUTPUTS = 8
"""Most outputs that are each a feature of their own; of more, a row's summary is."""
_SUMMARY: dict[Measure, Callable[[Values], Values]] = {
    "mean": lambda rows: rows.mean(1),
    "deviation": lambda rows: rows.std(1),
    "least": lambda rows: rows.min(1),
    "largest": lambda rows: rows.max(1),
    "zeros": lambda rows: (rows == 0).mean(1),
}
_TOKENS = (np.dtype(np.int32), np.dtype(np.int64))
_TOGETHER = 1024  # rows that are compared with all edges at once


class Feature(BaseModel):
    """A number that each row has: of an input, or of the model's output."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    side: Literal["input", "output"]
    tensor: Annotated[str, Field(max_length=64)] = ""
    """Name of the input; empty for the only one, and for the output."""
    measure: Measure
    place: Annotated[int, Field(ge=0)] = 0
    """Position of a ``value`` among the row's numbers, in row-major order."""

    @property
    def label(self) -> str:
        """A short name, such as ``input[3]``, ``age[0]`` or ``output class``."""
        name = self.tensor or self.side
        return f"{name}[{self.place}]" if self.measure == "value" else f"{name} {self.measure}"


class BinnedFeature(Feature):
    """A feature with its bins, and how many rows were in each at the release."""

    edges: Annotated[tuple[float, ...], Field(max_length=MAX_BINS - 2)]
    """Where the next bin begins, ascending."""
    counts: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], Field(min_length=2)]
    """Rows in each bin; the last one is that of missing values (NaN)."""

    @model_validator(mode="after")
    def _has_a_count_for_each_bin(self) -> BinnedFeature:
        if any(one >= other for one, other in pairwise(self.edges)):
            raise ValueError("edges that do not ascend")
        if len(self.counts) != len(self.edges) + 2 or not sum(self.counts):
            raise ValueError(f"{len(self.counts)} counts for {len(self.edges)} edges, or all zero")
        return self


class Reference(BaseModel):
    """The distribution of inputs and outputs at a release."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    presentation: Presentation
    """How outputs decide a class."""
    features: Annotated[tuple[BinnedFeature, ...], Field(min_length=1, max_length=MAX_FEATURES)]
    """Those of inputs first."""

    @model_validator(mode="after")
    def _has_inputs_first(self) -> Reference:
        sides = [each.side for each in self.features]
        if sides != sorted(sides):
            raise ValueError("a feature of the output before one of an input")
        return self


def reference_bytes(reference: Reference) -> bytes:
    """Returns a reference as JSON."""
    return reference.model_dump_json(exclude_defaults=True).encode()


def parse_reference(raw: bytes) -> Reference:
    """Parses the bytes of a reference.

    Raises:
        TrustError: they are none of this format.
    """
    if len(raw) > MAX_REFERENCE_BYTES:
        fault = f"{len(raw)} bytes, expected at most {MAX_REFERENCE_BYTES}"
    else:
        try:
            return Reference.model_validate_json(raw)
        except ValidationError as error:
            fault = first_fault(error)
    raise TrustError(
        f"golden: the reference of inputs and outputs is not valid: {fault}. The release was not "
        "installed; the previous version keeps serving."
    )


def features_of(
    inputs: Iterable[tuple[str, Sequence[int], DTypeLike]],
    output_shape: Sequence[int],
    presentation: Presentation,
) -> tuple[Feature, ...]:
    """Returns the features of a model: each number of small inputs, and summaries of others.

    Args:
        inputs: Name, shape without the batch dimension, and type of each input; an empty name for
            the only one.
        output_shape: Shape of one row's output.
        presentation: How outputs decide a class.
    """
    found: list[Feature] = []
    for name, shape, dtype in inputs:
        size, left = math.prod(shape), MAX_INPUT_FEATURES - len(found)
        if 1 <= size <= left:
            found += _each("input", name, size)
        elif size and np.dtype(dtype) in _TOKENS and left:
            found.append(Feature(side="input", tensor=name, measure="token"))
        elif size and left >= len(_SUMMARY):
            found += [Feature(side="input", tensor=name, measure=each) for each in _SUMMARY]
    size = math.prod(output_shape)
    if presentation in ("label", "binary", "tokens", "dense") and size:
        found.append(Feature(side="output", measure="class"))
    elif 1 <= size <= _MAX_OUTPUTS:
        found += _each("output", "", size)
    elif size:
        found += [Feature(side="output", measure=each) for each in _SUMMARY]
    return tuple(found)


def _each(side: Literal["input", "output"], name: str, size: int) -> list[Feature]:
    return [Feature(side=side, tensor=name, measure="value", place=n) for n in range(size)]


def measured(
    features: Sequence[Feature],
    tensors: Mapping[str, NDArray[Any]],
    presentation: Presentation,
    rng: np.random.Generator,
) -> Values:
    """Returns the features of a batch of rows, shape ``(B, len(features))``.

    Args:
        features: All of one side.
        tensors: The inputs ``(B, ...)`` by name, or the output under any name.
        presentation: How outputs decide a class.
        rng: Draws the places of tokens and classes, where a row has many.
    """
    rows = len(next(iter(tensors.values())))
    found = np.empty((rows, len(features)))
    for name, group in groupby(range(len(features)), lambda n: features[n].tensor):
        columns = list(group)
        array = tensors[name] if name else next(iter(tensors.values()))
        of = [features[n] for n in columns]
        found[:, columns] = _of_tensor(of, array, presentation, rng)
    return found


def _of_tensor(
    features: Sequence[Feature],
    array: NDArray[Any],
    presentation: Presentation,
    rng: np.random.Generator,
) -> NDArray[Any]:
    flat = array.reshape(len(array), -1)
    if features[0].measure == "value":
        return flat[:, [each.place for each in features]]
    if features[0].measure == "token":
        return flat[np.arange(len(flat)), rng.integers(flat.shape[1], size=len(flat))][:, None]
    if features[0].measure == "class":
        return _classes(array, presentation, rng)[:, None]
    with np.errstate(all="ignore"):  # what overflows counts as missing, or as the largest
        wide = flat.astype(np.float64)
        return np.stack([_SUMMARY[each.measure](wide) for each in features], axis=1)


def _classes(
    outputs: NDArray[Any], presentation: Presentation, rng: np.random.Generator
) -> NDArray[Any]:
    if presentation == "binary":
        return outputs.reshape(len(outputs), -1)[:, 0] > 0
    if presentation == "label":
        return np.asarray(outputs.argmax(axis=-1))
    # One place of each row: neighbouring places decide alike, and would count as so many rows.
    rows = np.arange(len(outputs))
    if presentation == "tokens":
        return np.asarray(outputs[rows, rng.integers(outputs.shape[1], size=len(rows))].argmax(1))
    maps = outputs.reshape(*outputs.shape[:2], -1)
    return np.asarray(maps[rows, :, rng.integers(maps.shape[2], size=len(rows))].argmax(1))


def edges_for(values: Values) -> tuple[float, ...]:
    """Returns the edges of bins for a feature, from its values ``(N,)`` at a release.

    A value that a tenth of all rows or more have gets a bin of its own. The others are divided at
    quantiles, rounded to about a thousandth of the spread.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ()
    distinct, number = np.unique(finite, return_counts=True)
    common = [float(one) for one in distinct[number * QUANTILES >= finite.size]]
    rest = finite[~np.isin(finite, common)]
    low, high = np.quantile(finite, [0.01, 0.99])
    spread = (
        float(high - low) or float(distinct[-1] - distinct[0]) or abs(float(distinct[0])) or 1.0
    )
    edges = set(_around(common, rest, spread / 1000))
    parts = round(QUANTILES * rest.size / finite.size)
    if parts > 1:
        decimals = 3 - math.floor(math.log10(spread))
        cuts = np.quantile(rest, np.arange(1, parts) / parts)
        edges |= {float(cut) for cut in np.round(cuts, decimals) if np.isfinite(cut)}
    return tuple(sorted(edges))


def _around(common: Sequence[float], rest: Values, margin: float) -> Iterator[float]:
    """Yields edges that give each common value a bin of its own."""
    if not common:
        return
    yield common[0] - margin
    for one, other in pairwise(common):
        if ((rest > one) & (rest < other)).any():
            yield from (one + margin, other - margin)
        else:
            yield (one + other) / 2
    yield common[-1] + margin


def binned(values: Values, edges: Sequence[Sequence[float]]) -> Counts:
    """Returns how many rows are in each bin, shape ``(len(edges), W)``, padded with zeros.

    Args:
        values: From `measured`.
        edges: Edges of each feature's bins.
    """
    last = np.array([len(each) + 1 for each in edges], np.int64)
    width = int(last.max(initial=1)) + 1
    limits = np.full((len(edges), width), np.inf)
    for row, each in zip(limits, edges, strict=True):
        row[: len(each)] = each
    starts = np.arange(len(edges)) * width
    found = np.zeros(len(edges) * width, np.int64)
    for start in range(0, len(values), _TOGETHER):
        part = values[start : start + _TOGETHER]
        bins = np.minimum((part[:, :, None] >= limits).sum(axis=2), last - 1)
        bins = np.where(np.isnan(part), last, bins)
        found += np.bincount((bins + starts).ravel(), minlength=len(found))
    return found.reshape(len(edges), width)


def ragged(counts: Counts, edges: Sequence[Sequence[float]]) -> tuple[tuple[int, ...], ...]:
    """Returns the counts of each feature without padding."""
    return tuple(
        tuple(int(one) for one in row[: len(each) + 2])
        for row, each in zip(counts, edges, strict=True)
    )
