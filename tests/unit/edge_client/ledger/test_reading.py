"""The ledger in calls: what ``fedcore privacy show | verify | export`` does, for a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedcore
from edge_client.ledger.book import LEDGER
from fedcore.config.owner import OwnerPolicy
from fedcore.errors import ConfigError, DataError, SignatureInvalid
from tests.unit.edge_client.ledger.sites import DELTA, Site, epsilon


def test_a_ledger_is_read_plotted_exported_and_verified(site: Site, tmp_path: Path) -> None:
    before = site.files()
    ledger = fedcore.read_ledger(site.kit, owner=site.owner, accountant="rdp")
    (whole,) = ledger.totals
    assert whole.epsilon == pytest.approx(epsilon(3, 1.2, DELTA, more=20))
    assert (whole.max_epsilon, whole.left) == (8.0, pytest.approx(8.0 - whole.epsilon))
    assert {run.name: len(run.lines) for run in ledger.runs} == {"digits": 3, "wards": 20}
    files = fedcore.verify_ledger(site.kit)
    assert (files.charges, files.problems, files.behind) == (23, (), ())
    assert site.files() == before
    out = tmp_path / "export.json"
    exported = fedcore.export_ledger(site.kit, accountant="rdp", out=out)
    assert out.read_bytes() == exported.raw
    checked = fedcore.verify_ledger_export(out, kit=site.kit)
    assert (checked.ledger, checked.charges) == (exported.ledger, 23)
    unsigned = fedcore.export_ledger(state=site.state, accountant="rdp", out=out)
    assert fedcore.verify_ledger_export(out).ledger.runs == unsigned.ledger.runs
    with pytest.raises(SignatureInvalid, match="not signed"):
        fedcore.verify_ledger_export(out, kit=site.kit)


def test_a_policy_may_be_an_object(site: Site) -> None:
    policy = OwnerPolicy(max_epsilon=9.0)
    ledger = fedcore.read_ledger(site.kit, owner=policy, accountant="rdp", max_lines=2)
    assert ledger.totals[0].max_epsilon == 9.0
    assert [line.place for line in ledger.runs[1].lines] == [1, 20]


def test_damage_is_told_and_not_raised(site: Site) -> None:
    (site.state / LEDGER).write_bytes(b"{")
    ledger = fedcore.read_ledger(site.kit, accountant="rdp")
    assert ledger.problems
    assert not ledger.totals[0].whole
    assert fedcore.verify_ledger(site.kit).problems == ledger.problems


def test_a_mistake_is_a_typed_error(site: Site) -> None:
    with pytest.raises(ConfigError, match="got neither"):
        fedcore.read_ledger()
    with pytest.raises(DataError, match="no such folder"):
        fedcore.verify_ledger(state=site.root / "nosuch")
    with pytest.raises(ConfigError, match=r"plan\.nosuch"):
        fedcore.read_ledger(site.kit, accountant="rdp").plot("plan.nosuch")
