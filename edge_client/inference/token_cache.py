"""What a model has computed of a sequence of tokens, and the logits of the tokens that follow.

Only for decode graphs whose work is known and was tried within limits;
`edge_client.inference.decoder` decides. All buffers are bound once: a token moves its own number
in and its logits out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from edge_client.inference.direct import run_failed
from edge_client.inference.responses import Interface, TensorInfo
from fedcore.artifacts.decode import CACHE, MAX_CACHE_BYTES, NEXT, POSITIONS, STATE
from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError

_TYPES = frozenset({"float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool"})
"""Types that caches may have."""


@dataclass(frozen=True)
class DecodeForm:
    """What a decode graph takes and gives (see `fedcore.artifacts.decode`)."""

    tokens: TensorInfo
    logits: TensorInfo
    caches: tuple[TensorInfo, ...]
    window: int
    """Most tokens of a sequence."""

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches of one sequence."""
        return sum(np.dtype(each.dtype).itemsize * math.prod(each.shape) for each in self.caches)

    def new_caches(self) -> list[AnyArray]:
        """Returns the caches of no tokens."""
        return [np.zeros(each.shape, each.dtype) for each in self.caches]


def decode_form(interface: Interface, *, window: int, dtype: str, of: str) -> DecodeForm:
    """Checks what a decode graph says that it takes and gives, before anything is allocated.

    Args:
        interface: The graph's inputs and outputs, from anybody.
        window: Tokens that the model takes.
        dtype: The type of its tokens.
        of: The model, for errors.

    Raises:
        DeviceError: it is no decode graph of this model, or its caches are too large.
    """
    inputs, outputs = interface.inputs, interface.outputs
    caches = inputs[2:]
    wanted = tuple(TensorInfo(each.name + NEXT, each.dtype, each.shape) for each in caches)
    logits = outputs[0]
    fits = (
        len(inputs) > 2
        and inputs[0].dtype == dtype
        and inputs[0].shape == (1, -1)
        and inputs[1] == TensorInfo(POSITIONS, "int64", (-1,))
        and all(each.name.startswith((CACHE, STATE)) for each in caches)
        and all(each.dtype in _TYPES for each in caches)
        and all(size > 0 for each in caches for size in each.shape)
        and outputs[1:] == wanted
        and logits.dtype == "float32"
        and len(logits.shape) == 3
        and logits.shape[:2] == (1, -1)
        and logits.shape[2] > 0
    )
    if not fits:
        raise DeviceError(f"{of}: its decode graph has other inputs and outputs than expected.")
    form = DecodeForm(inputs[0], logits, caches, window)
    if form.cache_bytes > MAX_CACHE_BYTES:
        raise DeviceError(
            f"{of}: its caches take {form.cache_bytes} bytes, more than the {MAX_CACHE_BYTES} of "
            "one sequence."
        )
    return form


def chunks(count: int, window: int) -> list[int]:
    """Splits a number of tokens into powers of two, largest first: 7 are run as 4, 2 and 1.

    So a graph runs in few shapes, each of which can be tried beforehand.
    """
    found = []
    while count:
        found.append(1 << (min(count, window).bit_length() - 1))
        count -= found[-1]
    return found


class TokenCache:
    """The caches of one sequence of tokens. Not thread-safe."""

    def __init__(self, session: Any, form: DecodeForm, of: str) -> None:
        """Allocates the caches, of no tokens yet.

        Args:
            session: An onnxruntime session of a decode graph.
            form: What it takes and gives.
            of: The model, for errors.
        """
        self._session, self._form, self._of = session, form, of
        self._caches = form.new_caches()
        # A state is read and written by one operator, so its next value has memory of its own.
        self._states = [
            (cache, np.zeros_like(cache))
            for each, cache in zip(form.caches, self._caches, strict=True)
            if each.name.startswith(STATE)
        ]
        self._steps: dict[int, Callable[[Sequence[int]], FloatArray]] = {}
        self.length = 0
        """Tokens in the cache."""

    def clear(self) -> None:
        """Forgets all tokens."""
        self.length = 0
        for cache in self._caches:
            cache.fill(0)

    def append(self, tokens: Sequence[int]) -> FloatArray:
        """Adds tokens to the sequence, and returns the logits ``(V,)`` of the one that follows.

        Args:
            tokens: At least one, and at most as many as the window has places left.

        Raises:
            DataError: a token is no number of the model's type.
            DeviceError: onnxruntime fails, for example because the model does not know a token.
        """
        start, logits = 0, None
        for size in chunks(len(tokens), self._form.window):
            logits = self.run(tokens[start : start + size])
            start += size
        assert logits is not None
        found: FloatArray = logits[-1].copy()
        return found

    def run(self, tokens: Sequence[int]) -> FloatArray:
        """Adds tokens in one run; returns the logits ``(S, V)`` of all, which the next run changes.

        Raises:
            DataError, DeviceError: see `append`.
        """
        step = self._steps.get(len(tokens))
        if step is None:
            try:
                step = self._steps[len(tokens)] = self._bound(len(tokens))
            except RuntimeError as error:  # a name or type that the graph does not have
                raise run_failed(self._of, error) from error
        logits = step(tokens)
        for cache, after in self._states:
            cache[...] = after
        self.length += len(tokens)
        return logits

    def _bound(self, size: int) -> Callable[[Sequence[int]], FloatArray]:
        """Returns a function that runs so many tokens, through buffers bound beforehand."""
        form, session = self._form, self._session
        given = np.zeros((1, size), form.tokens.dtype)
        places, steps = np.zeros(size, np.int64), np.arange(size)
        logits = np.zeros((1, size, form.logits.shape[2]), np.float32)
        after = {id(cache): buffer for cache, buffer in self._states}
        binding = session.io_binding()
        for name, array in ((form.tokens.name, given), (POSITIONS, places)):
            _bind(binding.bind_input, name, array)
        _bind(binding.bind_output, form.logits.name, logits)
        for each, cache in zip(form.caches, self._caches, strict=True):
            _bind(binding.bind_input, each.name, cache)
            _bind(binding.bind_output, each.name + NEXT, after.get(id(cache), cache))
        run = session._sess.run_with_iobinding  # the public method looks at WebGPU's state first
        options = onnxruntime.RunOptions()

        def step(tokens: Sequence[int]) -> FloatArray:
            try:
                given[0] = tokens
            except (OverflowError, ValueError) as error:
                raise DataError(
                    f"{self._of}: its tokens are of type {given.dtype}: {error}. No further token "
                    "was generated."
                ) from None
            np.add(steps, self.length, out=places)
            try:
                run(binding._iobinding, options)
            except Exception as error:  # onnxruntime's errors have no common base class
                raise run_failed(self._of, error) from error
            found: FloatArray = logits[0]
            return found

        return step


def _bind(bind: Callable[..., None], name: str, array: AnyArray) -> None:
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
