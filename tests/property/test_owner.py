from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import Privacy, RunConfig

EPSILONS = st.floats(0.01, 1e6)
DELTAS = st.floats(1e-12, 1, exclude_max=True)
POLICIES = st.builds(
    OwnerPolicy,
    max_epsilon=st.none() | EPSILONS,
    target_delta=st.none() | DELTAS,
    max_threads=st.none() | st.integers(1, 64),
    device=st.none() | st.sampled_from(["auto", "cpu", "cuda", "mps"]),
)
RUNS = st.builds(
    RunConfig,
    name=st.just("x"),
    task=st.just("t.py"),
    privacy=st.builds(Privacy, unit=st.just("example"), max_epsilon=EPSILONS, target_delta=DELTAS),
)


@given(RUNS, POLICIES)
def test_tightening_never_loosens_either_side(run: RunConfig, owner: OwnerPolicy) -> None:
    privacy = tighten(run, owner).privacy
    assert privacy.max_epsilon <= run.privacy.max_epsilon
    assert privacy.target_delta <= run.privacy.target_delta
    if owner.max_epsilon is not None:
        assert privacy.max_epsilon <= owner.max_epsilon
    if owner.target_delta is not None:
        assert privacy.target_delta <= owner.target_delta


@given(RUNS, POLICIES)
def test_tightening_touches_nothing_else_and_twice_is_once(
    run: RunConfig, owner: OwnerPolicy
) -> None:
    once = tighten(run, owner)
    assert tighten(once, owner) == once
    kept = {"privacy": run.privacy, "client": run.client}
    assert once.model_copy(update=kept) == run
    untouched = {"max_epsilon": run.privacy.max_epsilon, "target_delta": run.privacy.target_delta}
    assert once.privacy.model_copy(update=untouched) == run.privacy


@given(RUNS, POLICIES, POLICIES)
def test_the_order_of_two_owners_makes_no_difference_to_the_budget(
    run: RunConfig, one: OwnerPolicy, other: OwnerPolicy
) -> None:
    there = tighten(tighten(run, one), other).privacy
    assert there == tighten(tighten(run, other), one).privacy
