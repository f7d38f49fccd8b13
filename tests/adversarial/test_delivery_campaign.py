"""Short form of the delivery campaign: each attack once, and some killed updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.deliveries import ATTACKS, attack, kill_updates, quick


def test_no_attack_over_the_network_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch.setattr)
    done = attack(tmp_path, 2 * len(ATTACKS), seed=7)
    assert done.wrong == []
    assert set(done.counts) == set(ATTACKS)
    assert done.refused.total() > len(ATTACKS)


def test_an_update_that_is_killed_at_any_time_leaves_a_version(tmp_path: Path) -> None:
    done = kill_updates(tmp_path, 5, seed=7)
    assert done.wrong == []
