"""The records of a message: what the server sends with a round, and what a client answers.

Replies carry weights under the names that Flower's strategies and mods expect, so that every one of
those works unchanged.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedcore.config.client_settings import (
    PROXIMAL_MU,
    RUN_SETTINGS,
    ClientSettings,
    read_settings,
)
from fedcore.errors import (
    BudgetExhausted,
    FedcoreError,
    InvalidUpdate,
    OwnersBudgetExhausted,
    RoundFailed,
)
from fedcore.observability.foreign import foreign
from fedcore.updates.pack import Layout, Vector

ARRAYS, CONFIG, METRICS, MODEL = "arrays", "config", "metrics", "model"
NUM_EXAMPLES, TRAIN_LOSS, EPSILON = "num-examples", "train_loss", "epsilon"
CLIP_NORM, UNCLIPPED = "clip-norm", "unclipped"

STATISTICS = "query.statistics"
"""Message type that asks for sums over a client's inputs."""
DECLINED, DECLINED_BY_OWNER = 1001, 1002
"""Error codes of a reply from a client whose budget is spent: the run's, or its owner's."""
DECLINES = frozenset({DECLINED, DECLINED_BY_OWNER})
MOST_ROUNDS = 10_000_000
"""Numbers of rounds end here; a run has a million at most, and may be resumed."""
REFUSED = 1100
"""Error code of a reply from a client that could not do what was asked; the exit code of the kind
of error is added where it is known."""
_KINDS: dict[int, type[FedcoreError]] = {
    kind.exit_code: kind for kind in FedcoreError.__subclasses__()
}


def code_of(kind: type[FedcoreError]) -> int:
    """The code of a reply from a client that met an error of this kind."""
    if issubclass(kind, OwnersBudgetExhausted):
        return DECLINED_BY_OWNER
    return DECLINED if issubclass(kind, BudgetExhausted) else REFUSED + kind.exit_code


def refused_as(code: int) -> type[FedcoreError]:
    """The kind of error that a reply's code stands for."""
    return _KINDS.get(code - REFUSED, RoundFailed)


@dataclass(frozen=True)
class Instruction:
    """What a server asks for: train or evaluate from these weights."""

    round: int
    weights: Vector
    layout: str
    """Digest of the layout that the weights were packed with."""
    preprocess: bytes
    """State of the preprocessing, as safetensors; empty when it has none."""
    proximal_mu: float
    """Weight of FedProx's penalty; 0 without."""
    clip_norm: float = 0.0
    """What client-level privacy bounds the update by; 0 without."""
    settings: ClientSettings = RUN_SETTINGS
    """What else is other than the run says; unchecked, see `settings_with`."""


@dataclass(frozen=True)
class Update:
    """What a client answers after training."""

    weights: Vector
    num_examples: int
    metrics: Mapping[str, float]


def weights_record(weights: Vector) -> ArrayRecord:
    """Weights as the one array of a record: copied, unless they are `sendable`."""
    return ArrayRecord({MODEL: Array("float32", weights.shape, "numpy.ndarray", _sent(weights))})


def sendable(weights: Vector) -> Vector:
    """The same values, read-only, in the memory that messages take them from.

    Who keeps these, and sends them, holds one copy instead of two.
    """
    return np.frombuffer(_sent(weights), np.float32, offset=HEADER_BYTES)


def joined(parts: Iterable[Vector], size: int) -> Vector:
    """A vector of ``size`` elements that comes by parts, as `sendable` gives it; held once."""
    stream = io.BytesIO()
    stream.write(vector_header(size))
    for part in parts:
        stream.write(np.ascontiguousarray(part, np.float32).view(np.uint8).data)
    return np.frombuffer(stream.getvalue(), np.float32, offset=HEADER_BYTES)


def _sent(weights: Vector) -> bytes:
    """Weights as they travel; without a copy where they lie in such bytes."""
    base: object = weights.base
    if isinstance(base, bytes) and weights.flags.c_contiguous:
        known = _float_vector(base)
        if known is not None and known.size == weights.size and _place(known) == _place(weights):
            return base
    raw = np.ascontiguousarray(weights, np.float32).view(np.uint8)
    return b"".join((vector_header(len(weights)), raw.data))


def _place(values: Vector) -> int:
    place: int = values.__array_interface__["data"][0]
    return place


def instruction_config(
    layout: Layout, preprocess: bytes, *, clip_norm: float = 0.0
) -> ConfigRecord:
    """What accompanies the weights to every client; Flower's strategies add the round."""
    config = ConfigRecord({"layout": layout.digest, "preprocess": preprocess})
    if clip_norm:
        config[CLIP_NORM] = clip_norm
    return config


def read_instruction(content: RecordDict) -> Instruction:
    """What a message's content asks for.

    Raises:
        InvalidUpdate: records are missing; the message is not from a fedcore server.
    """
    try:
        config = content.config_records[CONFIG]
        number = int(str(config["server-round"]))
        if not 0 <= number <= MOST_ROUNDS:
            raise ValueError(f"round {str(number)[:20]}")
        weights = array_of(content.array_records[ARRAYS][MODEL], where="instruction")
        if weights.dtype != np.float32 or weights.ndim != 1:
            raise ValueError(f"its weights are {weights.dtype} {weights.shape}, not float32 (D,)")
        return Instruction(
            round=number,
            weights=weights,
            layout=_setting(config, "layout", str),
            preprocess=_setting(config, "preprocess", bytes),
            proximal_mu=float(str(config.get(PROXIMAL_MU, 0.0))),
            clip_norm=float(str(config.get(CLIP_NORM, 0.0))),
            settings=read_settings(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidUpdate(
            "instruction: the message lacks what a fedcore server sends "
            f"({foreign(repr(error), 200)}). Nothing was trained; server and client must run the "
            "same version."
        ) from None


_Setting = TypeVar("_Setting", str, bytes)


def _setting(config: ConfigRecord, name: str, kind: type[_Setting]) -> _Setting:
    """A setting of the type that it should have: ``bytes`` of a number would allocate so many."""
    value = config[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name!r} is a {type(value).__name__}")
    return value


def update_content(update: Update) -> RecordDict:
    """An update as the content of a reply."""
    metrics: dict[str, int | float] = {NUM_EXAMPLES: update.num_examples, **update.metrics}
    return RecordDict(
        {ARRAYS: weights_record(update.weights), METRICS: MetricRecord(dict(metrics))}
    )


def array_of(array: Array, *, where: str) -> NDArray[Any]:
    """The values in an array that was sent, which may hold any bytes.

    Raises:
        InvalidUpdate: they are not those of a NumPy array.
    """
    data = array.data
    vector = _float_vector(data)
    if vector is not None:
        return vector
    try:
        stream = io.BytesIO(data)
        _check_declared(stream)
        # Not `array.numpy()`, which takes archives for arrays, too. Pickled objects are refused.
        values: NDArray[Any] = np.lib.format.read_array(stream)
    except Exception as error:  # NumPy's parser fails in many ways on bytes that were made up
        raise InvalidUpdate(
            f"{where}: an array cannot be read ({type(error).__name__}: {foreign(error, 200)}). "
            "It was not used."
        ) from None
    return values


def _check_declared(stream: io.BytesIO) -> None:
    """Refuses a header that declares another size than what follows: NumPy allocates that first."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, _, dtype = read_header(stream)
    declared = math.prod(shape) * dtype.itemsize
    left = len(stream.getbuffer()) - stream.tell()
    if min(shape, default=0) < 0 or declared != left:
        raise ValueError(f"its header declares {str(declared)[:20]} bytes, and {left} follow")
    stream.seek(0)


def _float_vector(data: bytes) -> Vector | None:
    """The usual case, a float32 vector, without parsing its header; None for all else."""
    size, rest = divmod(len(data) - HEADER_BYTES, 4)
    if rest or size < 1 or data[:HEADER_BYTES] != vector_header(size):
        return None
    return np.frombuffer(data, np.float32, offset=HEADER_BYTES)


HEADER_BYTES = 128  # NumPy pads a header to 64; that of a vector of any size has two of those


@lru_cache(maxsize=16)
def vector_header(size: int) -> bytes:
    """What NumPy writes before a float32 vector of ``size`` elements: `HEADER_BYTES` bytes."""
    stream = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def check_weights(weights: Vector, layout: Layout, *, where: str) -> Vector:
    """Weights that a model of this layout can take.

    Raises:
        InvalidUpdate: wrong shape or dtype, or a value that is not finite.
    """
    _check_form(weights.shape, weights.dtype, layout, where=where)
    _check_finite(float(weights.sum(dtype=np.float64)), where=where)
    return weights


def _check_form(
    shape: tuple[int, ...], dtype: np.dtype[Any], layout: Layout, *, where: str
) -> None:
    if shape != (layout.size,) or dtype != np.float32:
        raise InvalidUpdate(
            f"{where}: got {dtype} {shape}, expected float32 ({layout.size},). It was not used."
        )


def _check_finite(total: float, *, where: str) -> None:
    """In float64 no sum of finite float32 values overflows, and one that is not finite stays so."""
    if not np.isfinite(total):
        raise InvalidUpdate(
            f"{where}: it holds values that are not finite. It was not used; a lower "
            "client.learning_rate usually mends this."
        )
