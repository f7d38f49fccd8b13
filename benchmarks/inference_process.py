"""The part ``process`` of the inference benchmark: calls, cold starts and swaps in one process.

What a call costs beside bare onnxruntime (one session, bound input and output, nothing checked or
copied: the limit) and beside torch in eager mode, all on one thread, in alternating blocks.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import fedcore
from benchmarks.deployment import Found
from benchmarks.figures import at_least, at_most, row
from benchmarks.inference_models import WORKLOADS, Released, activator, release
from benchmarks.measure import ProgramFailed, pss_bytes
from benchmarks.systems import ROOT
from edge_client.live import LiveModel

RAW, RUN, OURS, TORCH = "onnxruntime-bound", "onnxruntime-run", "fedcore", "torch-eager"
_WARM_UP, _CALLS, _BLOCKS = 20, 100, 20
_COLD = """
import sys
import fedcore
import numpy as np
model = fedcore.open_model(sys.argv[1], sys.argv[2])
model.predict(np.zeros(model.manifest.input_shape, np.float32))
print("torch" in sys.modules or "flwr" in sys.modules, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    repeats: int
    seconds: float
    """Of each concurrency."""
    starts: int
    swaps: int
    requests: int
    """Answers between two swaps, at least."""


FULL = Sizes(repeats=5, seconds=2.0, starts=5, swaps=200, requests=10_000)
QUICK = Sizes(repeats=2, seconds=0.2, starts=1, swaps=3, requests=500)


def measure(folder: Path, quick: bool, found: Found) -> None:
    """Fills in calls of one thread and of many, cold starts, memory and swaps."""
    sizes = QUICK if quick else FULL
    torch.set_num_threads(1)
    for workload in WORKLOADS:
        released = release(folder, workload, versions=2 if workload == "digits" else 1)
        _calls(released, sizes, found)
        if workload == "digits":
            for threads in (8, 64):
                _concurrent(released, threads, sizes, found)
            _cold_start(released, sizes, found)
            _swaps(released, sizes, found)


def callers(released: Released) -> dict[str, Callable[[], object]]:
    """One call of each system on the same input."""
    model = fedcore.open_model(released.store, released.name)
    model.warm_up()
    if model.why_confined:
        raise ProgramFailed(f"{released.name} does not run in process: {model.why_confined}")
    session = bare_session(model.installed.path.read_bytes())
    x, batch = released.example, released.example[None].copy()
    name = session.get_inputs()[0].name
    tensor = torch.from_numpy(batch)

    def eager() -> object:
        with torch.inference_mode():
            return released.module(tensor)

    return {
        RAW: bound(session, batch),
        RUN: lambda: session.run(None, {name: batch}),
        OURS: lambda: model.predict(x),
        TORCH: eager,
    }


def bare_session(onnx: bytes) -> Any:
    """A session on one thread, as devices have it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def bound(session: Any, batch: Any) -> Callable[[], object]:
    """A run of a session whose input and output are bound once, as onnxruntime's guide has it."""
    given, taken = session.get_inputs()[0], session.get_outputs()[0]
    out = np.empty_like(session.run(None, {given.name: batch})[0])
    binding = session.io_binding()
    binding.bind_input(given.name, "cpu", 0, batch.dtype.type, batch.shape, batch.ctypes.data)
    binding.bind_output(taken.name, "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)
    kept = (batch, out)
    return lambda: session.run_with_iobinding(binding) or kept


def _calls(released: Released, sizes: Sizes, found: Found) -> None:
    calls = callers(released)
    times = {name: _Times() for name in calls}
    for _ in range(sizes.repeats):
        for name, samples in _in_turn(calls).items():
            times[name].add(samples)
    for name, each in times.items():
        found.rows.append(row(name, released.name, "p50_us", "us", each.p50_us))
        found.rows.append(row(name, released.name, "p99_us", "us", each.p99_us))
    ratio = [a / b for a, b in zip(times[OURS].p50_us, times[RAW].p50_us, strict=True)]
    eager = [a / b for a, b in zip(times[TORCH].p50_us, times[OURS].p50_us, strict=True)]
    found.checks.append(at_most(f"{released.name}: predict over a bound run, p50", ratio, 1.10))
    if released.name.startswith("digits"):
        found.checks.append(at_least(f"{released.name}: torch eager over predict", eager, 3.0))
    else:
        found.rows.append(row(TORCH, released.name, "over_fedcore", "ratio", eager))


class _Times:
    """Percentiles of each repeat."""

    def __init__(self) -> None:
        self.p50_us: list[float] = []
        self.p99_us: list[float] = []

    def add(self, samples: list[int]) -> None:
        """Adds a repeat, of samples in nanoseconds."""
        ordered = sorted(samples)
        self.p50_us.append(statistics.median(ordered) / 1e3)
        self.p99_us.append(ordered[int(0.99 * (len(ordered) - 1))] / 1e3)


def _in_turn(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[int]]:
    """Nanoseconds of calls, in many short blocks, so that a passing load slows all of them."""
    samples: dict[str, list[int]] = {name: [] for name in calls}
    clock = time.perf_counter_ns
    names = list(calls)
    for block in range(_BLOCKS):
        start = block % len(names)
        for name in (*names[start:], *names[:start]):
            call = calls[name]
            for _ in range(_WARM_UP):
                call()
            for _ in range(_CALLS):
                began = clock()
                call()
                samples[name].append(clock() - began)
    return samples


def _concurrent(released: Released, threads: int, sizes: Sizes, found: Found) -> None:
    """Many threads of one process that call as fast as they can."""
    model = fedcore.open_model(released.store, released.name)
    model.warm_up()
    session = bare_session(model.installed.path.read_bytes())
    workload = f"{released.name}, {threads} threads"
    rates: dict[str, list[float]] = {RAW: [], OURS: []}
    times = {RAW: _Times(), OURS: _Times()}
    for _ in range(sizes.repeats):
        bindings = [bound(session, released.example[None].copy()) for _ in range(threads)]
        for name, calls in (
            (RAW, bindings),
            (OURS, [lambda: model.predict(released.example)] * threads),
        ):
            samples, seconds = _at_once(calls, sizes.seconds)
            times[name].add(samples)
            rates[name].append(len(samples) / seconds)
    for name, each in rates.items():
        found.rows.append(row(name, workload, "calls_per_s", "1/s", each))
        found.rows.append(row(name, workload, "p50_us", "us", times[name].p50_us))
        found.rows.append(row(name, workload, "p99_us", "us", times[name].p99_us))


def _at_once(calls: list[Callable[[], object]], seconds: float) -> tuple[list[int], float]:
    samples: list[list[int]] = [[] for _ in calls]
    stop = threading.Event()

    def work(call: Callable[[], object], mine: list[int]) -> None:
        clock = time.perf_counter_ns
        while not stop.is_set():
            began = clock()
            call()
            mine.append(clock() - began)

    threads = [
        threading.Thread(target=work, args=each) for each in zip(calls, samples, strict=True)
    ]
    began_s = time.monotonic()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return [each for mine in samples for each in mine], time.monotonic() - began_s


def _cold_start(released: Released, sizes: Sizes, found: Found) -> None:
    """From the launch of a process to its first answer, and its memory then."""
    device = ROOT / ".venv-device" / "bin" / "python"
    python = str(device) if device.exists() else sys.executable
    found.notes.append(f"cold starts with {'the base package' if device.exists() else 'this'} venv")
    seconds, cpu_s, memory = [], [], []
    for _ in range(sizes.starts + 1):
        began_s = time.monotonic()
        with subprocess.Popen(
            [python, "-c", _COLD, str(released.store), released.name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            if process.stdout.readline().strip() != "False":
                raise ProgramFailed("a device that only infers imports torch or Flower, or failed")
            seconds.append(time.monotonic() - began_s)
            memory.append(pss_bytes(process.pid))
            cpu_s.append(_cpu_s(process.pid))
            process.communicate("")
    # The first one fills the page cache.
    found.rows.append(row(OURS, "cold start", "first_answer_s", "s", seconds[1:]))
    found.rows.append(row(OURS, "cold start", "cpu_s", "s", cpu_s[1:]))
    found.rows.append(row(OURS, "cold start", "memory_bytes", "bytes", memory[1:]))
    found.checks.append(at_most("cold start to the first answer, s", seconds[1:], 1.0))


def _cpu_s(process: int) -> float:
    """CPU time of a process and of the children that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / 100


def _swaps(released: Released, sizes: Sizes, found: Found) -> None:
    """Changes the active version again and again while two threads ask."""
    activate = activator(released)
    inputs = released.example[None].copy()
    expected = {}
    for version in (1, 2):
        activate(version)
        model = fedcore.open_model(released.store, released.name)
        expected[version] = model.predict(released.example)
    asked = _Asked()
    with fedcore.follow_model(released.store, released.name) as live:
        name = live.current.engine.inputs[0].name
        threads = [
            threading.Thread(target=asked.ask, args=(live, {name: inputs}, expected))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        _wait_for(lambda: asked.count >= sizes.requests)
        calm, asked.times_ns = asked.times_ns, []
        for swap in range(sizes.swaps):
            before, version = asked.count, 1 + swap % 2
            activate(version)
            _wait_for(lambda v=version: live.current.version == v)
            _wait_for(lambda n=before: asked.count >= n + sizes.requests)
        asked.stop = True
        for thread in threads:
            thread.join()
    for workload, samples in (("no swaps", calm), ("swaps", asked.times_ns)):
        times = _Times()
        times.add(samples)
        found.rows.append(row(OURS, workload, "p50_us", "us", times.p50_us))
        found.rows.append(row(OURS, workload, "p99_us", "us", times.p99_us))
    found.rows.append(row(OURS, "swaps", "answers", "answers", [asked.count]))
    found.checks.append(at_most(f"wrong or failed in {sizes.swaps} swaps", [asked.wrong], 0))


class _Asked:
    """What threads have asked of a model whose version changes, and what came back."""

    def __init__(self) -> None:
        self.stop = False
        self.count = self.wrong = 0
        self.times_ns: list[int] = []
        self._lock = threading.Lock()

    def ask(self, live: LiveModel, inputs: Mapping[str, Any], expected: Mapping[int, Any]) -> None:
        """Asks until `stop`, and compares each answer with that of the version it names."""
        clock = time.perf_counter_ns
        while not self.stop:
            took = []
            wrong = 0
            for _ in range(100):
                began = clock()
                try:
                    answer = live.run(inputs)
                    (outputs,) = answer.outputs.values()
                    took.append(clock() - began)
                    wrong += not np.array_equal(outputs[0], expected[answer.version])
                except fedcore.FedcoreError:
                    wrong += 1
            with self._lock:
                self.times_ns += took
                self.count += 100
                self.wrong += wrong


def _wait_for(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        if time.monotonic() > end:
            raise ProgramFailed("a version was not taken up within two minutes")
        time.sleep(0.005)
