"""Chooses how onnxruntime runs a model on this machine, by a short trial, and remembers it.

A remembered choice names threads and a provider and nothing that is executed: a file that somebody
changed can make a model slower, within bounds, and nothing else.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge_client.inference.session import ACCELERATED, CPU, SessionSettings, open_session
from fedcore.errors import FedcoreError
from fedcore.files import read_bytes, write_json
from fedcore.observability.foreign import foreign

TRIAL_S = 1.0
"""Time of a trial, beside that of loading the model once for each setting."""
_WORTH_TRYING_US = 100.0
"""Models faster than this gain nothing: waking a thread takes some tens of microseconds."""
_GAIN = 0.9
"""A setting takes the place of one thread if it takes at most this share of the time."""
_MAX_BYTES = 8192
_ROUNDS = 5
_MOST_REFUSED = 8
_CPU_INFO = Path("/proc/cpuinfo")
Run = Callable[[], object]


class TunedSettings(BaseModel):
    """The settings that were measured best for a model on a machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    machine: Annotated[str, Field(max_length=400)]
    """The machine that was measured on, see `machine_name`."""
    threads: Annotated[int, Field(ge=1, le=256)]
    spinning: bool
    parallel: bool
    provider: Annotated[str, Field(max_length=64)]
    p50_us: Annotated[float, Field(ge=0)]
    """Median time of one inference in the trial."""
    refused: Annotated[
        tuple[Annotated[str, Field(max_length=300)], ...], Field(max_length=_MOST_REFUSED)
    ] = ()
    """Settings with which the model failed or answered wrongly, and why."""

    @property
    def settings(self) -> SessionSettings:
        """The settings for a session."""
        return SessionSettings(self.threads, self.spinning, self.parallel, self.provider)


def machine_name() -> str:
    """Returns what a measurement depends on: processor, cores, onnxruntime and its providers."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    providers = ",".join(onnxruntime.get_available_providers())
    processor = model or platform.machine()
    return f"{processor}, {_cores()} cores, onnxruntime {onnxruntime.__version__} {providers}"[:400]


def remembered(place: Path, onnx_sha256: str) -> TunedSettings | None:
    """Returns what was measured for a model on this machine; None if nothing valid is there.

    Args:
        place: The folder of such files.
        onnx_sha256: Digest of the model's file.
    """
    path = place / f"{onnx_sha256}.json"
    try:
        raw = read_bytes(path, max_bytes=_MAX_BYTES, what="settings")
        found = TunedSettings.model_validate_json(raw)
    except (FedcoreError, ValidationError):
        return None
    known = found.provider in (CPU, *_accelerated())
    fits = found.machine == machine_name() and found.threads <= _cores() and known
    return found if fits else None


def remember(place: Path, onnx_sha256: str, tuned: TunedSettings) -> None:
    """Writes what was measured. Does nothing where this user may not write, or the disk is full."""
    try:
        place.mkdir(exist_ok=True)
        write_json(place / f"{onnx_sha256}.json", tuned.model_dump())
    except (OSError, FedcoreError):  # a choice that is not remembered is measured again
        return


def tuned_session(
    onnx: bytes, session: Any, prepare: Callable[[Any], Run]
) -> tuple[Any, TunedSettings]:
    """Measures the settings that may be faster than one thread, and returns the best session.

    Args:
        onnx: The content of the model's file.
        session: The model, opened with one thread.
        prepare: Returns what runs one inference of a session; raises if the session does not answer
            as it should, which rules its settings out.

    Returns:
        The session, and the settings with their time.
    """
    ends_s = time.monotonic() + TRIAL_S
    best, chosen = session, SessionSettings()
    run, refused = prepare(session), list[str]()
    single_us = best_us = _p50_us(run, run)[1]
    if single_us >= _WORTH_TRYING_US:
        for settings in _candidates():
            if time.monotonic() > ends_s:
                break
            try:
                other = open_session(onnx, settings)
                ratio, other_us = _p50_us(run, prepare(other))
            except Exception as error:  # of a provider, which may raise anything
                refused.append(f"{settings.provider}, {settings.threads}: {foreign(error, 150)}")
                ratio, other_us = math.inf, math.inf
            if ratio <= _GAIN and other_us < best_us:
                best, chosen, best_us = other, settings, other_us
    tuned = TunedSettings(
        machine=machine_name(),
        threads=chosen.threads,
        spinning=chosen.spinning,
        parallel=chosen.parallel,
        provider=chosen.provider,
        p50_us=round(best_us, 2),
        refused=tuple(refused[:_MOST_REFUSED]),
    )
    return best, tuned


def _candidates() -> Iterator[SessionSettings]:
    for provider in _accelerated():
        yield SessionSettings(provider=provider)
    threads = 2
    while threads <= _cores():
        yield SessionSettings(threads=threads)
        yield SessionSettings(threads=threads, spinning=True)
        threads *= 2
    if _cores() > 1:
        yield SessionSettings(threads=_cores(), parallel=True)


def _p50_us(reference: Run, other: Run) -> tuple[float, float]:
    """Returns the time of ``other`` over that of ``reference``, and in microseconds.

    Both run in turn, so that a passing load slows both.
    """
    times: tuple[list[int], list[int]] = ([], [])
    budget_ns = TRIAL_S * 1e9 / 20
    other()
    began_ns = time.perf_counter_ns()
    while len(times[0]) < _ROUNDS or time.perf_counter_ns() - began_ns < budget_ns:
        for run, found in zip((reference, other), times, strict=True):
            start_ns = time.perf_counter_ns()
            run()
            found.append(time.perf_counter_ns() - start_ns)
    first, second = (statistics.median(found) / 1e3 for found in times)
    return second / first, second


def _accelerated() -> list[str]:
    available = onnxruntime.get_available_providers()
    return [name for name in ACCELERATED if name in available]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
