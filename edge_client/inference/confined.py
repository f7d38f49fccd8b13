"""Runs an untrusted model in a child process with limits on time and memory.

An ONNX file is a program: it may loop forever, use all memory, or crash onnxruntime. Here that
affects only a child process without locks, keys or open files, which dies with its parent. Start
with `predict`; `edge_client.inference.confined_child` is the child's side.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from fedcore.artifacts.golden import AnyArray
from fedcore.artifacts.manifest import Manifest
from fedcore.artifacts.parity import FloatArray
from fedcore.errors import DataError, DeviceError, LimitExceeded, ResourceError
from fedcore.observability.foreign import foreign

MIN_SECONDS, MAX_SECONDS = 1.0, 86_400.0
MIN_MEMORY_BYTES, MAX_MEMORY_BYTES = 256 << 20, 1 << 40
_BASE_BYTES = 1 << 30
"""Default address space for Python and onnxruntime (150 MB) and for activations."""
_THREAD_BYTES = 160 << 20
"""Default address space per thread: its stack, and its arena of the allocator."""
_COPIES = 6
"""Copies of the weights while onnxruntime loads a file, optimizes it and packs it for the CPU."""
_MAX_OUTPUT_BYTES = 256 << 20
MAX_RUNS = 10_000_000
"""Most inferences that one call may time."""
_MAX_HEAD_BYTES = 4096
_PROCESSOR_MARGIN_S = 10
"""CPU time beyond the time limit. The CPU limit ends the child if the parent is suspended, and so
cannot enforce the time limit itself."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge_client.inference.confined_child import main; main()"
)
_KEPT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")
_SET = {
    "OMP_NUM_THREADS": "1",  # onnxruntime has threads of its own
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # telemetry would open a database and connections at load time
}


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """Time and memory that one call may use to run a model."""

    seconds: float = 120.0
    """Wall-clock time from start to last output, `MIN_SECONDS` to `MAX_SECONDS`."""
    memory_bytes: int | None = None
    """Address space, `MIN_MEMORY_BYTES` to `MAX_MEMORY_BYTES`. None: 1 GiB, plus 160 MiB per
    thread, six times the model's file and four times the inputs."""

    def __post_init__(self) -> None:
        if not MIN_SECONDS <= self.seconds <= MAX_SECONDS:
            raise ValueError(
                f"seconds: expected {MIN_SECONDS} to {MAX_SECONDS}, got {self.seconds}"
            )
        most = self.memory_bytes
        if most is not None and not MIN_MEMORY_BYTES <= most <= MAX_MEMORY_BYTES:
            raise ValueError(
                f"memory_bytes: expected {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}, got {most}"
            )


def predict(
    manifest: Manifest,
    onnx: Path,
    inputs: AnyArray,
    *,
    threads: int,
    limits: ModelLimits,
) -> FloatArray:
    """Computes a model's outputs in a child process, each input as a batch of its own.

    Guarantee:
        The outputs of an input depend on no other input, whatever the model. The call returns or
        raises within little more than ``limits.seconds``. The child has ended by then; it also ends
        when this process does, for whatever reason.

    Args:
        manifest: The model's manifest.
        onnx: The model's file; run only if it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``, dtype ``manifest.input_dtype``, B >= 1.
        threads: Threads of one inference.
        limits: Time and memory for the child.

    Returns:
        Outputs ``(B, ...)``.

    Raises:
        DataError: the inputs have another shape or type.
        LimitExceeded: the model exceeded its limits, or its outputs are too large.
        DeviceError: onnxruntime cannot run the model, or failed; or the file has changed.
        ResourceError: no process could be started.
    """
    return _run_child(manifest, onnx, inputs, None, threads=threads, limits=limits, how={})


def time_runs(
    manifest: Manifest, onnx: Path, inputs: AnyArray, *, runs: int, limits: ModelLimits
) -> FloatArray:
    """Times single inferences on one thread in a child process, by the child's clock.

    Guarantee:
        The call returns or raises within little more than ``limits.seconds``. The child has ended
        by then; it also ends when this process does, for whatever reason.

    Args:
        manifest: The model's manifest.
        onnx: The model's file; run only if it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``; each in turn is a batch of its own.
        runs: Number of timed inferences, 1 to `MAX_RUNS`, after a warm-up.
        limits: Time and memory for the child, including the warm-up.

    Returns:
        Median and 99th percentile, shape ``(2,)``, microseconds.

    Raises:
        DataError: the inputs have another shape or type.
        LimitExceeded: the model exceeded its limits.
        DeviceError: onnxruntime cannot run the model, or failed; or the file has changed.
        ResourceError: no process could be started.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise ValueError(f"runs: expected 1 to {MAX_RUNS}, got {runs}")
    found = _run_child(manifest, onnx, inputs, 2, threads=1, limits=limits, how={"runs": runs})
    if found.shape != (2,) or not np.isfinite(found).all():
        raise DeviceError(
            f"{_named(manifest)}: the timing failed: it returned times of shape {found.shape}."
        )
    return found


def _run_child(
    manifest: Manifest,
    onnx: Path,
    inputs: AnyArray,
    rows: int | None,
    *,
    threads: int,
    limits: ModelLimits,
    how: Mapping[str, int],
) -> FloatArray:
    """Runs a child process on the inputs, and returns the array that it answers with.

    Args:
        manifest: The model's manifest.
        onnx: The model's file.
        inputs: Shape ``(B, *manifest.input_shape)``.
        rows: Expected length of the array; B when None.
        threads: Threads of one inference.
        limits: Time and memory for the child.
        how: Further fields of the request (see `edge_client.inference.confined_child.main`).

    Raises:
        DataError, LimitExceeded, DeviceError, ResourceError: see `predict`.
    """
    of = _named(manifest)
    _check_inputs(manifest, inputs, of)
    memory_bytes = limits.memory_bytes or (
        _BASE_BYTES + _THREAD_BYTES * threads + _COPIES * manifest.onnx.length + 4 * inputs.nbytes
    )
    head = {
        "parent": os.getpid(),
        "model": str(onnx.absolute()),
        "sha256": manifest.onnx.sha256,
        "dtype": inputs.dtype.str,
        "shape": inputs.shape,
        "threads": threads,
        "memory_bytes": memory_bytes,
        "processor_s": int(limits.seconds * threads) + _PROCESSOR_MARGIN_S,
        "max_output_bytes": _MAX_OUTPUT_BYTES,
        **how,
    }
    deadline = time.monotonic() + limits.seconds
    with os.fdopen(os.memfd_create("request"), "w+b") as request:
        request.write(json.dumps(head).encode() + b"\n")
        request.write(np.ascontiguousarray(inputs).data)
        request.seek(0)
        child = _start(request, of)
    try:
        raw = _read(child, deadline)
        status = child.wait(max(0.0, deadline - time.monotonic())) if raw is not None else None
    except subprocess.TimeoutExpired:
        status = None
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    if raw is None or status is None:
        raise LimitExceeded(
            f"{of}: it gave no answer within {limits.seconds:g} s, this device's time limit, and "
            "was stopped. --max-seconds allows more (from Python, ModelLimits.seconds)."
        )
    return _outputs(raw, status, of, memory_bytes, len(inputs) if rows is None else rows)


def _named(manifest: Manifest) -> str:
    return f"model {manifest.model!r} version {manifest.version}"


def _check_inputs(manifest: Manifest, inputs: AnyArray, of: str) -> None:
    expected = manifest.input_shape
    if inputs.ndim == 0 or inputs.shape[1:] != expected or len(inputs) == 0:
        raise DataError(
            f"input: expected shape (batch, {', '.join(map(str, expected))}) with a batch of at "
            f"least 1, got {inputs.shape}. Nothing was answered."
        )
    try:
        dtype = np.dtype(manifest.input_dtype)
    except (TypeError, ValueError, SyntaxError):
        dtype = np.dtype(object)
    if dtype.kind not in "fiub":
        raise DeviceError(
            f"{of}: its inputs are of type {foreign(manifest.input_dtype, 50)!r}, which is not a "
            "numeric type. It is not served."
        )
    if inputs.dtype != dtype:
        raise DataError(f"input: expected type {dtype}, got {inputs.dtype}. Nothing was answered.")


def _start(request: IO[bytes], of: str) -> subprocess.Popen[bytes]:
    ours = str(Path(__file__).resolve().parents[2])
    path = [ours, *(place for place in sys.path if Path(place).is_absolute())]
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter, and a fixed program
            # -S skips `site` and its hooks: start-up takes a third of the time.
            [sys.executable, "-I", "-S", "-c", _START, json.dumps(path)],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_SET | {name: os.environ[name] for name in _KEPT if name in os.environ},
            close_fds=True,
            start_new_session=True,  # keeps Ctrl-C at the terminal from reaching the child
        )
    except OSError as error:
        raise ResourceError(
            f"{of}: cannot start a process to run it ({error.strerror}). Nothing was answered; "
            "run again when the machine has processes and memory available."
        ) from error


def _read(child: subprocess.Popen[bytes], deadline: float) -> bytearray | None:
    """Reads the child's output, up to one byte beyond the limit; None if the deadline passes."""
    assert child.stdout is not None
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN | select.POLLHUP)
    found, most = bytearray(), _MAX_HEAD_BYTES + _MAX_OUTPUT_BYTES + 1
    while len(found) < most:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        piece = os.read(child.stdout.fileno(), min(most - len(found), 1 << 20))
        if not piece:
            break
        found += piece
    return found


def _outputs(
    raw: bytes | bytearray, status: int, of: str, memory_bytes: int, rows: int
) -> FloatArray:
    """Parses the child's answer as an array of numbers, or raises the error that it reports.

    The model may have taken over the child, so nothing in the answer is trusted.
    """
    if status != 0:
        _explain_end(status, of, memory_bytes)
    end = raw.find(b"\n", 0, _MAX_HEAD_BYTES + 1)
    try:
        head: Any = json.loads(raw[:end]) if end >= 0 else {}
        if not isinstance(head, dict):
            raise TypeError(f"a response of type {type(head).__name__}")
        if "fault" in head:
            _explain_fault(str(head["fault"]), foreign(head["text"]), of, memory_bytes)
        dtype = np.dtype(str(head["dtype"]))
        if dtype.kind not in "fiub":
            raise ValueError(f"outputs of type {dtype}")
        outputs = np.frombuffer(memoryview(raw)[end + 1 :], dtype)
        outputs = outputs.reshape([int(size) for size in head["shape"]])
        if outputs.ndim == 0 or len(outputs) != rows:
            raise ValueError(
                f"expected {rows} rows, outputs of shape {outputs.shape}, type {dtype}"
            )
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise DeviceError(
            f"{of}: its response is malformed ({type(error).__name__}: {foreign(error, 200)}). "
            "Nothing was answered."
        ) from error
    return outputs


def _explain_fault(fault: str, text: str, of: str, memory_bytes: int) -> NoReturn:
    if fault == "memory":
        raise LimitExceeded(
            f"{of}: it needs more than {memory_bytes >> 20} MiB, this device's memory limit "
            f"({text}). --max-memory-mib allows more (from Python, ModelLimits.memory_bytes)."
        )
    if fault == "output":
        raise LimitExceeded(
            f"{of}: its outputs have {text}, which is not allowed. Nothing was answered; send "
            "fewer inputs at a time."
        )
    if fault == "file":
        raise DeviceError(
            f"{of}: its file has just changed ({text}); an update may have replaced it. Nothing "
            "was answered; run again."
        )
    if fault == "load":
        raise DeviceError(
            f"{of}: onnxruntime on this device cannot run it: {text}. It does not serve."
        )
    raise DeviceError(f"{of}: onnxruntime failed: {text}. Nothing was answered.")


def _explain_end(status: int, of: str, memory_bytes: int) -> NoReturn:
    if status == -signal.SIGXCPU:
        raise LimitExceeded(
            f"{of}: it used more CPU time than this device's time limit allows, and was stopped. "
            "--max-seconds allows more (from Python, ModelLimits.seconds)."
        )
    how = signal.strsignal(-status) if status < 0 else f"exit code {status}"
    raise DeviceError(
        f"{of}: it crashed onnxruntime ({how}), as a model that needs more than the "
        f"{memory_bytes >> 20} MiB allowed, or a broken one, can. Nothing was answered."
    )
