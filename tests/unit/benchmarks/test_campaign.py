"""What the benchmark promises, over figures made up for the purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.campaign import PROMISED, checks_of, compare_peers, growth_bytes
from benchmarks.figures import Run
from benchmarks.measure import Observed, ProgramFailed
from benchmarks.systems import FEDCORE, Measured, run_of, seconds_per_round
from benchmarks.workloads import read_workload


def run(system: str, workload: str, seconds: float, *, repeat: int = 0) -> Run:
    return Run(
        system=system,
        workload=workload,
        repeat=repeat,
        seconds_per_round=seconds,
        clients_per_s=1 / seconds,
        start_up_s=1.0,
        peak_bytes=1,
        bytes_per_round=None,
        accuracy=0.9,
        epsilon=None,
        epsilon_max=None,
    )


def measured(ends_s: list[float], memory: list[tuple[float, int]]) -> Measured:
    return Measured(
        observed=Observed(launched_s=0.0, lines=(), memory=tuple(memory)),
        ends_s=tuple(ends_s),
        accuracy=0.8,
        bytes_per_round=7,
        epsilon=None,
        epsilon_max=None,
        chosen="",
    )


@pytest.mark.parametrize(("workload", "peer", "bound"), PROMISED)
def test_each_promise_is_checked_at_its_bound(workload: str, peer: object, bound: float) -> None:
    name = peer.name  # type: ignore[attr-defined]
    (kept,) = checks_of([run("fedcore", workload, 1.0), run(name, workload, bound * 1.01)])
    (broken,) = checks_of([run("fedcore", workload, 1.0), run(name, workload, bound * 0.99)])
    assert kept.holds
    assert not broken.holds
    assert kept.bound == bound
    assert name in kept.name


def test_nothing_is_promised_of_what_was_not_run() -> None:
    assert checks_of([run("fedcore", "w2", 1.0), run("bare", "w2", 2.0)]) == []


def test_accuracy_below_flowers_breaks_a_check() -> None:
    ours = [replace(run("fedcore", "w2", 1.0, repeat=i), accuracy=0.5) for i in range(2)]
    theirs = [replace(run("flower", "w2", 99.0, repeat=i), accuracy=0.9 + i / 100) for i in (0, 1)]
    (check,) = [check for check in checks_of(ours + theirs) if "accuracy" in check.name]
    assert not check.holds


@pytest.mark.parametrize(("theirs", "holds"), [(2.5, True), (2.62, True), (2.64, False)])
def test_private_runs_spend_the_same(theirs: float, holds: bool) -> None:
    runs = [
        replace(run("fedcore", "w2_dp", 1.0), epsilon=2.5),
        replace(run("opacus", "w2_dp", 9.0), epsilon=theirs),
    ]
    (check,) = [check for check in checks_of(runs) if "epsilon" in check.name]
    assert check.holds is holds


def test_peers_that_differ_from_the_reference_need_a_reason() -> None:
    like = [run("fedjax", "w2", 0.0099), run("pfl", "w2", 0.0202)]
    (found,) = compare_peers(like)
    assert found["deviation"] == pytest.approx(0)
    assert found["reason"] == ""
    (slower,) = compare_peers([run("fedjax", "w2", 0.0099), run("pfl", "w2", 0.0303)])
    assert slower["deviation"] == pytest.approx(0.5)
    assert "not explained" in str(slower["reason"])


def test_a_round_is_timed_after_the_warm_up() -> None:
    assert seconds_per_round([9.0, 10.0, 10.5, 11.0], 2) == 0.5


def test_a_run_takes_accuracy_and_speed_from_where_they_were_measured() -> None:
    short = measured([3.0, 4.0], [(1.0, 100)])
    long = replace(measured([3.0, 4.0, 4.5, 5.0], [(1.0, 50), (4.8, 60), (6.0, 99)]), accuracy=0.1)
    found = run_of(FEDCORE, read_workload("w2"), 0, accurate=short, timed=long, warmup=2)
    assert found.accuracy == 0.8
    assert found.start_up_s == 3.0
    assert found.seconds_per_round == 0.5
    assert found.clients_per_s == 20.0  # ten clients a round
    assert found.peak_bytes == 60  # what came after the last round is not training


def test_growth_is_that_of_the_rounds_after_the_warm_up() -> None:
    ends = [1.0, 2.0, 3.0, 4.0]
    memory = [(0.5, 5), (2.0, 100), (3.0, 110), (4.0, 120), (9.0, 900)]
    assert growth_bytes(measured(ends, memory), 2) == pytest.approx(20)
    with pytest.raises(ProgramFailed, match="too few"):
        growth_bytes(measured(ends, [(2.5, 1)]), 2)
