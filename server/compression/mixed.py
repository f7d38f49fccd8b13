"""Static quantisation that leaves the layers in float32 that lose the most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.artifacts.parity import FloatArray
from fedcore.errors import CompressionError
from fedcore.observability.words import counted
from server.compression.quantise import Calibrated, int8_static
from server.compression.runtime import answer, open_session

Agreement = Callable[[FloatArray, FloatArray], float]


@dataclass(frozen=True)
class MixedModel:
    """A model of which some layers compute in 8 bits, and all other operators in float32."""

    onnx: bytes = field(repr=False)
    quantised: int
    """Number of layers in 8 bits."""
    of: int
    """Number of layers that could be quantised."""


def int8_mixed(
    calibrated: Calibrated,
    inputs: NDArray[Any],
    *,
    agreement: Agreement,
    least_agreement: float,
    reduce_range: bool,
    time_limit_s: float,
    progress: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> MixedModel:
    """Quantises as many layers as leave a model's outputs close enough to those of float32.

    Each layer is first quantised alone, and its error is that of the model's outputs. Then the
    layers with the largest errors stay in float32: none of them, one, two, four and so on, until
    the outputs agree, and then by bisection as few as that takes.

    Args:
        calibrated: The model with the ranges of its activations.
        inputs: Inputs ``(N, ...)`` on which outputs are compared, those of the calibration.
        agreement: Agreement of two models' outputs, at most 1.
        least_agreement: The agreement that is close enough.
        reduce_range: Limit weights to 7 bits.
        time_limit_s: Seconds that the search takes at most, but for its last step. Half of them
            measure layers; those that it does not reach count as the least sensitive.
        progress: Callback at each step, with a line of text for the user.
        clock: Seconds from any start.

    Guarantee:
        Where the time suffices, equal arguments give equal bytes.

    Raises:
        CompressionError: the outputs do not agree with even one layer quantised, or before the time
            is over.
    """
    layers, start = calibrated.layers, clock()
    if not layers:
        raise CompressionError("none of its layers can be quantised")
    expected = answer(open_session(calibrated.prepared, threads=1), inputs)

    def quantised(some: Sequence[str]) -> tuple[bytes, FloatArray]:
        raw = int8_static(calibrated, reduce_range=reduce_range, layers=some)
        return raw, answer(open_session(raw, threads=1), inputs)

    errors = dict.fromkeys(layers, 0.0)
    for place, layer in enumerate(layers, 1):
        if clock() - start > time_limit_s / 2:
            break
        progress(f"int8_mixed: measuring layer {place} of {len(layers)}")
        _, found = quantised([layer])
        errors[layer] = float(np.nan_to_num(np.square(found - expected).mean(), nan=np.inf))
    ranked = sorted(layers, key=lambda layer: -errors[layer])  # ties in the order of the model

    fails, holds, step = -1, len(layers) - 1, 0
    best: MixedModel | None = None
    while True:
        progress(f"int8_mixed: leaving {step} of {counted(len(layers), 'layer')} in float32")
        some = [layer for layer in layers if layer not in ranked[:step]]
        raw, found = quantised(some)
        if agreement(expected, found) >= least_agreement:
            best, holds = MixedModel(raw, len(some), len(layers)), step
        else:
            fails = step
        if clock() - start > time_limit_s or holds - fails < (1 if best is None else 2):
            break
        step = min(2 * step or 1, holds) if best is None else (fails + holds) // 2
    if best is None:
        raise _none_found(len(layers), clock() - start, time_limit_s)
    return best


def _none_found(layers: int, spent_s: float, time_limit_s: float) -> CompressionError:
    count = counted(layers, "layer")
    if spent_s > time_limit_s:
        return CompressionError(
            f"no choice of its {count} was found within compression.time_limit_s = "
            f"{time_limit_s:g} that keeps its answers"
        )
    return CompressionError(f"no choice of its {count} to quantise keeps its answers")
