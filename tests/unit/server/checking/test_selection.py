from __future__ import annotations

import pytest

from fedcore.errors import ConfigError
from server.checking.selection import Asked, asked_of, chosen_places

NAMES = [f"c{number}" for number in range(50)]


@pytest.mark.parametrize(
    ("text", "asked"),
    [("all", "all"), ("12", 12), ("anna", ["anna"]), ("anna,ben", ["anna", "ben"]), ("7,", ["7"])],
)
def test_the_option_is_all_a_number_or_names(text: str, asked: Asked) -> None:
    assert asked_of(text) == asked


def test_the_first_client_is_always_chosen_and_others_by_the_seed() -> None:
    chosen = chosen_places(NAMES, None, seed=1)
    assert (len(set(chosen)), chosen[0]) == (6, 0)
    assert chosen == chosen_places(NAMES, None, seed=1) != chosen_places(NAMES, None, seed=2)
    assert chosen_places(NAMES, 99, seed=1) == chosen_places(NAMES, "all", seed=1)
    assert chosen_places(["only"], None, seed=1) == [0]


def test_names_are_found_and_unknown_ones_refused() -> None:
    assert chosen_places(NAMES, ["c7", "c3", "c7"], seed=0) == [7, 3]
    assert chosen_places(NAMES, "c7", seed=0) == [7]
    for asked in (["c7", "carl"], [], 0, -1):
        with pytest.raises(ConfigError):
            chosen_places(NAMES, asked, seed=0)
