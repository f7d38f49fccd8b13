"""What the simulation benchmark measures, in which order, and what it promises."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.figures import (
    Check,
    Row,
    Run,
    at_least,
    at_most,
    no_less_accurate,
    ratios,
    row,
    slope,
)
from benchmarks.measure import ProgramFailed
from benchmarks.systems import (
    BARE,
    FEDCORE,
    FEDJAX,
    FLOWER,
    FLOWER_STOCK,
    OPACUS,
    PFL,
    PFL_STOCK,
    Measured,
    Place,
    System,
    measure,
    run_of,
    seconds_per_round,
)
from benchmarks.workloads import Workload, read_workload

MB = 1_000_000
_TIMED_S = 2.0
_LONGER_S = 4.0
_LONGEST = 20
"""A run whose timed rounds took less than `_TIMED_S` is repeated over as many rounds as take
`_LONGER_S`, at most so many times the workload's: hiccups of the machine must not decide."""


@dataclass(frozen=True)
class Plan:
    """How a workload is measured."""

    workload: str
    warmup: int
    """Rounds before the clock starts: compiling, filling caches, choosing how to train."""
    repeats: int
    systems: tuple[System, ...]


PLANS = (
    Plan("w2", 10, 5, (FEDCORE, BARE, FEDJAX, PFL, FLOWER)),
    Plan("w1", 2, 5, (FEDCORE, BARE, FEDJAX, PFL, PFL_STOCK, FLOWER, FLOWER_STOCK)),
    Plan("w2_dp", 10, 5, (FEDCORE, OPACUS)),
    Plan("w1_dp", 2, 5, (FEDCORE, OPACUS)),
    Plan("writers", 2, 3, (FEDCORE, BARE, FEDJAX, PFL, FLOWER)),
)
MILLION = "million"
_MILLION_WARMUP = 50
_MILLION_PEAK_BYTES = 1500 * MB
_MILLION_GROWTH_BYTES = 16 * MB

PROMISED = (
    ("w2", FLOWER, 60.0),
    ("w2", PFL, 4.0),
    ("w2", FEDJAX, 2.0),
    ("w1", FLOWER, 9.0),
    ("w1", PFL, 2.5),
    ("w1", FEDJAX, 2.5),
    ("w2_dp", OPACUS, 8.0),
    ("w1_dp", OPACUS, 1.5),
)
"""fedcore is to be so many times as fast."""

REFERENCE_S = {
    "w2": {"flower": 0.373, "pfl": 0.0202, "fedjax": 0.0099, "bare": 0.0275},
    "w1": {"flower": 3.89, "pfl": 1.05, "fedjax": 1.08, "bare": 0.365},
}
"""Seconds a round measured earlier on a machine of this kind. Ratios between peers are compared
with theirs, so that no peer is run at less than its best unnoticed."""
_MAX_DEVIATION = 0.15
_REASONS = {
    ("w2", "flower"): "Flower's actors keep data and model between messages here; the reference's "
    "loaded them for each.",
    (
        "w2",
        "bare",
    ): "The bare loop adds clients' weights up by torch's functions for lists of tensors "
    "here, and is quicker than the reference's.",
    ("w1", "pfl"): "pfl trains in the channels-last format here, where that is quicker; the "
    "reference did not. pfl-stock is run as the reference was.",
    ("w1", "flower"): "The reference's 3.89 s could not be had again, with flower-stock (usual "
    "memory format, nothing kept between messages) neither; pfl-stock and FedJAX can.",
    ("w1", "bare"): "The reference's 0.33 to 0.40 s in the channels-last format could not be had "
    "again; what it took in the usual format can.",
}


@dataclass(frozen=True)
class Outcome:
    """What a campaign came to."""

    runs: tuple[Run, ...]
    extra_rows: tuple[Row, ...]
    extra_checks: tuple[Check, ...]
    chosen: tuple[tuple[str, str, str], ...]
    """System, workload, and what it said of its options, each once."""
    failures: tuple[str, ...]


def run_plan(plan: Plan, place: Place, *, repeats: int, longer: bool) -> Outcome:
    """Runs every system of a plan in turn, again and again.

    A system that fails is left out from then on, and its failure is told.
    """
    workload = read_workload(plan.workload)
    runs: list[Run] = []
    chosen: dict[tuple[str, str, str], None] = {}
    failures: dict[System, str] = {}
    for repeat in range(repeats):
        for system in plan.systems:
            if system in failures:
                continue
            try:
                run, said = _run(system, workload, repeat, plan.warmup, place, longer=longer)
            except ProgramFailed as error:
                failures[system] = str(error)
                print(f"FAILED: {error}", file=sys.stderr, flush=True)
                continue
            runs.append(run)
            chosen[system.name, workload.name, said] = None
            print(
                f"{workload.name} {repeat + 1}/{repeats} {system.name}: "
                f"{run.seconds_per_round:.5g} s a round, accuracy {run.accuracy:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return Outcome(tuple(runs), (), (), tuple(chosen), tuple(failures.values()))


def _run(
    system: System, workload: Workload, repeat: int, warmup: int, place: Place, *, longer: bool
) -> tuple[Run, str]:
    rounds, seed = workload.rounds, repeat + 1
    accurate = timed = measure(system, workload, rounds=rounds, seed=seed, place=place)
    took = seconds_per_round(accurate.ends_s, warmup)
    if longer and took * (rounds - warmup) < _TIMED_S:
        more = min(warmup + math.ceil(_LONGER_S / took), _LONGEST * rounds)
        timed = measure(system, workload, rounds=more, seed=seed, place=place)
    run = run_of(system, workload, repeat, accurate=accurate, timed=timed, warmup=warmup)
    return run, accurate.chosen


def run_million(place: Place) -> Outcome:
    """A million registered clients: memory at its peak, and whether it grows with the rounds."""
    workload = read_workload(MILLION)
    try:
        measured = measure(FEDCORE, workload, rounds=workload.rounds, seed=1, place=place)
    except ProgramFailed as error:
        print(f"FAILED: {error}", file=sys.stderr, flush=True)
        return Outcome((), (), (), (), (str(error),))
    run = run_of(FEDCORE, workload, 0, accurate=measured, timed=measured, warmup=_MILLION_WARMUP)
    whole = measured.observed.peak_bytes()
    growth = growth_bytes(measured, _MILLION_WARMUP)
    rows = (
        row(FEDCORE.name, MILLION, "peak_bytes_whole_run", "bytes", [whole]),
        row(FEDCORE.name, MILLION, "growth_bytes", "bytes", [growth]),
    )
    checks = (
        at_most("million: peak memory of the whole run, bytes", [whole], _MILLION_PEAK_BYTES),
        at_most(
            f"million: growth of memory from round {_MILLION_WARMUP} to {workload.rounds}, bytes",
            [growth],
            _MILLION_GROWTH_BYTES,
        ),
    )
    return Outcome((run,), rows, checks, ((FEDCORE.name, MILLION, measured.chosen),), ())


def growth_bytes(measured: Measured, warmup: int) -> float:
    """How much memory grew over the rounds after the first ``warmup``, by a fitted line."""
    begin, end = measured.ends_s[warmup - 1], measured.ends_s[-1]
    samples = [(when, size) for when, size in measured.observed.memory if begin <= when <= end]
    if len(samples) < 2:
        raise ProgramFailed(
            f"memory was sampled {len(samples)} times in {end - begin:.2f} s of rounds: too few to "
            "say whether it grows. Ask for more rounds."
        )
    return slope([when for when, _ in samples], [size for _, size in samples]) * (end - begin)


def checks_of(runs: Sequence[Run]) -> list[Check]:
    """Every promise that the runs can speak to."""
    checks = []
    for workload, peer, bound in PROMISED:
        found = ratios(runs, workload, peer.name, FEDCORE.name)
        if found:
            name = f"{workload}: clients a second, fedcore over {peer.name}"
            checks.append(at_least(name, found, bound))
    for workload in dict.fromkeys(run.workload for run in runs):
        ours, theirs = (
            [run for run in runs if (run.workload, run.system) == (workload, system.name)]
            for system in (FEDCORE, FLOWER)
        )
        if min(len(ours), len(theirs)) > 1:
            checks.append(
                no_less_accurate(
                    f"{workload}: mean accuracy less Flower's, in Flower's standard deviations",
                    [run.accuracy for run in ours],
                    [run.accuracy for run in theirs],
                )
            )
        checks += _same_epsilon(runs, workload)
    return checks


def _same_epsilon(runs: Sequence[Run], workload: str) -> list[Check]:
    spent = {
        run.system: run.epsilon
        for run in runs
        if run.workload == workload and run.epsilon is not None
    }
    if not {FEDCORE.name, OPACUS.name} <= spent.keys():
        return []
    gap = abs(spent[FEDCORE.name] / spent[OPACUS.name] - 1)
    name = f"{workload}: epsilon of one participation, relative gap to the Opacus loop's"
    # Mechanisms are the same; fedcore counts a budget as a filter, so a little above Opacus.
    return [at_most(name, [gap], 0.05)]


def compare_peers(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Ratios between peers beside those of the reference, with the reason where they differ."""
    found: list[dict[str, object]] = []
    for workload, seconds in REFERENCE_S.items():
        for peer in seconds:
            measured = ratios(runs, workload, peer, FEDJAX.name)
            if peer == FEDJAX.name or not measured:
                continue
            ratio = sorted(measured)[len(measured) // 2]
            reference = seconds[peer] / seconds[FEDJAX.name]
            differs = abs(ratio / reference - 1) > _MAX_DEVIATION
            unexplained = "not explained: measure again with nothing else running"
            found.append(
                {
                    "workload": workload,
                    "ratio": f"{peer} over {FEDJAX.name}",
                    "measured": ratio,
                    "reference": reference,
                    "deviation": ratio / reference - 1,
                    "reason": _REASONS.get((workload, peer), unexplained) if differs else "",
                }
            )
    return found
