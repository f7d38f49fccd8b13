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
from fedcore.finite import all_finite, largest_magnitude
from fedcore.observability.foreign import foreign
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
from fedcore.updates.pack import LARGEST_WHOLE, Vector
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
_CHUNK = 1 << 16  # elements: float64 temporaries stay in the cache
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
    every_metric: bool = False
    """Whether each metric is required; otherwise metrics are optional."""


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
        kind = reply.metadata.message_type
        if kind != spec.purpose:
            raise InvalidUpdate(
                f"{where}: it replies to {_shown(kind)}, expected one to {spec.purpose!r}. "
                f"{_NOT_USED}; a client must reply to the request that it received."
            )
        expected = {METRICS, ARRAYS} if spec.arrays else {METRICS}
        _check_names([one for one in content if one != ENVELOPE], expected, "record", where)
        count, metrics = _metrics(content.get(METRICS), spec, where)
        arrays: dict[str, Array] = {}
        distance, peaks = None, None
        if spec.arrays:
            arrays = _arrays(content.get(ARRAYS), spec.arrays, where)
            for name, array in arrays.items():
                measured = base if name == MODEL else None
                found = _measure(array, measured, spec.arrays[name].whole, where)
                distance, peaks = found if name == MODEL else (distance, peaks)
        return Reply(count, metrics, arrays, distance, peaks)


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


def _metrics(record: object, spec: ReplySpec, where: str) -> tuple[int, dict[str, float]]:
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
    _check_names(told, set(spec.metrics if spec.every_metric else told), "metric", where)
    _check_names({**spec.metrics, **told}, set(spec.metrics), "metric", where)
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


class _Squared:
    """Computes squared distances of short vectors in buffers that are allocated once.

    If each call allocated memory, the kernel would map and zero it each time, which takes longer
    than the arithmetic.
    """

    def __init__(self) -> None:
        self._gap = np.empty(_CHUNK, np.float32)
        self._wide = np.empty(_CHUNK, np.float64)

    def distance(self, one: Vector, other: Vector) -> float:
        """Returns the squared L2 distance of two float32 vectors of at most `_CHUNK` elements.

        Differences are rounded to float32; their squares and sums are float64. The result does not
        depend on any library's number of threads; it is not finite if a value is not.
        """
        gap, wide = self._gap[: len(one)], self._wide[: len(one)]
        np.subtract(one, other, out=gap)
        np.copyto(wide, gap)
        np.square(wide, out=wide)
        found = float(wide.sum())
        if math.isinf(found):  # the difference of two numbers may overflow float32
            np.subtract(one, other, out=wide, dtype=np.float64)
            np.square(wide, out=wide)
            found = float(wide.sum())
        return found


def _measure(
    array: Array, base: Vector | None, whole: int, where: str
) -> tuple[float | None, Sequence[float]]:
    """Checks that all values are finite, and the last ``whole`` possible integers, in one pass.

    Returns the others' L2 distance to ``base``, if given, and each part's largest magnitude.
    """
    sums: list[float] = []
    peaks: list[float] = []
    place, floats = 0, prod(array.shape) - whole
    squared = _Squared()
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite values raise below
        for part in _parts(array):
            peaks.append(largest_magnitude(part))
            first = max(0, floats - place)
            _check_integers(part[first:], where)
            for start in range(0, min(first, len(part)) if base is not None else 0, _CHUNK):
                piece = part[start : min(start + _CHUNK, first)]
                sent = base[place + start : place + start + len(piece)]  # type: ignore[index]
                sums.append(squared.distance(piece, sent))
            place += len(part)
    # In float64 no sum of squares of finite float32 values overflows.
    if not all_finite(peaks):
        raise InvalidUpdate(
            f"{where}: it holds values that are not finite. {_NOT_USED}; a lower "
            "client.learning_rate usually fixes this."
        )
    return (math.sqrt(math.fsum(sums)) if base is not None else None), peaks


def _check_integers(values: Vector, where: str) -> None:
    if len(values) and largest_magnitude(values) > LARGEST_WHOLE:
        raise InvalidUpdate(
            f"{where}: an integer of its state is above 2**24, which no model sends. {_NOT_USED}."
        )
