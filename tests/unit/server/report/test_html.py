from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from server.records import (
    CalibrationBin,
    ClassResult,
    ClientTestRecord,
    FinalTestDetails,
    MetricSource,
    RunRecord,
    TrainingRecord,
    VirtualRecord,
)
from server.report.html import report_html
from server.report.sections import candidates_table, client_tests_table, rounds_table
from server.report.summary import summary


class Words(HTMLParser):
    """What a reader sees, and every address that the page names."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "data", "action", "srcset")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def figures_of(record: RunRecord) -> dict[str, Any]:
    return summary(
        record,
        target_delta=1e-3 if record.noise != "none" else None,
        torch_p50_us=70.0 if record.candidates else None,
        seconds=5.0,
    )


def page_of(record: RunRecord) -> str:
    return report_html(record, figures_of(record))


def read(page: str) -> Words:
    words = Words()
    words.feed(page)
    words.close()
    return words


def test_a_whole_run_shows_every_part(record: RunRecord) -> None:
    words = read(page_of(record))
    headings = ["Final test", "Rounds", "Compression", "Clients", "Lineage", "Privacy", "Time"]
    for heading in headings:
        assert heading in words.text
    assert words.tags.count("svg") == 5
    assert "refused: drops 0.06, 0.05 more than allowed" in words.text
    assert "is the smallest of the 2 that keep every limit" in words.text
    assert "1.2 times as long" in words.text  # fp32 against the released model
    assert "a note" in words.text


def test_settings_of_a_round_and_what_could_not_be_built_are_shown(record: RunRecord) -> None:
    first, *others = record.rounds
    changed = replace(first, client={"learning_rate": 0.0125})
    settings = {**record.settings, "client.learning_rate": 0.1}
    unbuilt = replace(record.candidates[1], bytes=0, sha256="", reason="refused: not built")
    rounds = rounds_table(replace(record, rounds=(changed, *others), settings=settings))
    place = rounds.headings.index("learning rate")
    assert [row[place] for row in rounds.rows] == ["0.0125", "0.1000", "0.1000"]
    candidates = candidates_table(replace(record, candidates=(record.candidates[0], unbuilt)))
    assert candidates.rows[1][candidates.headings.index("bytes")] == "-"


def test_the_page_stands_alone(record: RunRecord) -> None:
    page = page_of(record)
    words = read(page)
    assert all(address.startswith("#") for address in words.addresses)
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(words.tags)
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http://" not in without_namespaces
    assert "https://" not in without_namespaces
    assert "url(" not in page.replace("url(#", "")
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_and_notes_are_text_and_nothing_else(record: RunRecord) -> None:
    evil = '<script>alert("x")</script>'
    first, *others = record.clients
    fp32, *candidates = record.candidates
    page = page_of(
        replace(
            record,
            name=evil,
            task=evil,
            device=evil,
            primary=evil,
            scores={evil: {"released": 0.5}},
            clients=(replace(first, client=evil), *others),
            candidates=(replace(fp32, name=evil, reason=evil), *candidates),
            stages={evil: 1.0},
            notes=(evil, "$style ${body}"),
        )
    )
    assert "<script" not in page
    words = read(page)
    assert words.text.count(evil) > 8
    assert "$style ${body}" in words.text


def test_lineage_leads_from_the_data_to_the_release(record: RunRecord) -> None:
    page = page_of(record)
    links = re.findall(r"<li class=\"step[^\"]*\"><strong>(.*?)</strong>", page)
    assert links == [
        "Device data",
        "Global model of round 3",
        "Fine-tuned",
        "Candidate int8_static",
        "Release v3",
    ]
    assert f'<code title="sha256:{"ab" * 32}">abababababab</code>' in page
    assert f'<code title="sha256:{"ef" * 32}">efefefefefef</code>' in page
    assert "60 examples of 3 clients" in page


def test_a_rollback_and_a_model_that_was_not_fine_tuned_are_said(record: RunRecord) -> None:
    assert record.manifest is not None
    origin = record.manifest.lineage.model_copy(update={"finetuned": False, "rollback_of": 1})
    manifest = record.manifest.model_copy(update={"lineage": origin})
    text = read(page_of(replace(record, manifest=manifest))).text
    assert "Not fine-tuned" in text
    assert "the bytes of v1 again" in text


def test_privacy_is_stated_with_unit_epsilon_delta_and_rounds(record: RunRecord) -> None:
    text = read(page_of(record)).text
    assert "one example of one client" in text
    assert "Epsilon is at most 4.50 at delta 0.001 for every client" in text
    assert "accumulated over 3 rounds" in text


@pytest.mark.parametrize(
    ("noise", "said", "unsaid"),
    [
        ("simulated", "this run protects nobody", "its own operating system"),
        ("system", "its own operating system", "this run protects nobody"),
        ("none", "without differential privacy", "Epsilon is at most"),
    ],
)
def test_what_the_noise_is_worth_is_said(
    record: RunRecord, noise: str, said: str, unsaid: str
) -> None:
    changed = replace(record, noise=noise)
    text = read(page_of(changed)).text
    assert said in text
    assert unsaid not in text


def _public(record: RunRecord) -> RunRecord:
    return replace(
        record,
        noise="none",
        epsilon=None,
        rounds=tuple(replace(each, epsilon_max=None) for each in record.rounds),
        clients=tuple(replace(each, epsilon=None) for each in record.clients),
    )


@pytest.mark.parametrize(
    ("without", "gone", "left"),
    [
        (_public, "epsilon spent", "updates were not protected"),
        (
            lambda r: replace(r, rounds=r.rounds[:1], higher_is_better=False),
            "higher is better",
            "lower is better",
        ),
    ],
)
def test_a_page_follows_what_kind_of_run_it_was(
    record: RunRecord, without: Callable[[RunRecord], RunRecord], gone: str, left: str
) -> None:
    text = read(page_of(without(record))).text
    assert gone not in text
    assert left in text


def test_what_a_run_lacks_is_left_out(record: RunRecord) -> None:
    bare = replace(
        record,
        rounds=(),
        clients=(),
        candidates=(),
        chosen=None,
        manifest=None,
        scores={},
        stages={},
        notes=(),
    )
    words = read(page_of(bare))
    assert "svg" not in words.tags
    assert "table" not in words.tags
    for heading in ("Final test", "Rounds", "Compression", "Clients", "Time ", "Notes"):
        assert heading not in words.text
    assert "no device trained" in words.text
    assert "Not released" in words.text


def test_the_same_run_gives_the_same_page(record: RunRecord) -> None:
    assert page_of(record) == page_of(record)


def test_how_clients_were_trained_and_what_their_devices_did_is_said(record: RunRecord) -> None:
    assert "Clients were trained" not in read(page_of(record)).text
    assert "On their devices" not in read(page_of(record)).text
    virtual = VirtualRecord(60.0, 1, 2, 3, 5000, 4000, 3000)
    rounds = (record.rounds[0], *(replace(each, virtual=virtual) for each in record.rounds[1:]))
    training = TrainingRecord("vectorised", "it is <b>quicker</b>", 0.002, 0.0005, workers=2)
    words = read(page_of(replace(record, rounds=rounds, training=training)))
    told = "Clients were trained in vectorised batches by 2 workers: it is <b>quicker</b>."
    assert told in words.text
    assert "b" not in words.tags
    assert "the rounds would have taken 2 min 0 s" in words.text
    assert "2 were unreachable, 4 dropped out during a round and 6 were late" in words.text
    assert "6 kB of the 18 kB" in words.text
    assert "Rounds on devices" in words.text


@pytest.mark.parametrize("higher", [True, False])
def test_clients_whose_test_data_define_no_metric_come_last(
    record: RunRecord, higher: bool
) -> None:
    values = {"a": 0.9, "b": math.nan, "c": 0.5, "d": math.nan, "e": 0.7, "f": 0.5}
    tests = tuple(ClientTestRecord(name, 5, 1.0, value) for name, value in values.items())
    table = client_tests_table(replace(record, client_tests=tests, higher_is_better=higher))
    assert table is not None
    order = "".join(str(row[0]) for row in table.rows)
    assert order == ("cfeabd" if higher else "aecfbd")


DETAILS = FinalTestDetails(
    examples=1200,
    interval=(0.93, 0.97),
    method="Wilson",
    classes=(ClassResult("<cat>", 700, 0.9, 0.8, 0.85), ClassResult("dog", 500, 0.7, None, 0.6)),
    confusion=((560, 140), (60, 440)),
    calibration=(CalibrationBin(300, 0.6, 0.5), CalibrationBin(900, 0.95, 0.99)),
    calibration_error=0.055,
)


def test_the_final_test_is_told_with_its_interval_its_classes_and_its_calibration(
    record: RunRecord,
) -> None:
    page = page_of(replace(record, details=DETAILS))
    text = read(page).text
    assert "The test has 1,200 examples. accuracy of the released model is 0.9500" in text
    assert "between 0.9300 and 0.9700 with 95 % confidence (Wilson)" in text
    assert "Expected calibration error 0.055" in text
    assert "Which class was taken for which (2 classes)" in text
    assert "&lt;cat&gt;" in page
    assert "Accuracy by confidence" in page
    bare = read(page_of(replace(record, details=replace(DETAILS, interval=None, classes=())))).text
    assert "95 % confidence" not in bare
    assert "Which class" not in bare


def test_means_of_clients_lost_devices_loss_and_settings_are_told(record: RunRecord) -> None:
    sources = {"accuracy": MetricSource(7, 10, 3, averaged=True, reason="one class only")}
    rounds = tuple(
        replace(each, sources=sources, cohort=5, failed=1, train_loss=1 / each.round)
        for each in record.rounds
    )
    settings = {"federation.strategy": "FedAdam", "federation.cohort": None}
    page = page_of(replace(record, rounds=rounds, settings=settings))
    text = re.sub(r"\s+", " ", read(page).text)
    assert (
        "accuracy, mean of clients training loss epsilon updates declined failed no reply" in text
    )
    assert "3 of 5 0 1 1" in text  # one of five sent nothing
    assert "accuracy: 7 of 10 clients (3 undefined: one class only)." in text
    assert "Mean loss of local training by round, on the data that clients train on" in text
    assert "Settings of the run (2)" in text
    assert "federation.strategy FedAdam" in text


def test_clients_are_named_on_their_plot(record: RunRecord) -> None:
    few = page_of(record)
    assert all(f">{each.client}</text>" in few for each in record.clients)
    many = tuple(replace(record.clients[0], client=f"site-{n}", metric=n / 100) for n in range(60))
    page = page_of(replace(record, clients=many))
    assert ">site-0</text>" in page
    assert ">site-59</text>" in page
    assert ">site-7</text>" not in page


def test_what_finetune_auto_tried_is_a_table(record: RunRecord) -> None:
    def trial(settings: dict[str, Any], rate: float | None, problem: str = "") -> dict[str, Any]:
        peak = None if rate is None else 2_000_000
        return {"settings": settings, "examples_per_s": rate, "peak_bytes": peak,
                "seconds": 2.0, "problem": problem}  # fmt: skip

    trials = [
        trial({}, 100.0),
        trial({"processes": 2}, 180.0),
        trial({"processes": 2, "compile": True}, None, "<no compiler>"),
    ]
    assert "tried, for a moment each" not in report_html(record, figures_of(record))
    tried = replace(record, finetune_trials={"settings": {"processes": 2}, "trials": trials})
    page, figures = report_html(tried, figures_of(tried)), figures_of(tried)
    for text in ("as set", "processes = 2, compile = true", "&lt;no compiler&gt;", "180.0"):
        assert text in page
    assert figures["finetune"]["auto"]["settings"] == {"processes": 2}
