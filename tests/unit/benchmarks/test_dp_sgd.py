"""The benchmark of DP-SGD: what it makes of figures, and that all systems do the same."""

from __future__ import annotations

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.dp_sgd import Timed, checks_of, difference, made, over_plain, rows_of, table
from benchmarks.dp_sgd_models import settings
from benchmarks.dp_sgd_steps import SYSTEMS, steps_of

TIMED = [
    Timed("plain", "w1", 0, 1.0),
    Timed("fedcore", "w1", 0, 1.5),
    Timed("plain", "w1", 1, 2.0),
    Timed("fedcore", "w1", 1, 4.0),
]


def test_steps_are_compared_within_a_repeat() -> None:
    assert over_plain(TIMED, "w1", "fedcore") == [1.5, 2.0]
    ratio = next(one for one in rows_of(TIMED) if one.metric == "over_plain")
    assert (ratio.system, ratio.median, ratio.min, ratio.max) == ("fedcore", 1.75, 1.5, 2.0)


def test_what_is_promised_is_checked() -> None:
    slow, dear, large = checks_of(TIMED, {"fedcore": [0.03, 0.2], "torch": [0.01, 0.02]})
    assert (slow.value, slow.holds) == (1.75, False)
    assert dear.value == pytest.approx(6.5)
    assert not dear.holds
    assert large.value == pytest.approx((0.02 + 0.05) / 2)
    assert large.holds
    said = table(rows_of(TIMED), [slow, large])
    assert "BROKEN w1" in said
    assert "holds  noise" in said


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_takes_steps(system: str) -> None:
    setting, taken = settings()["w2"], list[object]()
    take = steps_of(system, setting, made(setting))
    counting = register_optimizer_step_post_hook(lambda *step: taken.append(step))
    try:
        take(2)
    finally:
        counting.remove()
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["w2", "gru"])
def test_sums_are_those_of_opacus(name: str) -> None:
    assert 0 < difference(settings()[name]) < 1e-5
