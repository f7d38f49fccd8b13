"""The child process of `edge_client.inference.confined`: runs one model and writes its outputs.

Imports only NumPy, onnxruntime and `edge_client.inference.session`, to start in a tenth of a
second. Reads the request and the model before it sets its own resource limits; after that it can
open no file or connection, and write nothing except the answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edge_client.inference.session import open_session

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # prctl.h
_WARM_UP_RUNS = 50
_MAX_TEXT = 500  # characters of onnxruntime's error message
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "bad allocation")


def main() -> None:
    """Reads a request from standard input, and writes the answer to standard output.

    A request is one line of JSON, then the bytes of the inputs. An answer is one line of JSON, then
    the bytes of the outputs, or of the median and 99th percentile if the request has ``runs``. A
    line with ``fault`` reports an error, and no bytes follow it.
    """
    request = json.loads(sys.stdin.buffer.readline())
    _die_with(request["parent"])
    inputs = np.frombuffer(sys.stdin.buffer.read(), request["dtype"]).reshape(request["shape"])
    try:
        onnx = Path(request["model"]).read_bytes()
    except OSError as error:
        _answer({"fault": "file", "text": str(error.strerror)})
    if hashlib.sha256(onnx).hexdigest() != request["sha256"]:
        _answer({"fault": "file", "text": "its digest does not match"})
    _confine(request["memory_bytes"], request["processor_s"])
    try:
        session = open_session(onnx, threads=request["threads"])
    except Exception as error:  # onnxruntime's errors have no common base class
        _fail("load", error)
    try:
        if "runs" in request:
            outputs = _times_us(session, inputs, runs=request["runs"])
        else:
            outputs = _outputs(session, inputs, max_bytes=request["max_output_bytes"])
    except Exception as error:  # onnxruntime's errors have no common base class
        _fail("run", error)
    if outputs.dtype.kind not in "fiub":
        _answer({"fault": "run", "text": f"its outputs are of type {outputs.dtype}, not numeric"})
    _answer({"dtype": outputs.dtype.str, "shape": outputs.shape}, outputs.tobytes())


def _die_with(parent: int) -> None:
    """Makes the kernel kill this process when its parent dies, and first when memory runs out."""
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with contextlib.suppress(OSError):  # first victim of the OOM killer
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent:  # it died before prctl took effect
        os.kill(os.getpid(), signal.SIGKILL)


def _confine(memory_bytes: int, processor_s: int) -> None:
    for limit, soft, hard in (
        (resource.RLIMIT_AS, memory_bytes, memory_bytes),
        (resource.RLIMIT_CPU, processor_s, processor_s + 1),  # SIGXCPU, then SIGKILL
        (resource.RLIMIT_NOFILE, 3, 3),  # the standard streams use up all descriptors
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, most = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(limit, (soft, hard))


def _outputs(session: Any, inputs: Any, *, max_bytes: int) -> Any:
    """Returns the outputs of the inputs, each run as a batch of its own.

    So models are measured before their release, and an input's outputs depend on no other input:
    dynamic int8 derives its scales from all inputs that run together.
    """
    name = session.get_inputs()[0].name
    found, size = [], 0
    for row in range(len(inputs)):
        found.append(session.run(None, {name: inputs[row : row + 1]})[0])
        size += found[-1].nbytes
        if size > max_bytes:
            _answer({"fault": "output", "text": f"more than {max_bytes} bytes"})
    return np.concatenate(found)


def _times_us(session: Any, inputs: Any, *, runs: int) -> Any:
    """Returns median and 99th percentile in microseconds of ``runs`` single inferences."""
    name = session.get_inputs()[0].name
    feeds = [{name: inputs[row : row + 1]} for row in range(len(inputs))]
    for run in range(_WARM_UP_RUNS):
        session.run(None, feeds[run % len(feeds)])
    times_us = np.empty(runs)
    for run in range(runs):
        feed = feeds[run % len(feeds)]
        start_ns = time.perf_counter_ns()
        session.run(None, feed)
        times_us[run] = (time.perf_counter_ns() - start_ns) / 1e3
    # `np.percentile` imports a module on its first call, but no file can be opened any more.
    return np.interp([0.5 * (runs - 1), 0.99 * (runs - 1)], np.arange(runs), np.sort(times_us))


def _fail(step: str, error: Exception) -> NoReturn:
    text = str(error)
    short = isinstance(error, MemoryError) or any(word in text.lower() for word in _NO_MEMORY)
    _answer({"fault": "memory" if short else step, "text": text[:_MAX_TEXT]})


def _answer(head: dict[str, Any], raw: bytes = b"") -> NoReturn:
    """Writes the answer and exits at once: the model must not influence the exit."""
    with os.fdopen(1, "wb", closefd=False) as stream:
        stream.write(json.dumps(head).encode() + b"\n" + raw)
    os._exit(0)
