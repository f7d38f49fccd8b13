from __future__ import annotations

from typing import Any

import flwr.serverapp.strategy as flower
import pytest
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import Strategy

from fedcore.errors import ConfigError
from fedcore.privacy.unsound import SUMMED
from fedcore.training.mods import client_mods
from server.rounds.strategies.flower import FOLDING, ChosenStrategy, make_strategy, strategy_names

FIXED = "DifferentialPrivacyServerSideFixedClipping"
CLIPPING = {"noise_multiplier": 0.5, "clipping_norm": 1.0}


def make(name: str, *, cohort: int = 8, size: int = 1000, **options: Any) -> ChosenStrategy:
    return make_strategy(name, options, cohort=cohort, size=size)


def test_every_strategy_of_flower_can_be_named() -> None:
    names = strategy_names()
    assert names == sorted(set(names))
    assert {"FedAvg", "FedAdam", "Krum", "Bulyan", FIXED} <= set(names)
    assert "Strategy" not in names
    assert all(issubclass(getattr(flower, name), Strategy) for name in names)


def test_a_strategy_waits_for_nobody_and_takes_all_that_it_is_shown() -> None:
    strategy = make("FedAvg", cohort=5).strategy
    assert isinstance(strategy, flower.FedAvg)
    assert strategy.min_train_nodes == strategy.min_available_nodes == 1
    assert strategy.fraction_train == 1.0


def test_options_reach_the_strategy() -> None:
    strategy = make("FedAdam", eta=0.5, tau=0.01).strategy
    assert isinstance(strategy, flower.FedAdam)
    assert (strategy.eta, strategy.tau) == (0.5, 0.01)


def test_a_wrapper_wraps_the_strategy_that_it_is_given() -> None:
    strategy = make(FIXED, strategy="FedMedian", **CLIPPING).strategy
    assert isinstance(strategy, flower.DifferentialPrivacyServerSideFixedClipping)
    assert isinstance(strategy.strategy, flower.FedMedian)
    assert strategy.num_sampled_clients == 8
    plain = make(FIXED, **CLIPPING).strategy
    assert isinstance(plain, flower.DifferentialPrivacyServerSideFixedClipping)
    assert isinstance(plain.strategy, flower.FedAvg)


def test_a_wrapper_says_that_its_noise_is_not_counted() -> None:
    notes = make(FIXED, **CLIPPING).notes
    assert any("the epsilon reported by fedcore does not include" in note for note in notes)


def test_buffering_says_what_memory_it_takes() -> None:
    (note,) = make("FedMedian", cohort=50, size=1_000_000).notes
    assert note == (
        "FedMedian needs every update of a round at once: 50 x 1,000,000 parameters take 200.0 MB, "
        "and up to three times that while it aggregates."
    )
    assert make("FedAvg", cohort=50, size=1_000_000).notes == []


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        (
            "FedAvgg",
            {},
            r"Flower has no such strategy\. Did you mean 'FedAvg'\? Available: Bulyan, ",
        ),
        ("Strategy", {}, "Flower has no such strategy"),
        ("FedXgbBagging", {}, "it aggregates XGBoost trees, but a task's model is a torch module"),
        ("FedXgbCyclic", {}, "it aggregates XGBoost trees"),
        (
            "FedAdam",
            {"etta": 0.1},
            r"options\.etta: FedAdam has no such option\. Did you mean 'eta",
        ),
        ("FedAvg", {"fraction_train": 0.5}, "fraction_train: FedAvg has no such option"),
        ("FedAvg", {"eta": 0.5}, "It accepts: none"),
        ("QFedAvg", {}, "QFedAvg refused .*client_learning_rate"),
        (FIXED, {}, f"{FIXED} refused .*noise_multiplier"),
        (FIXED, CLIPPING | {"clipping_norm": -1.0}, "clipping norm should be a positive value"),
        (FIXED, CLIPPING | {"accountant": "x"}, "accountant: .* has no such option"),
        (
            FIXED,
            CLIPPING | {"num_sampled_clients": 3},
            "num_sampled_clients: .* has no such option",
        ),
        (FIXED, CLIPPING | {"strategy": "FedXgbCyclic"}, "aggregates XGBoost trees"),
        (FIXED, CLIPPING | {"strategy": "FedAvgg"}, "Did you mean 'FedAvg'"),
        (FIXED, CLIPPING | {"strategy": FIXED}, f"{FIXED} refused"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_way_out(
    name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=rf"federation\.strategy.*{said}.*Nothing was run"):
        make(name, **options)


def test_clients_run_the_mod_that_a_strategy_needs() -> None:
    assert client_mods("DifferentialPrivacyClientSideFixedClipping") == [fixedclipping_mod]
    assert client_mods("DifferentialPrivacyClientSideAdaptiveClipping") == [adaptiveclipping_mod]
    assert client_mods("FedAvg") == client_mods(FIXED) == []


def test_client_level_privacy_takes_exactly_the_strategies_that_fold() -> None:
    assert {cls.__name__ for cls in FOLDING} == set(SUMMED)
