from __future__ import annotations

import math
import random
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config.simulated import DeviceClass
from fedcore.errors import DataError
from server.simulation.virtual.devices import (
    SILENCE_S,
    Fate,
    VirtualFleet,
    class_of,
    device_of,
    fate,
    resolve_round,
)
from server.simulation.virtual.trace import COLUMNS, read_trace, window_at

SEEDS = st.integers(0, 2**63 - 1)
RATES = st.floats(1e-6, 1e12)
CLASSES = st.lists(
    st.builds(
        DeviceClass,
        name=st.just("x"),
        share=RATES,
        examples_per_s=RATES,
        speed_spread=st.floats(0, 3),
        download_mbit_s=RATES,
        upload_mbit_s=RATES,
        bandwidth_spread=st.floats(0, 3),
        latency_s=st.floats(0, 86_400),
        availability=st.floats(0, 1, exclude_min=True),
        dropout=st.floats(0, 1, exclude_max=True),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
FLEETS = st.builds(VirtualFleet, SEEDS, CLASSES)
COHORTS = st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=12)
DEADLINES = st.floats(1e-3, 1e9) | st.just(math.inf)


def meet(
    fleet: VirtualFleet, client: str, number: int = 1, *, examples: int = 60, megabytes: float = 1.0
) -> Fate:
    size = int(megabytes * 1e6)
    return fate(
        fleet,
        client,
        number,
        clock_s=0.0,
        examples=examples,
        epochs=1,
        bytes_down=size,
        bytes_up=size,
    )


@given(FLEETS, COHORTS, st.integers(1, 100))
def test_fates_are_finite_in_order_and_the_same_again(
    fleet: VirtualFleet, cohort: list[str], number: int
) -> None:
    for client in cohort:
        one = meet(fleet, client, number)
        assert one == meet(fleet, client, number)
        assert 0 <= one.start_s <= one.trained_s <= one.finish_s < math.inf
        assert (one.outcome == "done") == (one.lost_s == math.inf)
        if one.outcome == "dropped":
            assert 0 <= one.lost_s <= one.finish_s


@given(FLEETS, COHORTS, DEADLINES, st.randoms())
def test_a_round_does_not_depend_on_the_order_of_its_cohort(
    fleet: VirtualFleet, cohort: list[str], deadline_s: float, order: random.Random
) -> None:
    shuffled = list(cohort)
    order.shuffle(shuffled)
    one = resolve_round([meet(fleet, client) for client in cohort], deadline_s=deadline_s)
    other = resolve_round([meet(fleet, client) for client in shuffled], deadline_s=deadline_s)
    assert one.record == other.record
    assert set(one.finishers) == set(other.finishers)
    assert set(one.wasted_clients) == set(other.wasted_clients)


@given(FLEETS, COHORTS, DEADLINES)
def test_everyone_is_accounted_for(
    fleet: VirtualFleet, cohort: list[str], deadline_s: float
) -> None:
    fates = [meet(fleet, client) for client in cohort]
    ended = resolve_round(fates, deadline_s=deadline_s)
    record = ended.record
    missing = record.unavailable + record.dropped + record.stragglers
    assert len(ended.finishers) + missing == len(cohort)
    assert not set(ended.finishers) & set(ended.wasted_clients)
    assert 0 <= record.simulated_s <= deadline_s
    assert record.bytes_wasted <= record.bytes_down + record.bytes_up
    if missing == 0:
        assert record.bytes_wasted == 0
        assert record.simulated_s == max(one.finish_s for one in fates)


@given(FLEETS, COHORTS)
def test_without_a_deadline_there_are_no_stragglers_and_every_round_ends(
    fleet: VirtualFleet, cohort: list[str]
) -> None:
    fates = [meet(fleet, client) for client in cohort]
    ended = resolve_round(fates, deadline_s=math.inf)
    assert ended.record.stragglers == 0
    assert ended.record.simulated_s <= max(one.finish_s for one in fates) + SILENCE_S


@given(FLEETS, COHORTS, st.floats(1e-3, 1e6), st.floats(1, 100))
def test_a_longer_deadline_loses_nobody(
    fleet: VirtualFleet, cohort: list[str], deadline_s: float, factor: float
) -> None:
    fates = [meet(fleet, client) for client in cohort]
    short = resolve_round(fates, deadline_s=deadline_s)
    long = resolve_round(fates, deadline_s=deadline_s * factor)
    assert set(short.finishers) <= set(long.finishers)
    assert short.record.simulated_s <= long.record.simulated_s


@given(
    FLEETS,
    st.text(max_size=8),
    st.sampled_from(["examples_per_s", "download_mbit_s", "upload_mbit_s"]),
    st.floats(1e-3, 1),
)
def test_a_slower_device_never_finishes_earlier(
    fleet: VirtualFleet, client: str, what: str, factor: float
) -> None:
    slower = [
        kind.model_copy(update={what: getattr(kind, what) * factor}) for kind in fleet.classes
    ]
    fast, slow = meet(fleet, client), meet(VirtualFleet(fleet.seed, tuple(slower)), client)
    assert slow.outcome == fast.outcome
    assert slow.finish_s >= fast.finish_s


@given(FLEETS, st.text(max_size=8), st.integers(1, 10**6), st.floats(0, 1e3))
def test_more_work_and_more_bytes_never_take_less(
    fleet: VirtualFleet, client: str, more: int, megabytes: float
) -> None:
    little = meet(fleet, client)
    assert meet(fleet, client, examples=60 + more).finish_s >= little.finish_s
    assert meet(fleet, client, megabytes=1.0 + megabytes).finish_s >= little.finish_s


# Statistics: one fixed seed and 4,000 clients. A right implementation fails a bound of five
# standard deviations for about one seed in 1.7 million.
CLIENTS = [f"client-{number}" for number in range(4000)]
MIXED = VirtualFleet(
    20_26,
    (
        DeviceClass(
            name="phone",
            share=3.0,
            examples_per_s=200.0,
            speed_spread=0.5,
            bandwidth_spread=1.0,
            availability=0.7,
            dropout=0.2,
        ),
        DeviceClass(name="gateway", share=1.0, examples_per_s=2000.0, availability=0.7),
    ),
)


def within_five_deviations(count: int, total: int, probability: float) -> bool:
    deviation = math.sqrt(total * probability * (1 - probability))
    return abs(count - total * probability) < 5 * deviation


def test_classes_have_their_shares() -> None:
    phones = sum(class_of(MIXED, client).name == "phone" for client in CLIENTS)
    assert within_five_deviations(phones, len(CLIENTS), 0.75)


def test_clients_are_reached_and_lost_as_often_as_their_classes_say() -> None:
    fates = [meet(MIXED, client, number) for number in (1, 2) for client in CLIENTS]
    reached = [one for one in fates if one.outcome != "unavailable"]
    assert within_five_deviations(len(reached), len(fates), 0.7)
    phones = [one for one in reached if class_of(MIXED, one.client).name == "phone"]
    dropped = [one for one in phones if one.outcome == "dropped"]
    assert within_five_deviations(len(dropped), len(phones), 0.2)
    early = sum(one.lost_s < one.finish_s / 2 for one in dropped)
    assert within_five_deviations(early, len(dropped), 0.5)
    gateways = [one for one in reached if class_of(MIXED, one.client).name == "gateway"]
    assert {one.outcome for one in gateways} == {"done"}


def test_rounds_and_clients_are_reached_independently() -> None:
    reached = np.array(
        [
            [meet(MIXED, client, number).outcome != "unavailable" for client in CLIENTS]
            for number in (1, 2)
        ]
    )
    assert within_five_deviations(int(reached.all(axis=0).sum()), len(CLIENTS), 0.7**2)
    neighbours = reached[0, ::2] & reached[0, 1::2]
    assert within_five_deviations(int(neighbours.sum()), len(CLIENTS) // 2, 0.7**2)


def test_speeds_are_log_normal_about_their_median_and_independent_of_bandwidth() -> None:
    phones = [client for client in CLIENTS if class_of(MIXED, client).name == "phone"]
    devices = [device_of(MIXED, client) for client in phones]
    speed = np.log([device.examples_per_s / 200.0 for device in devices]) / 0.5
    bandwidth = np.log([device.download_mbit_s / 50.0 for device in devices]) / 1.0
    count = len(phones)
    for normal in (speed, bandwidth):
        assert within_five_deviations(int((normal < 0).sum()), count, 0.5)
        assert within_five_deviations(int((normal < -1).sum()), count, 0.158655)
        assert within_five_deviations(int((normal < 2).sum()), count, 0.977250)
        assert abs(float(normal.std()) - 1) < 5 / math.sqrt(2 * count)
    assert abs(float(np.corrcoef(speed, bandwidth)[0, 1])) < 5 / math.sqrt(count)


VALUES = st.one_of(
    st.floats().map(repr), st.integers(-2, 99).map(str), st.text(max_size=5), st.just("")
)


@given(st.lists(st.lists(VALUES, min_size=4, max_size=7).map(",".join), max_size=6))
def test_no_rows_end_in_anything_but_a_trace_or_a_data_error(rows: list[str]) -> None:
    text = "\n".join([",".join(COLUMNS), *(f"c{row}" for row in rows)])
    assert_read_or_refused(text.encode(errors="surrogatepass"))


@given(st.binary(max_size=200))
def test_no_bytes_end_in_anything_but_a_data_error(raw: bytes) -> None:
    assert_read_or_refused(raw)


def assert_read_or_refused(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "devices.csv"
        path.write_bytes(raw)
        refusal = None
        try:
            trace = read_trace(path)
        except DataError as error:
            refusal = str(error)
    assert "Nothing was simulated" in refusal if refusal else trace.numbers


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 30), st.integers(1, 9)),
        min_size=1,
        max_size=12,
    )
)
def test_a_trace_agrees_with_looking_at_every_row(rows: list[tuple[str, int, int]]) -> None:
    overlaps = any(
        one[0] == other[0] and one[1] < other[1] + other[2] and other[1] < one[1] + one[2]
        for place, one in enumerate(rows)
        for other in rows[:place]
    )
    lines = [f"{name},1,1,1,{start},{start + length}" for name, start, length in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "devices.csv"
        path.write_text("\n".join([",".join(COLUMNS), *lines]))
        try:
            trace = read_trace(path)
        except DataError:
            assert overlaps
            return
    assert not overlaps
    for name in trace.numbers:
        for clock_s in range(40):
            inside = any(
                client == name and start <= clock_s < start + length
                for client, start, length in rows
            )
            assert (window_at(trace, name, clock_s) is not None) == inside
