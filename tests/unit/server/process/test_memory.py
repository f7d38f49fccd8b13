from __future__ import annotations

import gc

from server.process.memory import objects_frozen


def test_what_a_program_had_excluded_from_collection_stays_so() -> None:
    gc.freeze()
    before = gc.get_freeze_count()
    with objects_frozen():
        assert gc.get_freeze_count() >= before
    assert gc.get_freeze_count() >= before


def test_what_was_collected_before_is_collected_afterwards() -> None:
    gc.unfreeze()
    try:
        with objects_frozen():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()
