from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.config.run import Compression
from fedcore.errors import CompressionError
from server.compression.choose import choose, slower_note
from server.records import CandidateRecord


def record(
    name: str = "fp32",
    *,
    drop: float = 0.0,
    size: int = 100,
    p50_us: float = 10.0,
    agreement: float = 1.0,
) -> CandidateRecord:
    return CandidateRecord(
        name=name,
        metric=0.9 - drop,
        drop=drop,
        agreement=agreement,
        max_abs_error=0.0,
        bytes=size,
        sha256="0" * 64,
        p50_us=p50_us,
        p50_min_us=p50_us,
        p50_max_us=p50_us,
        admitted=False,
        reason="",
    )


records_ = st.lists(
    st.builds(
        record,
        drop=st.floats(-0.5, 0.5),
        size=st.integers(1, 50),
        p50_us=st.floats(1, 50),
    ),
    min_size=1,
    max_size=6,
).map(lambda found: [replace(each, name=f"c{number}") for number, each in enumerate(found)])
limits_ = st.builds(
    Compression,
    max_accuracy_drop=st.floats(0, 0.5),
    max_bytes=st.none() | st.integers(1, 50),
    max_p50_us=st.none() | st.floats(1, 50),
)


def keeps(each: CandidateRecord, limits: Compression) -> bool:
    return (
        each.drop <= limits.max_accuracy_drop + 1e-9
        and each.bytes <= (limits.max_bytes or math.inf)
        and each.p50_us <= (limits.max_p50_us or math.inf)
    )


@given(records_, limits_)
def test_the_smallest_that_keeps_every_limit_wins(
    records: list[CandidateRecord], limits: Compression
) -> None:
    allowed = [each for each in records if keeps(each, limits)]
    if not allowed:
        with pytest.raises(CompressionError):
            choose(records, limits)
        return
    judged, chosen = choose(records, limits)
    assert [each.name for each in judged if each.admitted] == [each.name for each in allowed]
    assert [replace(each, admitted=False, reason="", missed=()) for each in judged] == records
    assert all(each.admitted is not bool(each.missed) for each in judged)
    best = next(each for each in allowed if each.name == chosen)
    assert best.bytes == min(each.bytes for each in allowed)
    rivals = [each for each in allowed if each.bytes == best.bytes]
    assert best.p50_us == min(each.p50_us for each in rivals)


@given(records_, limits_, st.floats(0, 0.5), st.integers(0, 50), st.floats(0, 50))
def test_wider_limits_never_choose_a_larger_one(
    records: list[CandidateRecord], limits: Compression, drop: float, size: int, time: float
) -> None:
    wider = Compression(
        max_accuracy_drop=limits.max_accuracy_drop + drop,
        max_bytes=limits.max_bytes and limits.max_bytes + size,
        max_p50_us=limits.max_p50_us and limits.max_p50_us + time,
    )
    try:
        _, tight = choose(records, limits)
    except CompressionError:
        return
    _, loose = choose(records, wider)
    of = {each.name: each for each in records}
    assert of[loose].bytes <= of[tight].bytes


def test_each_verdict_says_why() -> None:
    records = [
        record("fp32", size=400),
        record("int8_static", drop=0.031, size=90),
        record("pruned", size=200),
        record("pruned_int8", drop=0.012, size=60, p50_us=40),
    ]
    judged, chosen = choose(records, Compression(max_p50_us=30.0))
    assert chosen == "pruned"
    assert [each.reason for each in judged] == [
        "admitted: 2 times the bytes of pruned",
        "refused: drops 0.031, 0.021 more than max_accuracy_drop = 0.01",
        "chosen: the smallest that meets the limits",
        "refused: drops 0.012, 0.002 more than max_accuracy_drop = 0.01 and takes 40.0 us, "
        "10.0 more than max_p50_us = 30",
    ]
    assert judged[1].missed == ("max_accuracy_drop",)
    assert judged[3].missed == ("max_accuracy_drop", "max_p50_us")


def test_a_drop_of_exactly_the_limit_is_kept_to() -> None:
    drop = 0.90 - 0.89
    assert drop > 0.01  # as floating point has it
    judged, chosen = choose([record(size=9), record("pruned", drop=drop, size=3)], Compression())
    assert chosen == "pruned"
    assert judged[1].admitted


def test_none_left_says_what_each_missed_and_what_to_relax() -> None:
    with pytest.raises(CompressionError) as caught:
        choose([record(size=400), record("pruned", drop=0.5, size=50)], Compression(max_bytes=100))
    message = str(caught.value)
    assert "fp32: takes 400 bytes, 300 more than max_bytes = 100" in message
    assert "pruned: drops 0.5, 0.49 more than max_accuracy_drop = 0.01" in message
    assert "relax max_accuracy_drop or max_bytes," in message
    assert "max_p50_us" not in message
    assert "\n" not in message


def test_a_drop_that_is_no_number_is_refused() -> None:
    judged, chosen = choose([record(size=400), record("pruned", drop=math.nan)], Compression())
    assert chosen == "fp32"
    assert not judged[1].admitted


@pytest.mark.parametrize("drop", [0.011, math.inf, math.nan])
def test_what_clients_lose_counts_beside_what_the_cloud_does(drop: float) -> None:
    fp32, small = record(), record("pruned", drop=-0.3, size=10)
    judged, chosen = choose([fp32, replace(small, clients_drop=drop)], Compression())
    assert chosen == "fp32"
    assert "on the clients' held-out data" in judged[1].reason
    assert choose([fp32, replace(small, clients_drop=0.01)], Compression())[1] == "pruned"
    assert choose([fp32, small], Compression())[1] == "pruned"


def test_what_learnt_from_the_cloud_and_no_client_judged_is_refused() -> None:
    found = [record(), record("pruned", size=10), record("int8_static", size=20)]
    judged, chosen = choose(found, Compression(), unjudged={"pruned"})
    assert chosen == "int8_static"
    assert "devices run no file before it is signed" in judged[1].reason
    assert not judged[1].admitted
    assert choose(found, Compression())[1] == "pruned"


def test_a_drop_that_the_data_cannot_exclude_is_refused() -> None:
    small = replace(record("pruned", size=10), drop_bound=0.013, evidence="20 held-out examples")
    judged, chosen = choose([record(), small], Compression())
    assert chosen == "fp32"
    assert judged[1].reason == (
        "refused: may drop up to 0.013 at 95 % confidence, judged by 20 held-out examples, more "
        "than max_accuracy_drop = 0.01 (more held-out data narrow it: finetune.holdout)"
    )
    for bound in (None, 0.0, 0.01):
        assert choose([record(), replace(small, drop_bound=bound)], Compression())[1] == "pruned"
    unknown = replace(small, drop_bound=math.nan)
    assert choose([record(), unknown], Compression())[1] == "fp32"


def test_a_candidate_that_decides_otherwise_is_refused() -> None:
    small = record("pruned", size=10, agreement=0.48)
    judged, chosen = choose([record(), small], Compression())
    assert chosen == "fp32"
    assert "agrees with fp32 to 0.48 on the cloud's held-out data" in judged[1].reason
    assert choose([record(), small], Compression(min_agreement=0.4))[1] == "pruned"


def test_a_slower_candidate_is_chosen_only_where_a_limit_on_bytes_asks_for_it() -> None:
    found = [record(size=400), record("int8_static", size=90, p50_us=13.1)]
    judged, chosen = choose(found, Compression())
    assert chosen == "fp32"
    assert judged[1].reason == (
        "refused: takes 13.1 us, 31% longer than the 10.0 us of fp32, more than max_slowdown = "
        "0.05, and no limit on bytes asks for it"
    )
    assert slower_note(judged[0], found) == ""
    judged, chosen = choose(found, Compression(max_bytes=100))
    assert chosen == "int8_static"
    assert judged[1].reason.endswith("though it takes 13.1 us, 31% longer than the 10.0 us of fp32")
    said = "though it takes 13.1 us, 31% longer than the 10.0 us of fp32"
    assert slower_note(judged[1], found) == said
    judged, chosen = choose(found, Compression(max_slowdown=0.4))
    assert chosen == "int8_static"
    assert judged[1].reason.endswith(said)
    faster = [*found, record("pruned", size=99)]
    assert choose(faster, Compression(max_bytes=100))[1] == "pruned"
    barely = [found[0], replace(found[1], p50_us=10.4)]
    assert choose(barely, Compression())[1] == "int8_static"
