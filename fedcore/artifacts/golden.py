"""Golden inputs and outputs: a released model must reproduce these on every device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.artifacts.parity import FloatArray
from fedcore.errors import TrustError

AnyArray = NDArray[Any]
MAX_GOLDEN_BYTES = 64 << 20  # 64 MiB


def golden_bytes(inputs: AnyArray, outputs: FloatArray) -> bytes:
    """Returns golden inputs ``(N, ...)`` and outputs ``(N, ...)`` as safetensors."""
    return save({"inputs": np.ascontiguousarray(inputs), "outputs": np.ascontiguousarray(outputs)})


def parse_golden(
    raw: bytes,
) -> tuple[AnyArray, FloatArray]:
    """Parses the delivered bytes of golden inputs and outputs.

    Raises:
        TrustError: the bytes are not safetensors with both tensors.
    """
    try:
        tensors = load(raw)
        return tensors["inputs"], tensors["outputs"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrustError(
            f"golden: expected safetensors with `inputs` and `outputs`: {error}. The release was "
            "not installed; the previous version keeps serving."
        ) from None
