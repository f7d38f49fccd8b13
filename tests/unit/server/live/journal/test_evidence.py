"""What the signatures in a journal prove."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedcore.errors import SignatureInvalid
from fedcore.updates.messages import ENVELOPE
from server.live.journal.evidence import Evidence, require_sound
from server.live.journal.head import (
    JOURNAL,
)
from server.live.journal.journal import create
from server.rounds.cohort import Cohort
from tests.unit.server.live.journal.journals import (
    IDENTITY,
    LARGE,
    SMALL,
    opened,
    progress,
    record,
    signed,
)
from tests.unit.server.live.journal.signed_runs import (
    MEMBERS,
    NAMES,
    NOW,
    a_run,
    asked,
    node,
    reply,
    verified,
)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_each_update_is_its_devices(tmp_path: Path, size: int) -> None:
    a_run(tmp_path, size)
    found = verified(tmp_path)
    assert found == Evidence(2, 10, 8, {"edge-0": 5, "edge-1": 3, "edge-2": 2})
    require_sound(found, where=tmp_path)


def test_signatures_outlive_a_resume_and_the_journals_file(tmp_path: Path) -> None:
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        for name in NAMES:  # the last one answers the resumed server
            if journal.reply(asked(name, 3)) is None:
                journal.accept(reply(name, 3))
        journal.commit(progress(3), record(3))
    assert verified(tmp_path).updates == 9
    (tmp_path / JOURNAL).write_bytes(b"nothing like it")
    with opened(tmp_path) as journal:
        assert "restored from its copy" in journal.repairs
    found = verified(tmp_path)
    assert (found.updates, found.signatures, found.faults) == (9, 11, ())


def test_a_reply_that_the_round_did_not_use_leaves_no_signature(tmp_path: Path) -> None:
    """The server was restarted, and its round selected others."""
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop_cohorts()
        journal.record_cohort("train", Cohort([node(NAMES[0]), node(NAMES[2])]))
        assert journal.reply(asked(NAMES[0], 3)) is not None
        journal.accept(reply(NAMES[2], 3))
        journal.commit(progress(3), replace(record(3), updates=2))
    found = verified(tmp_path)
    assert found.faults == ()
    assert found.updates == 8


def test_a_round_that_used_no_reply_leaves_no_signature(tmp_path: Path) -> None:
    """Under client-level privacy a round may end without updates."""
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        journal.drop_cohorts()
        journal.record_cohort("train", Cohort([]))
        journal.commit(progress(3), replace(record(3), updates=0))
    found = verified(tmp_path)
    assert found.faults == ()
    assert found.updates == 6


def test_what_is_refused_or_rolled_back_leaves_no_signature(tmp_path: Path) -> None:
    a_run(tmp_path)
    with opened(tmp_path) as journal:
        assert journal.reply(asked(NAMES[0], 3)) is not None
        assert journal.discard("train", node(NAMES[0]))
    assert verified(tmp_path).updates == 7
    with opened(tmp_path) as journal:
        journal.roll_back(1)
    assert verified(tmp_path) == Evidence(1, 4, 3, {"edge-0": 2, "edge-1": 1, "edge-2": 1})


def test_nothing_is_accepted_without_a_signature(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        bare = reply(NAMES[0], 1)
        del bare.content[ENVELOPE]
        with pytest.raises(SignatureInvalid, match=r"round 1: reply from node .* no verified"):
            journal.accept(bare)
        assert not journal.holds("train", node(NAMES[0]))
        assert journal.reply(asked(NAMES[0], 1)) is None


def test_another_run_and_a_key_that_nobody_had_prove_nothing(tmp_path: Path) -> None:
    a_run(tmp_path)
    assert {one.kind for one in verified(tmp_path, run_id="other").faults} == {"changed"}
    rest = {print_: one for print_, one in MEMBERS().items() if one.name != "edge-2"}
    found = verified(tmp_path, known=rest.get)
    assert [(one.kind, one.round) for one in found.faults] == [("unknown", 1), ("unknown", 2)]
    assert found.clients == {"edge-0": 5, "edge-1": 3}


def test_a_key_that_was_revoked_or_replaced_still_proves_what_it_signed(tmp_path: Path) -> None:
    a_run(tmp_path)
    later = {
        print_: replace(one, revoked_at=NOW + timedelta(hours=1), not_after=NOW)
        for print_, one in MEMBERS().items()
    }
    assert verified(tmp_path, known=later.get) == verified(tmp_path)
    before = {
        print_: replace(one, revoked_at=NOW - timedelta(minutes=2) if "1" in one.name else None)
        for print_, one in MEMBERS().items()
    }
    found = verified(tmp_path, known=before.get)
    assert found.faults == ()
    assert [line for line in found.revoked if "'edge-1' was revoked 120 s before" in line]
    assert len(found.revoked) == 3


def test_a_placeholder_is_of_no_key(tmp_path: Path) -> None:
    with closing(create(tmp_path, IDENTITY)) as journal:
        journal.accept(signed(reply(NAMES[0], 1)))
    (fault,) = verified(tmp_path).faults
    assert fault.kind == "unknown"
