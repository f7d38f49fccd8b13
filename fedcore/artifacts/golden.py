"""Golden inputs and outputs: a released model must reproduce these on every device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.artifacts.parity import FloatArray
from fedcore.artifacts.reference import Reference, parse_reference, reference_bytes
from fedcore.errors import TrustError

AnyArray = NDArray[Any]
MAX_GOLDEN_BYTES = 64 << 20  # 64 MiB


@dataclass(frozen=True)
class Golden:
    """Inputs, and the outputs that a model must give for them, each run by itself."""

    inputs: AnyArray = field(repr=False)
    """Shape ``(N, ...)``."""
    outputs: FloatArray = field(repr=False)
    """Shape ``(N, ...)``; ``(N, K)`` with ``places``."""
    places: NDArray[np.int64] | None = field(default=None, repr=False)
    """The places ``(K,)`` of the stored numbers among the flattened outputs of an input; None if
    all are stored. Large outputs, of a large vocabulary for example, are stored in part."""
    reference: Reference | None = field(default=None, repr=False)
    """What inputs and outputs were like in the cloud's data; None without enough of them."""

    def stored_part(self, outputs: FloatArray) -> FloatArray | None:
        """Returns the part of a model's outputs ``(N, ...)`` that `outputs` has numbers for.

        None if the outputs are of another shape than those that were stored.
        """
        if self.places is None:
            return outputs if outputs.shape == self.outputs.shape else None
        flat = outputs.reshape(len(outputs), -1)
        if len(flat) != len(self.outputs) or self.places.max(initial=0) >= flat.shape[1]:
            return None
        return np.ascontiguousarray(flat[:, self.places])


def golden_bytes(
    inputs: AnyArray,
    outputs: FloatArray,
    places: NDArray[np.int64] | None = None,
    reference: Reference | None = None,
) -> bytes:
    """Returns golden inputs and outputs as safetensors; see `Golden` for their shapes.

    A reference is JSON in a tensor of its own, which earlier versions of fedcore do not read.
    """
    tensors = {"inputs": inputs, "outputs": outputs}
    if places is not None:
        tensors["places"] = places
    if reference is not None:
        tensors["reference"] = np.frombuffer(reference_bytes(reference), np.uint8)
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def parse_golden(raw: bytes) -> Golden:
    """Parses the delivered bytes of golden inputs and outputs.

    Raises:
        TrustError: the bytes are not safetensors with both tensors, or places don't fit the
            outputs, or the reference is not valid.
    """
    try:
        tensors = load(raw)
        told = tensors.get("reference")
        reference = None if told is None else parse_reference(told.tobytes())
        golden = Golden(tensors["inputs"], tensors["outputs"], tensors.get("places"), reference)
        _check_places(golden)
    except (SafetensorError, KeyError, ValueError) as error:
        raise TrustError(
            f"golden: expected safetensors with `inputs` and `outputs`: {error}. The release was "
            "not installed; the previous version keeps serving."
        ) from None
    return golden


def _check_places(golden: Golden) -> None:
    places, outputs = golden.places, golden.outputs
    if places is None:
        return
    valid = places.ndim == 1 and places.dtype == np.int64 and bool((places >= 0).all())
    if not valid or outputs.ndim != 2 or outputs.shape[1] != len(places):
        raise ValueError(
            f"`places` of type {places.dtype} and shape {places.shape} for outputs of shape "
            f"{outputs.shape}"
        )
