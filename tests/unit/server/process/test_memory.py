from __future__ import annotations

import gc

import pytest

from server.process.memory import loading, objects_frozen


def test_what_a_program_had_excluded_from_collection_stays_so() -> None:
    excluded: list[object] = []
    gc.freeze()
    with objects_frozen():
        assert not any(one is excluded for one in gc.get_objects())
    assert not any(one is excluded for one in gc.get_objects())


def test_what_was_collected_before_is_collected_afterwards() -> None:
    gc.unfreeze()
    try:
        with objects_frozen():
            assert gc.get_freeze_count() > 0
        assert gc.get_freeze_count() == 0
    finally:
        gc.freeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_loading_leaves_garbage_collection_as_a_program_had_it(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with loading():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
