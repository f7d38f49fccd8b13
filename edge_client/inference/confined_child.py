"""The child process of `edge_client.inference.process`: runs one model and writes its outputs.

Imports only NumPy, onnxruntime and what opens a session, to start in a tenth of a second. Reads the
model before it sets its own resource limits; after that it can open no file or connection, and
write nothing except answers. It ends when nobody asks any more.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from edge_client.inference.decode_graph import NoDecodeGraph, decode_onnx
from edge_client.inference.session import SessionSettings, open_session

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # prctl.h
_WARM_UP_RUNS = 50
_MAX_TEXT = 500  # characters of onnxruntime's error message
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "bad allocation")


def main() -> None:
    """Opens the model that the first line names, and answers requests until there are no more.

    A request is one line of JSON, then the bytes of its arrays. An answer is one line of JSON, then
    the bytes of the outputs, or of the median and 99th percentile if the request has ``runs``. A
    line with ``fault`` reports an error, and no bytes follow it. The first answer, to the line that
    names the model, is what the model takes and gives.
    """
    start = json.loads(sys.stdin.buffer.readline())
    _die_with(start["parent"])
    try:
        onnx = Path(start["model"]).read_bytes()
    except OSError as error:
        _end({"fault": "file", "text": str(error.strerror)})
    if hashlib.sha256(onnx).hexdigest() != start["sha256"]:
        _end({"fault": "file", "text": "its digest does not match"})
    _confine(start["memory_bytes"])
    _allow_processor(start["processor_s"])
    if start["decode"]:
        try:
            onnx = decode_onnx(onnx)
        except NoDecodeGraph as error:
            _end({"fault": "load", "text": str(error)})
    try:
        session = open_session(onnx, SessionSettings(start["threads"]))
    except Exception as error:  # onnxruntime's errors have no common base class
        _end(_fault("load", error))
    del onnx
    _say({"inputs": _interface(session.get_inputs()), "outputs": _interface(session.get_outputs())})
    while line := sys.stdin.buffer.readline():
        _answer(session, json.loads(line))
    os._exit(0)


def _answer(session: Any, request: dict[str, Any]) -> None:
    arrays = [_read_array(each) for each in request["arrays"]]
    _allow_processor(request["processor_s"])
    try:
        names = [each.name for each in session.get_inputs()]
        feeds = dict(zip(request.get("names") or names, arrays, strict=True))
        if "runs" in request:
            outputs = [_times_us(session, feeds, runs=request["runs"])]
        elif request.get("together"):
            outputs = session.run(None, feeds)
        else:
            outputs = _outputs(session, feeds, max_bytes=request["max_output_bytes"])
    except _TooLarge as error:
        _say({"fault": "output", "text": str(error)})
        return
    except Exception as error:  # onnxruntime's errors have no common base class
        head = _fault("run", error)
        if head["fault"] == "memory":  # what is left may be too little for the next request
            _end(head)
        _say(head)
        return
    for output in outputs:
        kind = getattr(output, "dtype", type(output).__name__)
        if not isinstance(output, np.ndarray) or output.dtype.kind not in "fiub":
            _say({"fault": "run", "text": f"its outputs are of type {kind}, not numeric"})
            return
    if sum(output.nbytes for output in outputs) > request["max_output_bytes"]:
        _say({"fault": "output", "text": f"more than {request['max_output_bytes']} bytes"})
        return
    heads = [{"dtype": output.dtype.str, "shape": output.shape} for output in outputs]
    _say({"arrays": heads}, outputs)


class _TooLarge(Exception):
    """The outputs have more bytes than the request allows."""


def _read_array(head: dict[str, Any]) -> Any:
    values = np.empty(head["shape"], head["dtype"])
    left: memoryview = values.reshape(-1).view(np.uint8).data
    stream: Any = sys.stdin.buffer
    while len(left):
        count = stream.readinto(left)
        if not count:  # the parent has ended
            os._exit(0)
        left = left[count:]
    return values


def _interface(tensors: Sequence[Any]) -> list[Any]:
    return [[each.name, each.type, each.shape] for each in tensors]


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


def _confine(memory_bytes: int) -> None:
    for limit, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_NOFILE, 3),  # the standard streams use up all descriptors
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(limit, (most, most))


def _allow_processor(seconds: int) -> None:
    """Limits the CPU time from now on; SIGXCPU ends the process when it is used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime) + seconds
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(
        resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )


def _outputs(session: Any, feeds: dict[str, Any], *, max_bytes: int) -> list[Any]:
    """Returns the outputs of the inputs, each run as a batch of its own.

    So models are measured before their release, and an input's outputs depend on no other input:
    dynamic int8 derives its scales from all inputs that run together.
    """
    found: list[list[Any]] = []
    size = 0
    for row in range(min(map(len, feeds.values()))):
        outputs = session.run(None, {name: each[row : row + 1] for name, each in feeds.items()})
        found.append(outputs)
        size += sum(output.nbytes for output in outputs)
        if size > max_bytes:
            raise _TooLarge(f"more than {max_bytes} bytes")
    return [np.concatenate(of_one) for of_one in zip(*found, strict=True)]


def _times_us(session: Any, feeds: dict[str, Any], *, runs: int) -> Any:
    """Returns median and 99th percentile in microseconds of ``runs`` single inferences."""
    rows = min(map(len, feeds.values()))
    each = [{name: all_[row : row + 1] for name, all_ in feeds.items()} for row in range(rows)]
    for run in range(_WARM_UP_RUNS):
        session.run(None, each[run % rows])
    times_us = np.empty(runs)
    for run in range(runs):
        feed = each[run % rows]
        start_ns = time.perf_counter_ns()
        session.run(None, feed)
        times_us[run] = (time.perf_counter_ns() - start_ns) / 1e3
    # `np.percentile` imports a module on its first call, but no file can be opened any more.
    return np.interp([0.5 * (runs - 1), 0.99 * (runs - 1)], np.arange(runs), np.sort(times_us))


def _fault(step: str, error: Exception) -> dict[str, str]:
    text = str(error)
    short = isinstance(error, MemoryError) or any(word in text.lower() for word in _NO_MEMORY)
    return {"fault": "memory" if short else step, "text": text[:_MAX_TEXT]}


def _say(head: dict[str, Any], arrays: Sequence[Any] = ()) -> None:
    with os.fdopen(1, "wb", closefd=False) as stream:
        stream.write(json.dumps(head).encode() + b"\n")
        for array in arrays:
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _end(head: dict[str, Any]) -> NoReturn:
    """Writes the answer and exits at once: the model must not influence the exit."""
    _say(head)
    os._exit(0)
