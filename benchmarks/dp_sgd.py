"""DP-SGD on a device: what privacy costs a step, beside Opacus with hooks and with ghost clipping.

``make bench NAME=dp_sgd`` runs it. Every step is taken in one process with one thread, in turn, of
the same model on the same batch. Times are of the processor, which on a machine that nobody else
uses are those of the clock. ``runs/bench/dp_sgd.json`` has the figures.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dp_sgd_models import Setting, settings
from benchmarks.dp_sgd_steps import CLIP_NORM, NOISE, SYSTEMS, fedcore_sum, opacus_sum, steps_of
from benchmarks.figures import Check, Row, at_most, row
from benchmarks.measure import observe, processor
from benchmarks.systems import ROOT
from fedcore.files import write_json
from fedcore.privacy.draws import SystemDraws

LARGE = "words"
"""The workload whose table Opacus copies for each example with hooks: 8 GB of gradients."""
_UNFIT = {(LARGE, "opacus-hooks")}
_NOISE_NUMBERS = 121_930  # of W1's model
_SLOWDOWN, _NOISE_TIMES, _NOISE_SHARE = 1.6, 6.0, 0.04
_SAME, _LARGE_BYTES = 1e-5, 2e9
_STEPS, _FEW = 3, 8


@dataclass(frozen=True)
class Timed:
    """One system on one workload in one repeat."""

    system: str
    workload: str
    repeat: int
    step_s: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 when a check does not hold."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Opacus's
    if options.peak:
        print(json.dumps(_peak_of(settings()[options.peak], options.system)))
        return 0
    chosen = [settings()[name] for name in options.workloads]
    rows: list[Row] = []
    checks: list[Check] = []
    for setting in chosen:
        timed, failures = time_systems(setting, options.repeats)
        rows += rows_of(timed) + _limit_rows(setting)
        rows += _peak_rows(setting, failures)
        for system, why in failures.items():
            print(f"{setting.name}: {system} was not timed: {why}", flush=True)
        name = f"{setting.name}: clipped sum, relative difference from Opacus"
        checks.append(at_most(name, [difference(setting)], _SAME))
        if setting.name == "w1":
            noise = time_noise(options.repeats)
            rows += _noise_rows(noise)
            checks += checks_of(timed, noise)
    large = [
        one.median
        for one in rows
        if (one.workload, one.system, one.metric) == (LARGE, "fedcore", "peak_bytes")
    ]
    if large:
        checks.append(at_most(f"{LARGE}: peak memory of fedcore, bytes", large, _LARGE_BYTES))
    result = {
        "machine": _machine(),
        "settings": {"clip_norm": CLIP_NORM, "noise_multiplier": NOISE},
        "rows": [asdict(one) for one in rows],
        "checks": [asdict(one) for one in checks],
    }
    write_json(options.out / "dp_sgd.json", result)
    print(table(rows, checks))
    return 0 if all(check.holds for check in checks) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.dp_sgd", description=__doc__)
    names = list(settings())
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--peak", choices=names, help="take steps, and print their peak memory")
    parser.add_argument("--system", choices=SYSTEMS, default="fedcore", help="whose, with --peak")
    return parser


def made(setting: Setting) -> nn.Module:
    """A workload's model, the same each time."""
    torch.manual_seed(0)
    return setting.model()


def time_systems(setting: Setting, repeats: int) -> tuple[list[Timed], dict[str, str]]:
    """Steps of all systems in turn, and why those that are missing are."""
    steps, failures = {}, {}
    for system in SYSTEMS:
        if (setting.name, system) in _UNFIT:
            failures[system] = "its gradients would take 8 GB"
            continue
        try:
            steps[system] = steps_of(system, setting, made(setting))
            steps[system](2)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if not system.startswith("opacus"):
                raise
            failures[system] = f"{type(error).__name__}: {str(error)[:120]}"
            steps.pop(system, None)
    timed = []
    for repeat in range(repeats):
        gc.collect()
        for system, take in steps.items():
            step_s = _seconds(lambda take=take: take(_STEPS)) / _STEPS  # type: ignore[misc]
            timed.append(Timed(system, setting.name, repeat, step_s))
    return timed, failures


def time_noise(repeats: int) -> dict[str, list[float]]:
    """Seconds for the noise of one step of W1's model, of fedcore and of torch's generator."""
    draws, found = SystemDraws(), dict[str, list[float]](fedcore=[], torch=[])
    sums = [
        torch.zeros_like(one, dtype=torch.float64) for one in made(settings()["w1"]).parameters()
    ]
    assert sum(one.numel() for one in sums) == _NOISE_NUMBERS
    for _ in range(repeats):
        ours = _seconds(lambda: [draws.add_noise(sums, deviation=NOISE, bound=1e3) for _ in "123"])
        theirs = _seconds(lambda: [torch.normal(0.0, NOISE, (_NOISE_NUMBERS,)) for _ in "123"])
        found["fedcore"].append(ours / 3)
        found["torch"].append(theirs / 3)
    return found


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def difference(setting: Setting) -> float:
    """How far fedcore's clipped sum is from Opacus's, relative to its length."""
    if setting.name == LARGE:  # so few that Opacus with hooks can
        few = slice(_FEW)
        setting = replace(setting, inputs=setting.inputs[few], targets=setting.targets[few])
    ours, theirs = (make(setting, made(setting)) for make in (fedcore_sum, opacus_sum))
    return float(torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs))


def rows_of(timed: Sequence[Timed]) -> list[Row]:
    """Seconds a step, and how many times those of a plain step they are."""
    rows = []
    for workload, system in dict.fromkeys((one.workload, one.system) for one in timed):
        mine = [one.step_s for one in timed if (one.workload, one.system) == (workload, system)]
        rows.append(row(system, workload, "step_s", "s", mine))
        if system != "plain":
            times = over_plain(timed, workload, system)
            rows.append(row(system, workload, "over_plain", "ratio", times))
    return rows


def over_plain(timed: Sequence[Timed], workload: str, system: str) -> list[float]:
    """A system's step over a plain one, within each repeat."""
    seconds = {(one.system, one.repeat): one.step_s for one in timed if one.workload == workload}
    repeats = sorted(repeat for name, repeat in seconds if name == system)
    return [seconds[system, repeat] / seconds["plain", repeat] for repeat in repeats]


def checks_of(timed: Sequence[Timed], noise: dict[str, list[float]]) -> list[Check]:
    """What is promised of W1 and of noise."""
    steps = [one.step_s for one in timed if (one.workload, one.system) == ("w1", "fedcore")]
    pairs = zip(noise["fedcore"], noise["torch"], strict=True)
    shares = [ours / step for ours, step in zip(noise["fedcore"], steps, strict=True)]
    return [
        at_most("w1: DP step over plain step", over_plain(timed, "w1", "fedcore"), _SLOWDOWN),
        at_most("noise: over torch's generator", [a / b for a, b in pairs], _NOISE_TIMES),
        at_most("noise: share of W1's DP step", shares, _NOISE_SHARE),
    ]


def _noise_rows(noise: dict[str, list[float]]) -> list[Row]:
    return [row(name, "noise", "step_s", "s", values) for name, values in noise.items()]


def _limit_rows(setting: Setting) -> list[Row]:
    """No step is quicker than its products at the speed of a large one."""
    model, loss = made(setting), setting.task.loss
    assert loss is not None
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss(model(setting.inputs), setting.targets))
    limit = counter.get_total_flops() / matrix_peak_flops()
    return [row("limit", setting.name, "step_s", "s", [limit])]


@functools.cache
def matrix_peak_flops() -> float:
    """Float32 operations a second of a large matrix product on one thread."""
    left, right = torch.randn(2, 2048, 2048).unbind()
    return 2 * 2048**3 / min(_seconds(lambda: torch.mm(left, right)) for _ in range(8))


def _peak_rows(setting: Setting, failures: dict[str, str]) -> list[Row]:
    """Peak memory of a process that takes three steps, and of one that does not."""
    rows = []
    for system in (one for one in SYSTEMS if one not in failures):
        command = [sys.executable, "-m", "benchmarks.dp_sgd", "--peak", setting.name]
        observed = observe(
            [*command, "--system", system],
            environment={"OMP_NUM_THREADS": "1"},
            folder=ROOT,
            limit_s=600,
        )
        found = json.loads(observed.lines[-1][1])
        for metric, value in found.items():
            rows.append(row(system, setting.name, metric, "bytes", [value]))
    return rows


def _peak_of(setting: Setting, system: str) -> dict[str, int]:
    steps = steps_of(system, setting, made(setting))
    before = _peak_bytes()
    steps(3)
    return {"before_bytes": before, "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Not that of getrusage, which a process has from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: no VmHWM there")


def _machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("fedcore", "torch", "opacus")},
        },
    }


def table(rows: Sequence[Row], checks: Sequence[Check]) -> str:
    """The figures as text."""
    lines = [
        f"{'workload':11} {'system':13} {'metric':13} {'median':>11} {'min':>11} {'max':>11}  n"
    ]
    lines += [
        f"{one.workload:11} {one.system:13} {one.metric:13} {one.median:11.4g} {one.min:11.4g} "
        f"{one.max:11.4g}  {one.repeats}  {one.unit}"
        for one in rows
    ]
    lines += [
        f"{'holds ' if one.holds else 'BROKEN'} {one.name}: {one.value:.4g} "
        f"({one.min:.4g} to {one.max:.4g}), bound {one.bound:.4g}"
        for one in checks
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
