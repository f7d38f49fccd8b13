"""Runs a model in this process, with as little around onnxruntime as can be.

Only for models whose work is known and was measured within limits; `edge_client.inference.engine`
decides. Buffers are bound once: a call copies one input in and one output out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from fedcore.artifacts.golden import AnyArray
from fedcore.errors import DeviceError
from fedcore.observability.foreign import foreign

_MOST_BY_PRODUCT = 4096
"""Most numbers that are checked by a product with zeros; BLAS splits longer ones over threads."""
RowCall = Callable[[Any], "AnyArray | None"]


def bound_call(session: Any, of: str, example: AnyArray, output: AnyArray) -> RowCall:
    """Returns a function that answers one input, through buffers bound beforehand. Thread-safe.

    The function takes anything, and returns the output in memory of its own. For what is not an
    array of the example's exact type and shape, or has a number that is not finite, it runs nothing
    and returns None: such input takes a slower way, which converts it or says what is wrong. It
    raises `DeviceError` if onnxruntime fails.

    Args:
        session: A session of one input and one output.
        of: The model, for errors.
        example: An input, shape ``input_shape``, without the batch dimension.
        output: The output for ``example``, without the batch dimension. The outputs of all inputs
            must have its shape and type.
    """
    input_name = session.get_inputs()[0].name
    output_name = session.get_outputs()[0].name
    run = session._sess.run_with_iobinding  # the public method looks at WebGPU's state first
    shape, dtype = example.shape, example.dtype
    array_type = np.ndarray
    by_product = dtype in (np.float32, np.float64) and example.size <= _MOST_BY_PRODUCT
    any_number = dtype.kind != "f"
    zeros = np.zeros(example.size, dtype)

    def new_slot() -> tuple[Any, ...]:
        taken, given = np.zeros(shape, dtype), np.zeros(output.shape, output.dtype)
        binding = session.io_binding()
        binding.bind_input(input_name, "cpu", 0, dtype.type, (1, *shape), taken.ctypes.data)
        binding.bind_output(
            output_name, "cpu", 0, output.dtype.type, (1, *output.shape), given.ctypes.data
        )
        flat, check = taken.reshape(-1), np.zeros((), dtype)
        # Options of its own: without any, onnxruntime would make new ones for each call.
        options = onnxruntime.RunOptions()
        return binding._iobinding, options, taken, flat, check, given, binding

    free: list[tuple[Any, ...]] = [new_slot()]  # pop and append are atomic

    def call(x: Any) -> AnyArray | None:
        if type(x) is not array_type or x.dtype is not dtype or x.shape != shape:
            return None
        try:
            slot = free.pop()
        except IndexError:  # as many as calls at a time
            slot = new_slot()
        binding, options, taken, flat, check, given, _ = slot
        taken[...] = x
        # A product with zeros is NaN if a number is not finite: 5 times as fast as isfinite.
        if flat.dot(zeros, check) if by_product else not (any_number or np.isfinite(flat).all()):
            free.append(slot)
            return None
        try:
            run(binding, options)
        except Exception as error:  # onnxruntime's errors have no common base class
            raise run_failed(of, error) from error
        found: AnyArray = given.copy()
        free.append(slot)
        return found

    return call


def run_failed(of: str, error: Exception) -> DeviceError:
    """Returns the error for a run that onnxruntime ended."""
    return DeviceError(f"{of}: onnxruntime failed: {foreign(error)}. Nothing was answered.")
