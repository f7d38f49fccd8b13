"""What accounting keeps in memory, whatever settings a server asks for."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import fedcore.privacy
from fedcore.config.run import Privacy
from fedcore.privacy import accounting
from fedcore.privacy.accounting import Charge, epsilon_of, noise_for
from fedcore.privacy.ledger import Ledger, charge, remaining_rounds
from fedcore.privacy.matrix import factor_for

MAX_BYTES = 30_000_000
"""Of all that is kept together."""


def caches() -> dict[str, Any]:
    """Everything of this package that keeps answers."""
    modules = [
        importlib.import_module(f"fedcore.privacy.{one.name}")
        for one in pkgutil.iter_modules(fedcore.privacy.__path__)
    ]
    return {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "cache_info")
        and not isinstance(value, type)
        and value.__module__ == module.__name__
    }


@pytest.fixture(autouse=True)
def _empty_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Begins and ends with nothing kept; divergences are made up, as they take a millisecond."""

    def made_up(noise: float, rate: float, orders: tuple[float, ...]) -> Any:
        return np.asarray(orders) * rate / noise**2

    def made_up_table(noises: Any, rates: Any, orders: tuple[float, ...]) -> Any:
        return np.asarray(orders) * (rates / noises**2)[:, None]

    monkeypatch.setattr(accounting, "renyi_divergences", made_up)
    monkeypatch.setattr(accounting, "renyi_table", made_up_table)
    for each in caches().values():
        each.cache_clear()
    yield
    for each in caches().values():
        each.cache_clear()


def grown_bytes(work: Callable[[], None]) -> int:
    """What is held after some work, and was not before."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_settings_that_change_each_round_leave_next_to_nothing_behind(rate: float) -> None:
    privacy = Privacy(unit="example", max_epsilon=1e6, target_delta=1e-5)

    def rounds(number: int) -> None:
        ledger = Ledger()
        for each in range(number):
            # A device reads its charges anew each round: none of them is the object of before.
            ledger = Ledger(tuple(Charge(**vars(one)) for one in ledger.charges))
            new = Charge(each, 1 + each / 1000, rate, 10 + each)
            ledger = charge(ledger, new, privacy, client="anna")
            remaining_rounds(ledger, privacy)

    assert grown_bytes(lambda: rounds(120)) < 1_000_000, "a longer history is not kept as such"


def test_all_that_is_kept_together_has_a_bound() -> None:
    factors, alone = 64, 4096

    def ask_for_everything() -> None:
        for each in range(accounting.MAX_KEPT + 100):
            changed = [Charge(0, 1.0, 0.5, 1), Charge(1, 2 + each / 1000, 0.5, 1)]
            epsilon_of(changed, target_delta=1e-5, accountant="rdp")
        for each in range(alone + 100):
            one = Charge(0, 2 + each / 1000, 0.5, 1)
            epsilon_of([one], target_delta=1e-5, accountant="rdp")
            noise_for(
                max_epsilon=1e6 + each,
                target_delta=1e-5,
                sample_rate=0.5,
                steps=1,
                accountant="rdp",
            )
        for each in range(factors + 10):
            factor_for(100 + each, 64)

    held = grown_bytes(ask_for_everything)
    sizes = {name: one.cache_info() for name, one in caches().items()}
    assert sizes, "there are such"
    for name, info in sizes.items():
        assert info.currsize == info.maxsize, f"{name}: this test has to fill it, too"
    assert held < MAX_BYTES
