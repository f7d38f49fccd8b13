from __future__ import annotations

from dataclasses import replace

from server.records import RunRecord
from server.report.choice import why_chosen


def test_the_choice_is_one_sentence_with_what_it_gains(record: RunRecord) -> None:
    assert why_chosen(record.candidates, record.chosen, primary="accuracy") == (
        "int8_static (64 kB, 9.00 us) is the smallest of the 2 that keep every limit, of 3 "
        "candidates, with 29% of the bytes and 82% of the time of fp32, and accuracy 0.9550 after "
        "0.9600 on held-out data."
    )


def test_smaller_ones_are_named_with_the_limits_that_they_miss(record: RunRecord) -> None:
    fp32, int8, pruned = record.candidates
    slow = replace(int8, admitted=False, missed=("max_slowdown",))
    small = replace(pruned, bytes=1, missed=("max_accuracy_drop", "min_agreement"))
    assert why_chosen((fp32, slow, small), "fp32", primary="accuracy") == (
        "fp32 (218 kB, 11.0 us) is the only one of 3 candidates that keeps every limit; smaller "
        "ones were refused: pruned misses max_accuracy_drop and min_agreement, int8_static misses "
        "max_slowdown."
    )
    many = tuple(replace(small, name=f"c{number}", missed=()) for number in range(6))
    said = why_chosen((fp32, *many), "fp32", primary="accuracy")
    assert said is not None
    assert said.endswith("c3 misses a limit, 2 more miss others.")


def test_one_that_could_not_be_built_does_not_count(record: RunRecord) -> None:
    fp32, int8, _ = record.candidates
    unbuilt = replace(int8, bytes=0, admitted=False)
    said = why_chosen((fp32, unbuilt), "fp32", primary="accuracy")
    assert said == "fp32 (218 kB, 11.0 us) is the only candidate that was built."


def test_without_a_choice_there_is_nothing_to_explain(record: RunRecord) -> None:
    assert why_chosen(record.candidates, None, primary="accuracy") is None
    assert why_chosen((), "fp32", primary="accuracy") is None
