"""Rows, ratios and checks against figures computed by hand."""

from __future__ import annotations

import pytest

from benchmarks.figures import Run, at_least, at_most, no_less_accurate, ratios, rows_of, slope


def run(system: str, repeat: int, seconds: float, *, bytes_per_round: int | None = None) -> Run:
    return Run(
        system=system,
        workload="w",
        repeat=repeat,
        seconds_per_round=seconds,
        clients_per_s=10 / seconds,
        start_up_s=1.0,
        peak_bytes=100 + repeat,
        bytes_per_round=bytes_per_round,
        accuracy=0.9,
        epsilon=None,
        epsilon_max=None,
    )


def test_ratios_pair_runs_of_one_repeat() -> None:
    runs = [run("a", 0, 4.0), run("b", 0, 2.0), run("a", 1, 9.0), run("b", 1, 3.0)]
    assert ratios(runs, "w", "a", "b") == [2.0, 3.0]


def test_ratios_leave_out_a_repeat_that_only_one_system_reached() -> None:
    runs = [run("a", 0, 4.0), run("b", 0, 2.0), run("a", 1, 9.0), run("b", 2, 1.0)]
    assert ratios(runs, "w", "a", "b") == [2.0]


def test_ratios_keep_to_their_workload() -> None:
    assert ratios([run("a", 0, 4.0), run("b", 0, 2.0)], "other", "a", "b") == []


def test_rows_give_median_and_range() -> None:
    runs = [run("a", 0, 4.0), run("a", 1, 1.0), run("a", 2, 2.0)]
    (row,) = [row for row in rows_of(runs) if row.metric == "seconds_per_round"]
    assert (row.median, row.min, row.max, row.repeats) == (2.0, 1.0, 4.0, 3)
    assert (row.system, row.workload, row.unit) == ("a", "w", "s")


def test_rows_leave_out_what_is_not_known() -> None:
    metrics = [row.metric for row in rows_of([run("a", 0, 4.0)])]
    assert "bytes_per_round" not in metrics
    assert "epsilon" not in metrics
    with_bytes = rows_of([run("a", 0, 4.0, bytes_per_round=7)])
    assert [row.median for row in with_bytes if row.metric == "bytes_per_round"] == [7]


def test_checks_judge_the_median() -> None:
    check = at_least("x", [1.0, 5.0, 9.0], 5.0)
    assert (check.value, check.min, check.max, check.holds) == (5.0, 1.0, 9.0, True)
    assert not at_least("x", [1.0, 4.9, 9.0], 5.0).holds
    assert at_most("x", [1.0, 5.0, 9.0], 5.0).holds
    assert not at_most("x", [1.0, 5.1, 9.0], 5.0).holds


def test_accuracy_is_judged_in_the_peers_standard_deviations() -> None:
    theirs = [0.8, 0.9, 1.0]  # mean 0.9, standard deviation 0.1
    assert no_less_accurate("x", [0.85, 0.85], theirs).value == pytest.approx(-0.5)
    assert no_less_accurate("x", [0.85, 0.85], theirs).holds
    assert not no_less_accurate("x", [0.75, 0.79], theirs).holds
    assert no_less_accurate("x", [0.99, 0.99], theirs).holds  # better is never worse


def test_accuracy_without_spread_still_gives_a_finite_value() -> None:
    assert no_less_accurate("x", [0.9, 0.9], [0.9, 0.9]).value == 0
    worse = no_less_accurate("x", [0.8, 0.8], [0.9, 0.9])
    assert not worse.holds
    assert worse.value == -1e9


def test_slope_of_a_line() -> None:
    assert slope([0.0, 1.0, 2.0], [5.0, 8.0, 11.0]) == pytest.approx(3.0)
