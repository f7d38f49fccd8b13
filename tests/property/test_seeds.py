from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedcore.seeds import derive

WORDS = st.lists(st.one_of(st.text(max_size=5), st.integers(-5, 100)), max_size=4)
SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, WORDS)
def test_a_derived_seed_is_fixed_and_fits_every_library(seed: int, words: list[str | int]) -> None:
    assert derive(seed, *words) == derive(seed, *words)
    assert 0 <= derive(seed, *words) < 2**63


@given(SEEDS, WORDS, SEEDS, WORDS)
def test_streams_of_other_names_differ(
    seed: int, words: list[str | int], other_seed: int, other_words: list[str | int]
) -> None:
    same = (seed, words) == (other_seed, other_words)
    assert (derive(seed, *words) == derive(other_seed, *other_words)) == same
