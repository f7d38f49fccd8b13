"""Running a model that nobody has seen run: in a process of its own, with limits.

An ONNX file is a program. It may loop forever, take all memory, or bring onnxruntime down; what it
does here happens to a child process that holds no lock, no key and no open file, and that dies with
its parent.
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
"""Address space of Python and onnxruntime (150 MB), and of activations."""
_THREAD_BYTES = 160 << 20
"""Address space that a thread reserves: its stack, and what the allocator sets aside for it."""
_COPIES = 6
"""Of the weights, while onnxruntime reads a file, optimises it, and packs it for the processor."""
_MAX_OUTPUT_BYTES = 256 << 20
MAX_RUNS = 10_000_000
"""Inferences that may be timed at once."""
_MAX_HEAD_BYTES = 4096
_PROCESSOR_MARGIN_S = 10
"""Above what the limit of time allows: it ends a child whose parent was stopped and looks at no
clock."""
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from edge_client.inference.confined_child import main; main()"
)
_KEPT = ("LD_LIBRARY_PATH", "LANG", "LC_ALL")
_SET = {
    "OMP_NUM_THREADS": "1",  # onnxruntime has threads of its own
    "OPENBLAS_NUM_THREADS": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # it would open a database and connections while it loads
}


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What a model may take on this device while it is tried."""

    seconds: float = 120.0
    """From its start to its last answer, `MIN_SECONDS` to `MAX_SECONDS`."""
    memory_bytes: int | None = None
    """Address space, `MIN_MEMORY_BYTES` to `MAX_MEMORY_BYTES`; None: 1 GiB, 160 MiB a thread, and
    six times the size of the model's file."""

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
    one_at_a_time: bool = False,
) -> FloatArray:
    """A model's outputs, computed by a child process.

    Guarantee:
        It returns or raises within ``limits.seconds`` and a moment. The child has ended by then,
        and ends when this process does, however that happens.

    Args:
        manifest: Of the model.
        onnx: Its file; not run unless it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``, dtype ``manifest.input_dtype``, B >= 1.
        threads: Of one inference.
        limits: What the child may take.
        one_at_a_time: Each input is a batch of its own.

    Returns:
        Outputs ``(B, ...)``.

    Raises:
        DataError: the inputs are of another shape or type.
        LimitExceeded: the model took more than it may.
        DeviceError: onnxruntime cannot run the model, or failed.
        ResourceError: no process could be started.
    """
    how = {"one_at_a_time": one_at_a_time}
    return _asked(manifest, onnx, inputs, None, threads=threads, limits=limits, how=how)


def time_runs(
    manifest: Manifest, onnx: Path, inputs: AnyArray, *, runs: int, limits: ModelLimits
) -> FloatArray:
    """How long single inferences take on one thread, by the clock of the child that does them.

    Guarantee:
        As `predict`: whatever the model does, it ends within ``limits``.

    Args:
        manifest: Of the model.
        onnx: Its file; not run unless it has the manifest's digest.
        inputs: Shape ``(B, *manifest.input_shape)``; each in turn is a batch of its own.
        runs: Timed inferences, 1 to `MAX_RUNS`, after a warm-up.
        limits: What the child may take, the warm-up included.

    Returns:
        Their median and 99th percentile, shape ``(2,)``, microseconds.

    Raises:
        DataError, LimitExceeded, DeviceError, ResourceError: as `predict`.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise ValueError(f"runs: expected 1 to {MAX_RUNS}, got {runs}")
    found = _asked(manifest, onnx, inputs, 2, threads=1, limits=limits, how={"runs": runs})
    if found.shape != (2,) or not np.isfinite(found).all():
        raise DeviceError(f"{_named(manifest)}: it was not timed: it gave {found.shape} of times.")
    return found


def _asked(
    manifest: Manifest,
    onnx: Path,
    inputs: AnyArray,
    rows: int | None,
    *,
    threads: int,
    limits: ModelLimits,
    how: Mapping[str, int],
) -> FloatArray:
    """What a child answers that is asked ``how`` of the inputs: an array of ``rows`` rows.

    There is one an input where ``rows`` is None.

    Raises:
        DataError, LimitExceeded, DeviceError, ResourceError: as `predict`.
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
            f"{of}: it gave no answer within {limits.seconds:g} s, the limit of time on this "
            "device, and was ended. --max-seconds allows more (from Python, ModelLimits.seconds)."
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
            f"{of}: its inputs are of type {foreign(manifest.input_dtype, 50)!r}, which is none "
            "of numbers. It does not serve."
        )
    if inputs.dtype != dtype:
        raise DataError(f"input: expected type {dtype}, got {inputs.dtype}. Nothing was answered.")


def _start(request: IO[bytes], of: str) -> subprocess.Popen[bytes]:
    ours = str(Path(__file__).resolve().parents[2])
    path = [ours, *(place for place in sys.path if Path(place).is_absolute())]
    try:
        return subprocess.Popen(  # noqa: S603 - this interpreter, and a fixed program
            # Without site and its hooks: a third of the time to start.
            [sys.executable, "-I", "-S", "-c", _START, json.dumps(path)],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=_SET | {name: os.environ[name] for name in _KEPT if name in os.environ},
            close_fds=True,
            start_new_session=True,  # what is typed at this process's terminal is not for it
        )
    except OSError as error:
        raise ResourceError(
            f"{of}: no process could be started to run it in ({error.strerror}). Nothing was "
            "answered; run again when the machine has processes and memory to spare."
        ) from error


def _read(child: subprocess.Popen[bytes], deadline: float) -> bytearray | None:
    """All that the child writes, a byte above the limit at most; None when time is up."""
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
    """What the child says, believed in no more than an array of numbers."""
    if status != 0:
        _explain_end(status, of, memory_bytes)
    end = raw.find(b"\n", 0, _MAX_HEAD_BYTES + 1)
    try:
        head: Any = json.loads(raw[:end]) if end >= 0 else {}
        if not isinstance(head, dict):
            raise TypeError(f"an answer of type {type(head).__name__}")
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
            f"{of}: it did not answer as a model does "
            f"({type(error).__name__}: {foreign(error, 200)}). Nothing was answered."
        ) from error
    return outputs


def _explain_fault(fault: str, text: str, of: str, memory_bytes: int) -> NoReturn:
    if fault == "memory":
        raise LimitExceeded(
            f"{of}: it needs more than {memory_bytes >> 20} MiB, the limit of memory on this "
            f"device ({text}). --max-memory-mib allows more (from Python, "
            "ModelLimits.memory_bytes)."
        )
    if fault == "output":
        raise LimitExceeded(
            f"{of}: its outputs have {text}, more than the {_MAX_OUTPUT_BYTES} allowed. Nothing "
            "was answered; ask for fewer at a time."
        )
    if fault == "file":
        raise DeviceError(
            f"{of}: its file is not what it was a moment ago ({text}); an update may have replaced "
            "it. Nothing was answered; run again."
        )
    if fault == "load":
        raise DeviceError(
            f"{of}: onnxruntime on this device cannot run it: {text}. It does not serve."
        )
    raise DeviceError(f"{of}: onnxruntime failed: {text}. Nothing was answered.")


def _explain_end(status: int, of: str, memory_bytes: int) -> NoReturn:
    if status == -signal.SIGXCPU:
        raise LimitExceeded(
            f"{of}: it took more time of the processor than the limit of time on this device "
            "allows, and was ended. --max-seconds allows more (from Python, ModelLimits.seconds)."
        )
    how = signal.strsignal(-status) if status < 0 else f"exit code {status}"
    raise DeviceError(
        f"{of}: it brought onnxruntime down ({how}), as a model that needs more than the "
        f"{memory_bytes >> 20} MiB allowed, or a broken one, can. Nothing was answered."
    )
