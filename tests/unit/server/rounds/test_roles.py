"""Rounds train some clients and evaluate on others, where clients hold back all of their data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from fedcore.config.run import FederationConfig
from fedcore.errors import ConfigError, RoundFailed
from fedcore.training.roles import is_judge
from server.rounds.roles import Roles, check_roles, roles_of
from tests.unit.server.rounds.stories import NODES, Story, adds, mixed, right

APART: dict[str, Any] = {"evaluate_cohort": 5, "holdout": 0.6, "holdout_by": "clients"}
JUDGES, TRAINING = [11, 12], [10, 13, 14]  # client-11 and client-12, by their names


def settings(**federation: Any) -> FederationConfig:
    return FederationConfig.model_validate(federation)


def named(node: int) -> str:
    return f"client-{node}"


def test_nodes_are_divided_by_the_names_of_their_clients() -> None:
    roles = Roles(settings(**APART), named)
    assert roles.training(iter(NODES)) == TRAINING
    assert roles.evaluating(NODES) == JUDGES
    assert roles.training(range(10, 15)) == TRAINING


def test_without_judges_nobody_is_asked_for_a_name_and_a_million_nodes_stay_a_range() -> None:
    def unasked(node: int) -> str:
        raise AssertionError(node)

    nodes = range(1 << 20)
    for federation in (settings(), settings(holdout=0.5, evaluate_cohort=2)):
        roles = Roles(federation, unasked)
        assert roles.training(nodes) is nodes
        assert roles.evaluating(nodes) is nodes


def test_the_nodes_of_a_simulation_are_divided_once() -> None:
    asked: list[int] = []

    def name_of(node: int) -> str:
        asked.append(node)
        return named(node)

    roles = Roles(settings(**APART), name_of)
    first = roles.training(range(10, 15))
    assert roles.training(range(10, 15)) is first
    assert len(asked) == 5


def test_rounds_train_those_who_train_and_evaluate_on_the_others() -> None:
    evaluated: list[int] = []

    def evaluate(node: int, number: int, weights: Any) -> Any:
        evaluated.append(node)
        return right(0.5)(node, number, weights)

    story = Story(adds(), evaluate=evaluate, name_of=named, cohort=2, **APART)
    done = story.run()
    assert {node for _, node in story.asked} <= set(TRAINING)
    assert len(story.asked) == 6
    assert sorted(evaluated) == sorted(JUDGES * 3)
    assert [one.sources["accuracy"].clients for one in done.rounds] == [2, 2, 2]


def test_a_cohort_that_those_who_train_do_not_fill_is_not_filled_with_judges() -> None:
    with pytest.raises(RoundFailed, match=r"3 clients are connected, but federation\.cohort nee"):
        Story(adds(), evaluate=right(0.5), name_of=named, cohort=4, **APART).run()


def test_without_a_judge_the_round_says_whom_it_lacks() -> None:
    story = Story(adds(), evaluate=right(0.5), name_of=str, cohort=2, **APART | {"holdout": 1e-9})
    with pytest.raises(RoundFailed, match=r"needs 5 \(those that hold back all of their data\)"):
        story.run()


def test_by_rows_all_nodes_do_both() -> None:
    federation = APART | {"holdout_by": "rows"}
    story = Story(adds(), evaluate=mixed(right(0.5)), name_of=named, **federation)
    done = story.run()
    assert {node for _, node in story.asked} == set(NODES)
    assert done.rounds[0].sources["accuracy"].clients == 5


def test_a_server_that_does_not_know_names_refuses_and_otherwise_needs_none() -> None:
    with pytest.raises(ConfigError, match="in a Flower network that fedcore does not run"):
        roles_of(settings(**APART), None)
    assert roles_of(settings(), None).training(NODES) == NODES


def checked(clients: Sequence[str], **federation: Any) -> None:
    check_roles(settings(**{"holdout_by": "clients", "evaluate_cohort": 9} | federation), clients)


def test_too_few_judges_are_refused_with_the_share_that_gives_enough() -> None:
    clients = [named(number) for number in range(6)]  # 0.98, 0.62, 0.47, 0.15, 0.61, 0.93
    with pytest.raises(ConfigError, match=r"1 of 6 clients hold back.* set holdout to 0\.48") as no:
        checked(clients, holdout=0.3)
    assert "Nothing was run" in str(no.value)
    checked(clients, holdout=0.48)
    assert sum(is_judge(settings(holdout_by="clients", holdout=0.48), one) for one in clients) == 2
    with pytest.raises(ConfigError, match=r"0 of 1 client .* run; set holdout_by to 'rows'\."):
        checked(["client-0"], holdout=0.3)


def test_too_few_who_train_are_refused() -> None:
    clients = [named(number) for number in range(6)]
    checked(clients, holdout=0.616, cohort=3)
    with pytest.raises(ConfigError, match=r"the 3 others are fewer than federation\.cohort = 4\."):
        checked(clients, holdout=0.616, cohort=4)
    with pytest.raises(
        ConfigError, match=r"6 of 6 clients hold back .* names decide, and none is left to train"
    ):
        checked(clients, holdout=0.99)


def test_by_rows_any_number_of_clients_will_do() -> None:
    checked(["client-0"], holdout=0.3, holdout_by="rows")
