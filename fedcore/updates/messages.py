"""The records in messages: a server's instruction for a round, and a client's reply.

Replies carry weights under the names that Flower's strategies and mods expect, so all of them
work unchanged.
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
from fedcore.huge_pages import use_huge_pages
from fedcore.observability.foreign import foreign
from fedcore.updates.pack import Layout, Vector

ARRAYS, CONFIG, METRICS, MODEL = "arrays", "config", "metrics", "model"
ENVELOPE = "envelope"
"""Name of the record with a reply's signature, and of the signature in it."""
NUM_EXAMPLES, TRAIN_LOSS, EPSILON = "num-examples", "train_loss", "epsilon"
FROZEN, FROZEN_SHA256 = "frozen", "frozen-sha256"
"""Name of the record with a model's frozen parameters and of its only array, and their digest."""
CLIP_NORM, UNCLIPPED = "clip-norm", "unclipped"

STATISTICS = "query.statistics"
"""Message type that requests sums over a client's inputs."""
DECLINED, DECLINED_BY_OWNER = 1001, 1002
"""Error codes of a reply from a client whose budget is spent: the run's, or its owner's."""
DECLINES = frozenset({DECLINED, DECLINED_BY_OWNER})
MAX_ROUNDS = 10_000_000
"""Largest round number accepted; a run has at most a million rounds, and may be resumed."""
REFUSED = 1100
"""Base of the error code in a reply from a client that failed. The exit code of the kind of error
is added to it, if known."""
_KINDS: dict[int, type[FedcoreError]] = {
    kind.exit_code: kind for kind in FedcoreError.__subclasses__()
}


def code_of(kind: type[FedcoreError]) -> int:
    """Returns the error code for the reply of a client that raised this kind of error."""
    if issubclass(kind, OwnersBudgetExhausted):
        return DECLINED_BY_OWNER
    return DECLINED if issubclass(kind, BudgetExhausted) else REFUSED + kind.exit_code


def error_kind(code: int) -> type[FedcoreError]:
    """Returns the kind of error for a reply's error code."""
    return _KINDS.get(code - REFUSED, RoundFailed)


@dataclass(frozen=True)
class Instruction:
    """A server's instruction: train or evaluate from these weights."""

    round: int
    weights: Vector
    layout: str
    """Digest of the layout that the weights were packed with."""
    preprocess: bytes
    """State of the preprocessing, as safetensors; empty if there is none."""
    proximal_mu: float
    """Weight of FedProx's penalty; 0 disables it."""
    clip_norm: float = 0.0
    """L2 bound of the update for client-level privacy; 0 for no bound."""
    frozen_sha256: str = ""
    """Digest of the model's frozen parameters; empty if there are none."""
    frozen: Array | None = None
    """The frozen parameters as safetensors, for a client that has others; unchecked."""
    settings: ClientSettings = RUN_SETTINGS
    """Other settings that differ from the run's, unchecked; `settings_with` checks them."""


@dataclass(frozen=True)
class Update:
    """A client's answer after training."""

    weights: Vector
    num_examples: int
    metrics: Mapping[str, float]


def weights_record(weights: Vector) -> ArrayRecord:
    """Returns a record with the weights as its only array: copied, unless `sendable` made them."""
    return ArrayRecord({MODEL: Array("float32", weights.shape, "numpy.ndarray", _sent(weights))})


def sendable(weights: Vector) -> Vector:
    """Returns the weights, read-only, in memory that a message can use without a copy.

    A caller that keeps the weights and sends them has one copy in memory instead of two.
    """
    return np.frombuffer(_sent(weights), np.float32, offset=HEADER_BYTES)


def joined(parts: Iterable[Vector], size: int) -> Vector:
    """Joins parts into a vector of ``size`` elements that can be sent without another copy."""
    stream = io.BytesIO(bytes(HEADER_BYTES + 4 * size))  # no memory until it is written
    with stream.getbuffer() as whole:
        use_huge_pages(whole)
        whole[:HEADER_BYTES] = vector_header(size)
        place = HEADER_BYTES
        for part in parts:
            raw = np.ascontiguousarray(part, np.float32).view(np.uint8).data
            whole[place : place + len(raw)] = raw
            place += len(raw)
        assert place == len(whole), "parts of a vector of another length"
    return np.frombuffer(stream.getvalue(), np.float32, offset=HEADER_BYTES)


def _sent(weights: Vector) -> bytes:
    """Returns the bytes that represent weights in a message; copies only if necessary."""
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
    layout: Layout, preprocess: bytes, *, clip_norm: float = 0.0, frozen_sha256: str = ""
) -> ConfigRecord:
    """Returns the configuration sent with the weights to every client; Flower adds the round."""
    config = ConfigRecord({"layout": layout.digest, "preprocess": preprocess})
    if frozen_sha256:
        config[FROZEN_SHA256] = frozen_sha256
    if clip_norm:
        config[CLIP_NORM] = clip_norm
    return config


def read_instruction(content: RecordDict) -> Instruction:
    """Parses a message's content into an instruction.

    Raises:
        InvalidUpdate: records are missing or malformed; the message is not from a fedcore server.
    """
    try:
        config = content.config_records[CONFIG]
        number = int(str(config["server-round"]))
        if not 0 <= number <= MAX_ROUNDS:
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
            frozen_sha256=_setting(config, FROZEN_SHA256, str) if FROZEN_SHA256 in config else "",
            frozen=content.array_records[FROZEN][FROZEN] if FROZEN in content else None,
            settings=read_settings(config),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidUpdate(
            "instruction: not a valid message of a fedcore server "
            f"({foreign(repr(error), 200)}). Nothing was trained; server and client must run the "
            "same version."
        ) from None


_Setting = TypeVar("_Setting", str, bytes)


def _setting(config: ConfigRecord, name: str, kind: type[_Setting]) -> _Setting:
    """Returns a setting after a type check: ``bytes(number)`` would allocate that many bytes."""
    value = config[name]
    if not isinstance(value, kind):
        raise TypeError(f"{name!r} is a {type(value).__name__}")
    return value


def update_content(update: Update) -> RecordDict:
    """Returns the content of the reply that carries an update."""
    metrics: dict[str, int | float] = {NUM_EXAMPLES: update.num_examples, **update.metrics}
    return RecordDict(
        {ARRAYS: weights_record(update.weights), METRICS: MetricRecord(dict(metrics))}
    )


def array_of(array: Array, *, where: str) -> NDArray[Any]:
    """Returns the values in a received array, whose bytes are untrusted.

    Raises:
        InvalidUpdate: the bytes are not a NumPy array.
    """
    data = array.data
    vector = _float_vector(data)
    if vector is not None:
        return vector
    try:
        stream = io.BytesIO(data)
        _check_declared(stream)
        # Not `array.numpy()`, which also opens NumPy archives. Pickled objects are refused.
        values: NDArray[Any] = np.lib.format.read_array(stream)
    except Exception as error:  # NumPy's parser fails in many ways on malicious bytes
        raise InvalidUpdate(
            f"{where}: cannot read an array ({type(error).__name__}: {foreign(error, 200)}). It "
            "was not used."
        ) from None
    return values


def _check_declared(stream: io.BytesIO) -> None:
    """Raises if the header declares another size than the data: NumPy allocates the declared."""
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(stream)]
    shape, _, dtype = read_header(stream)
    declared = math.prod(shape) * dtype.itemsize
    left = len(stream.getbuffer()) - stream.tell()
    if min(shape, default=0) < 0 or declared != left:
        raise ValueError(f"its header declares {str(declared)[:20]} bytes, but {left} follow")
    stream.seek(0)


def _float_vector(data: bytes) -> Vector | None:
    """Returns a float32 vector without parsing its header, the usual case; None for others."""
    size, rest = divmod(len(data) - HEADER_BYTES, 4)
    if rest or size < 1 or data[:HEADER_BYTES] != vector_header(size):
        return None
    return np.frombuffer(data, np.float32, offset=HEADER_BYTES)


HEADER_BYTES = 128  # NumPy pads headers to multiples of 64; a vector's header needs two


@lru_cache(maxsize=16)
def vector_header(size: int) -> bytes:
    """Returns NumPy's `HEADER_BYTES`-byte header of a float32 vector of ``size`` elements."""
    stream = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": (size,)}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


def check_weights(weights: Vector, layout: Layout, *, where: str) -> Vector:
    """Returns weights after checking that a model of this layout can load them.

    Raises:
            InvalidUpdate: shape or dtype is wrong, or a value is not finite.
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
    """Raises if a float64 sum of float32 values is not finite: finite values cannot overflow it."""
    if not np.isfinite(total):
        raise InvalidUpdate(
            f"{where}: it holds values that are not finite. It was not used; a lower "
            "client.learning_rate usually fixes this."
        )
