"""Checks a client's reply against its request before any other code uses it.

All data from clients passes this one trust boundary. `check_structure` ensures that a reply's parts
can be named, hashed and stored; `read_reply` that it has the requested parts and no others, each
number within its range. Both are total: they return a value or raise `InvalidUpdate` for every
input, read no array as a whole, and allocate no memory of a size that a peer declares.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedcore.errors import InvalidUpdate, ResourceError
from fedcore.observability.foreign import foreign
from fedcore.task.statistics import SumLimits
from fedcore.updates.distance import measure
from fedcore.updates.evaluation import UNDEFINED, check_sums, undefined_in
from fedcore.updates.messages import (
    ARRAYS,
    ENVELOPE,
    HEADER_BYTES,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    Update,
    vector_header,
)
from fedcore.updates.pack import Vector
from fedcore.updates.pieces import PIECE_BYTES, pieces, size_of

LARGEST = 1e18
"""Largest magnitude of a reported number: weighted sums of such numbers cannot overflow."""
MAX_EXAMPLES = 2**31 - 1
MAX_RECORDS = 8
MAX_ENTRIES = 256
"""Most entries of one record."""
MAX_NAME = 128
"""Most characters of a name, a type or a storage format."""
MAX_DIMENSIONS = 32
MAX_SETTING_BYTES = 4096
"""Most bytes of a setting in a record, such as the signature."""
_SHOWN = 80  # most characters of a peer's text that an error quotes
_MAX_HEADER_BYTES = 2**14
_NOT_USED = "It was not used"


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``, both included."""

    low: float = -LARGEST
    high: float = LARGEST


@dataclass(frozen=True)
class ArraySpec:
    """The expected type and shape of an array."""

    dtype: str
    """NumPy's name of the type, such as ``float32``."""
    shape: tuple[int, ...]
    whole: int = 0
    """How many elements, the last ones, are integers; they do not count in a distance."""


@dataclass(frozen=True)
class ReplySpec:
    """The permitted content of a reply, in addition to its signature and number of examples."""

    purpose: str
    """The message's type."""
    metrics: Mapping[str, Range] = field(default_factory=dict)
    arrays: Mapping[str, ArraySpec] = field(default_factory=dict)
    """Arrays by name; each is required."""
    sums: Mapping[str, SumLimits] = field(default_factory=dict)
    """Limits of the sums that metrics are computed from, by metric; each arrives as an array."""
    every_metric: bool = False
    """Whether each metric and each of ``sums`` is required unless the client gives the reason why
    it is undefined on its data; otherwise metrics are optional."""

    @property
    def optional(self) -> frozenset[str]:
        """The names that a client may call undefined."""
        return frozenset({*self.metrics, *self.sums} if self.every_metric else ())

    def forms(self, undefined: Collection[str]) -> dict[str, ArraySpec]:
        """Returns the required arrays, without sums that are undefined."""
        known = {name: each for name, each in self.sums.items() if name not in undefined}
        sums = {name: ArraySpec("float64", each.low.shape) for name, each in known.items()}
        return {**self.arrays, **sums}


@dataclass(frozen=True)
class Reply:
    """A checked reply; its arrays stay in the memory or file where they arrived."""

    num_examples: int
    metrics: Mapping[str, float]
    arrays: Mapping[str, Array] = field(default_factory=dict)
    distance: float | None = None
    """L2 distance of its weights to the sent weights; None if no base was given."""
    peaks: Sequence[float] | None = None
    """The largest magnitude in each of `parts`; None if unknown."""
    undefined: Mapping[str, str] = field(default_factory=dict)
    """Reasons by metric, for metrics that are undefined on the client's data."""

    def parts(self, name: str = MODEL) -> Iterator[Vector]:
        """Yields the weights in order, in parts that fit the processor's cache."""
        return _parts(self.arrays[name])

    def values(self, name: str) -> NDArray[Any]:
        """Returns an array, in memory."""
        array = self.arrays[name]
        dtype, shape, start = _form_of(array, where="reply")
        values = np.frombuffer(array.data, dtype, offset=start)
        return values if len(shape) == 1 else values.reshape(shape)  # keeps a vector sendable

    def update(self) -> Update:
        """Returns the update with its weights in memory."""
        return Update(self.values(MODEL), self.num_examples, self.metrics)


def check_structure(content: RecordDict, *, where: str) -> None:
    """Checks that a reply's parts can be named, hashed and stored, and are not too many.

    Raises:
        InvalidUpdate: too many records or entries; a name that is too long or not printable; a
            value of a type that no reply contains.
    """
    with _one_refusal(where):
        if len(content) > MAX_RECORDS:
            raise InvalidUpdate(
                f"{where}: it holds {len(content)} records, expected at most {MAX_RECORDS}. "
                f"{_NOT_USED}."
            )
        for name, record in content.items():
            _check_name(name, "a record", where)
            if len(record) > MAX_ENTRIES:
                raise InvalidUpdate(
                    f"{where}: record {name!r} has {len(record)} entries, expected at most "
                    f"{MAX_ENTRIES}. {_NOT_USED}."
                )
            for key, value in record.items():
                _check_name(key, f"an entry of {name!r}", where)
                _check_entry(value, f"{name}.{key}", where)


def read_reply(reply: Message, spec: ReplySpec, *, where: str, base: Vector | None = None) -> Reply:
    """Checks a reply and returns its content.

    Args:
        reply: The message. Its signature, if it has one, was verified before.
        spec: The permitted content.
        where: The sender, for errors.
        base: The sent weights, shape ``(D,)``; if given, the distance to them is measured.

    Raises:
        InvalidUpdate: the message type is wrong; records, metrics or arrays are unrequested or
            missing; a number is out of its range; a weight is not finite.
        ResourceError: this machine's disk cannot read its bytes.
    """
    with _one_refusal(where):
        content = reply.content
        check_structure(content, where=where)
        undefined = undefined_in(content.get(UNDEFINED), spec.optional, where=where)
        forms = spec.forms(undefined)
        kind = reply.metadata.message_type
        if kind != spec.purpose:
            raise InvalidUpdate(
                f"{where}: it replies to {_shown(kind)}, expected one to {spec.purpose!r}. "
                f"{_NOT_USED}; a client must reply to the request that it received."
            )
        expected = {METRICS}
        expected |= ({ARRAYS} if forms else set()) | ({UNDEFINED} if undefined else set())
        _check_names([one for one in content if one != ENVELOPE], expected, "record", where)
        count, metrics = _metrics(content.get(METRICS), spec, undefined, where)
        arrays: dict[str, Array] = {}
        distance, peaks = None, None
        if forms:
            arrays = _arrays(content.get(ARRAYS), forms, where)
            for name, array in arrays.items():
                measured = base if name == MODEL else None
                floats = prod(array.shape) - forms[name].whole
                found = measure(_parts(array), measured, floats=floats, where=where)
                distance, peaks = found if name == MODEL else (distance, peaks)
        read = Reply(count, metrics, arrays, distance, peaks, undefined)
        for name, limits in spec.sums.items():
            if name not in undefined:
                check_sums(read.values(name), limits, count, name=name, where=where)
        return read


@contextmanager
def _one_refusal(where: str) -> Iterator[None]:
    """Turns every exception while a reply is read into `InvalidUpdate` or `ResourceError`."""
    try:
        yield
    except (InvalidUpdate, ResourceError):
        raise
    except OSError as error:
        raise ResourceError(
            f"{where}: cannot read its bytes from this machine's disk "
            f"({error.strerror or error}). Updates accepted before are kept; repair the disk and "
            "continue with --resume."
        ) from error
    except Exception as error:  # malicious values fail in many ways
        raise InvalidUpdate(
            f"{where}: cannot read it ({type(error).__name__}). {_NOT_USED}."
        ) from None


def _shown(text: object) -> str:
    """Returns a peer's text, quoted and shortened for an error."""
    return f"'{foreign(text if isinstance(text, str) else type(text).__name__, _SHOWN)}'"


def _check_name(name: object, what: str, where: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise InvalidUpdate(
            f"{where}: the name of {what} is {_shown(name)}, expected 1 to {MAX_NAME} printable "
            f"characters. {_NOT_USED}."
        )


def _check_entry(value: object, name: str, where: str) -> None:
    if isinstance(value, Array):
        for text in (value.dtype, value.stype):
            _check_name(text, f"a type in {name!r}", where)
        shape = value.shape
        if len(shape) > MAX_DIMENSIONS or not all(
            type(size) is int and 0 <= size < 2**63 for size in shape
        ):
            raise InvalidUpdate(f"{where}: {name!r} is not a valid array shape. {_NOT_USED}.")
    elif isinstance(value, bytes):
        if len(value) > MAX_SETTING_BYTES:
            raise InvalidUpdate(
                f"{where}: {name!r} has {len(value)} bytes, expected at most {MAX_SETTING_BYTES}. "
                f"{_NOT_USED}."
            )
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidUpdate(
            f"{where}: {name!r} is a {type(value).__name__}, expected a number. {_NOT_USED}."
        )


def _check_names(found: Collection[str], expected: set[str], what: str, where: str) -> None:
    for name in sorted(expected - set(found)):
        raise InvalidUpdate(f"{where}: it contains no {what} {name!r}. {_NOT_USED}.")
    for name in found:
        if name not in expected:
            raise InvalidUpdate(
                f"{where}: it contains {what} {_shown(name)}, which was not requested. "
                f"{_NOT_USED}; client and server must run the same version and task."
            )


def _metrics(
    record: object, spec: ReplySpec, undefined: Collection[str], where: str
) -> tuple[int, dict[str, float]]:
    if not isinstance(record, MetricRecord):
        raise InvalidUpdate(f"{where}: {METRICS!r} is not a record of metrics. {_NOT_USED}.")
    told = dict(record)
    count = told.pop(NUM_EXAMPLES, None)
    if count is None:
        raise InvalidUpdate(
            f"{where}: it contains no record {METRICS!r} with {NUM_EXAMPLES!r}. {_NOT_USED}."
        )
    if type(count) is not int or not 0 < count <= MAX_EXAMPLES:
        raise InvalidUpdate(
            f"{where}: num-examples = {count!r}, expected a whole number from 1 to {MAX_EXAMPLES}. "
            f"{_NOT_USED}."
        )
    possible = set(spec.metrics).difference(undefined)
    _check_names(told, possible if spec.every_metric else set(told), "metric", where)
    _check_names(possible.union(told), possible, "metric", where)
    values: dict[str, float] = {}
    for name, value in told.items():
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number):
            raise InvalidUpdate(
                f"{where}: a metric is not finite ({name} = {number}). {_NOT_USED}."
            )
        allowed = spec.metrics[name]
        if not allowed.low <= number <= allowed.high:
            raise InvalidUpdate(
                f"{where}: {name} = {number:.6g}, expected {allowed.low:g} to {allowed.high:g}. "
                f"{_NOT_USED}."
            )
        values[name] = number
    return count, values


def _arrays(record: object, spec: Mapping[str, ArraySpec], where: str) -> dict[str, Array]:
    if not isinstance(record, ArrayRecord):
        raise InvalidUpdate(f"{where}: {ARRAYS!r} is not a record of arrays. {_NOT_USED}.")
    _check_names(record, set(spec), "array", where)
    for name, form in spec.items():
        array = record[name]
        dtype, shape, _ = _form_of(array, where=where)
        if dtype != np.dtype(form.dtype) or shape != form.shape:
            raise InvalidUpdate(
                f"{where}: got {dtype} {_short(shape)}, expected {form.dtype} {form.shape}. "
                f"{_NOT_USED}; client and server must run the same task."
            )
        said = (array.dtype, tuple(array.shape), array.stype)
        if said != (form.dtype, form.shape, "numpy.ndarray"):
            raise InvalidUpdate(
                f"{where}: array {name!r} is declared as {_shown(array.dtype)} "
                f"{_short(tuple(array.shape))}, but contains {form.dtype} {form.shape}. "
                f"{_NOT_USED}."
            )
    return {name: record[name] for name in spec}


def _short(shape: tuple[int, ...]) -> str:
    return foreign(shape, _SHOWN)


def _form_of(array: Array, *, where: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Returns dtype, shape and offset of an array's values; reads only its first piece."""
    size = size_of(array)
    usual, rest = divmod(size - HEADER_BYTES, 4)
    head = bytes(next(pieces(array), b"")[:_MAX_HEADER_BYTES])
    if not rest and usual >= 1 and head[:HEADER_BYTES] == vector_header(usual):
        return np.dtype(np.float32), (usual,), HEADER_BYTES
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(stream)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise ValueError("it contains objects, or is in Fortran order")
        start = stream.tell()
        if size - start != prod(shape) * dtype.itemsize:
            raise ValueError(f"it has {size} bytes, which does not match its header")
    except Exception as error:  # NumPy's parser fails in many ways on malicious bytes
        said = foreign(error, _SHOWN)
        raise InvalidUpdate(
            f"{where}: cannot read an array ({type(error).__name__}: {said}). {_NOT_USED}."
        ) from None
    return dtype, tuple(shape), start


def _parts(array: Array) -> Iterator[NDArray[Any]]:
    """Yields all values of a checked array in order, one piece at a time."""
    dtype, _, start = _form_of(array, where="reply")
    step = PIECE_BYTES // dtype.itemsize * dtype.itemsize
    assert step == PIECE_BYTES  # true of every dtype that is requested
    yield from (np.frombuffer(piece, dtype) for piece in pieces(array, start))
