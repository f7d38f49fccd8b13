"""What a report says of each unit that is protected, and of what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedcore.artifacts.manifest import (
    ClientStatement,
    CloudStatement,
    manifest_bytes,
    parse_manifest,
)
from server.records import RunRecord
from server.report.html import report_html
from server.report.summary import summary

STATEMENT = ClientStatement(
    epsilon=2.25,
    target_delta=1e-4,
    mechanism="gaussian",
    noise_multiplier=1.5,
    clip_norm=0.5,
    sample_rate=0.25,
    separation=None,
    clients=512,
    rounds=3,
    accountant="prv",
)


def of_clients(record: RunRecord, **changes: object) -> RunRecord:
    return replace(
        record,
        epsilon=None,
        rounds=tuple(
            replace(each, epsilon_max=None, client_epsilon=0.75 * each.round)
            for each in record.rounds
        ),
        clients=(),
        client_privacy=STATEMENT.model_copy(update=changes),
    )


def page(record: RunRecord, target_delta: float | None) -> str:
    figures = summary(record, target_delta=target_delta, torch_p50_us=None, seconds=5.0)
    return report_html(record, figures)


def test_clients_alone_are_named_as_what_is_protected(record: RunRecord) -> None:
    text = page(of_clients(record), None)
    assert "The unit that is protected is one client with all of its data" in text
    assert "one example of one client" not in text
    assert "512 clients for a round on its own, with probability 0.25" in text
    assert "Epsilon is 2.25 at delta 0.0001, accumulated over 3 rounds by PRV." in text
    assert "delta 0.0001, of each client" in text
    assert "Simulated noise." in text
    assert "client epsilon" in text


def test_without_amplification_it_says_what_is_enforced_instead(record: RunRecord) -> None:
    text = page(of_clients(record, separation=4, mechanism="matrix"), None)
    assert "no client took part twice in 4 rounds in a row" in text


def test_both_units_have_a_statement_each(record: RunRecord) -> None:
    both = replace(record, client_privacy=STATEMENT, noise="system")
    text = page(both, 1e-3)
    assert "one example of one client" in text
    assert "one client with all of its data" in text
    assert "of each client as a whole 2.25 at delta 0.0001" in text
    assert "The noise was drawn from the operating system of the machine that added it." in text


def test_the_cloud_has_a_statement_of_its_own(record: RunRecord) -> None:
    cloud = CloudStatement(
        epsilon=2.991,
        target_delta=1e-6,
        noise_multiplier=1.2,
        clip_norm=1.0,
        sample_rate=0.01,
        steps=500,
        trainings=2,
        accountant="prv",
    )
    covered = replace(record, cloud_privacy=cloud)
    text = page(covered, 1e-3)
    assert "to the power of 3.00, except with probability 1e-06, over 2 trainings" in text
    assert "Data that the cloud trained on is not covered" not in text
    assert "Data that the cloud trained on is not covered" in page(record, 1e-3)
    found = summary(covered, target_delta=None, torch_p50_us=None, seconds=1.0)["finetune"]
    assert found["privacy"] == cloud.model_dump()
    assert record.manifest is not None
    statement = record.manifest.privacy.model_copy(update={"cloud": cloud})
    signed = manifest_bytes(record.manifest.model_copy(update={"privacy": statement}))
    assert parse_manifest(signed).privacy.cloud == cloud
    assert b'"cloud"' not in manifest_bytes(record.manifest)  # older devices refuse it


@pytest.mark.parametrize("protected", [True, False])
def test_the_summary_has_the_statement(record: RunRecord, protected: bool) -> None:
    shown = of_clients(record) if protected else record
    found = summary(shown, target_delta=None, torch_p50_us=None, seconds=1.0)["client_privacy"]
    assert found == (STATEMENT.model_dump() if protected else None)
