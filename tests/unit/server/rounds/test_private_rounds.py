"""Rounds under client-level privacy: what one client can do to the model, whatever it sends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message, RecordDict
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.flower.grid import InProcessGrid
from fedcore.flower.identity import assume_identity
from fedcore.privacy.client_level import bounded
from fedcore.seeds import Randomness, Simulated, SystemEntropy
from fedcore.task.metrics import ACCURACY
from fedcore.task.model import FullModel
from fedcore.updates.messages import REFUSED, Update, read_instruction, update_content
from fedcore.updates.pack import Vector, unpack
from server.records import RoundRecord
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.checkpointing.progress import Progress, Start
from server.rounds.federation import Federation
from server.rounds.loop import Federated, run_rounds
from server.rounds.strategies.flower import make_strategy

NODES = list(range(10, 30))
Answer = Callable[[int, int, Vector], Vector | Error]
"""What a node's weights are after training, given its number, the round and what it was sent."""
CLIP = 0.5
SIMULATED = Simulated(0)


class Kept(NoCheckpoints):
    """Keeps progress of every round, as a checkpoint does."""

    def __init__(self) -> None:
        self.all: list[Progress] = []

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        self.all.append(progress)


class Story:
    """A federation over made-up clients; those in ``hostile`` send what they like."""

    def __init__(
        self,
        answer: Answer,
        *,
        hostile: tuple[int, ...] = (),
        strategy: str = "FedAvg",
        start: Start | None = None,
        randomness: Randomness = SIMULATED,
        checkpointer: Kept | None = None,
        rounds: int = 1,
        cohort: int | None = None,
        quorum: float = 0.1,
        **client: Any,
    ) -> None:
        assume_identity(1)
        settings = {"clip_norm": CLIP, "noise_multiplier": 1.0, "target_delta": 1e-3}
        settings |= {"max_epsilon": 1e4, "accountant": "rdp", **client}
        self.run_config = run = RunConfig.model_validate(
            {
                "name": "run",
                "task": "task.py",
                "federation": {
                    "rounds": rounds,
                    "cohort": cohort,
                    "quorum": quorum,
                    "strategy": strategy,
                },
                "privacy": {"unit": "client", "client": settings},
            }
        )
        self.records: list[RoundRecord] = []
        self.notes: list[str] = []
        self.asked: list[list[int]] = []
        self.checkpointer = checkpointer or Kept()

        def handle(message: Message) -> Message:
            node, asked = message.metadata.dst_node_id, read_instruction(message.content)
            if len(self.asked) < asked.round:
                self.asked.append([])
            self.asked[-1].append(node)
            found = answer(node, asked.round, asked.weights)
            if isinstance(found, Error):
                return Message(found, reply_to=message)
            update = (
                Update(found, 2**31 - 1, {})
                if node in hostile
                else bounded(run.privacy, asked, found, {})
            )
            content: RecordDict = update_content(update)
            return Message(content, reply_to=message)

        size = cohort or len(NODES)
        model = nn.Linear(2, 1)
        unpack(np.zeros(3, np.float32), model)
        self.model = FullModel(nn.Identity(), model)
        self.federation = Federation(
            run=run,
            grid=InProcessGrid(1, NODES, handle),
            chosen=make_strategy(strategy, {}, cohort=size, size=3),
            cohort=size,
            metrics=(ACCURACY,),
            randomness=randomness,
            evaluate_on_cloud=None,
            on_round=self.records.append,
            on_note=self.notes.append,
            checkpointer=self.checkpointer,
            start=start,
        )

    def run(self) -> Federated:
        return run_rounds(self.federation, self.model)


def learns(step: float) -> Answer:
    return lambda node, number, weights: weights + np.float32(step * (1 + node % 3))


def without(answer: Answer, gone: int) -> Answer:
    """The neighbour: one client whose updates count as no difference."""
    return lambda node, number, weights: weights if node == gone else answer(node, number, weights)


def sends(node: int, value: Callable[[Vector], Vector], usual: Answer) -> Answer:
    return lambda one, number, weights: (
        value(weights) if one == node else usual(one, number, weights)
    )


def full(value: float) -> Callable[[Vector], Vector]:
    return lambda weights: np.full_like(weights, value)


@pytest.mark.parametrize("hostile", [True, False], ids=["hostile", "honest"])
@pytest.mark.parametrize(
    "value",
    [1e-3, 0.28, 0.2887, 1.0, 3e38, -3e38, float("nan"), float("inf")],
)
def test_whatever_one_client_sends_it_moves_the_sum_by_no_more_than_its_bound(
    value: float, hostile: bool
) -> None:
    usual = learns(0.1)
    answer = sends(17, full(value), usual)
    with_it = Story(answer, hostile=(17,) if hostile else ()).run().weights
    without_it = Story(without(usual, 17)).run().weights
    # The same draws in both, so what differs is the sum, over 20 clients.
    moved = 20 * float(np.linalg.norm(with_it.astype(np.float64) - without_it))
    float32 = 20 * 3 * 2.0**-24  # of the models themselves, which are not what is noised
    assert moved <= CLIP * (1 + 1e-6) + float32
    if not hostile and math.isfinite(value) and abs(value) > 0.3:
        assert moved > 0.99 * CLIP  # the probe sees a clipped update


def test_an_update_over_the_bound_is_refused_and_named() -> None:
    story = Story(sends(17, full(3.0), learns(0.01)), hostile=(17,))
    story.run()
    assert story.records[0].failed == 1
    assert story.records[0].updates == 19
    assert story.notes == [
        "round 1: 1 of 20 clients failed. First: update from node 17: its distance is 5.19615 from "
        "the weights that were sent, expected at most privacy.client.clip_norm = 0.5. It was not "
        "used, because the noise only hides updates within that bound; install the server's "
        "version of fedcore on this client."
    ]


@pytest.mark.parametrize("strategy", ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi"])
def test_every_strategy_that_looks_at_the_mean_alone_gets_the_noised_one(strategy: str) -> None:
    one = Story(learns(0.01), strategy=strategy, rounds=2).run()
    other = Story(without(learns(0.01), 17), strategy=strategy, rounds=2).run()
    assert np.isfinite(one.weights).all()
    assert not np.array_equal(one.weights, other.weights)
    assert one.rounds[-1].client_epsilon == other.rounds[-1].client_epsilon


def test_all_updates_weigh_the_same_whatever_they_say_they_weigh() -> None:
    answer = sends(17, full(0.0), learns(0.0))
    assert Story(answer, hostile=(17,)).run().weights.tolist() == (
        Story(answer).run().weights.tolist()
    )


def test_a_round_that_draws_nobody_releases_noise_and_counts() -> None:
    story = Story(learns(0.01), rounds=40, cohort=1)
    done = story.run()
    nobody = [record.round for record in done.rounds if record.cohort == 0]
    assert 5 < len(nobody) < 25  # 20 nodes at 1/20 each: nobody in 36 % of rounds
    kept = {progress.round: progress.weights for progress in story.checkpointer.all}
    assert all(not np.array_equal(kept[number - 1], kept[number]) for number in nobody)
    spent = [record.client_epsilon or 0 for record in done.rounds]
    assert spent == sorted(spent)
    assert spent[0] > 0


def test_more_may_answer_than_are_expected_and_all_of_them_count() -> None:
    story = Story(learns(0.01), rounds=30, cohort=4, quorum=1.0)
    done = story.run()
    assert max(record.cohort for record in done.rounds) > 4
    assert all(record.updates == record.cohort for record in done.rounds)


def test_clients_that_fail_leave_noise_and_divisor_as_they_are() -> None:
    def fails(node: int, number: int, weights: Vector) -> Vector | Error:
        return weights if node < 20 else Error(REFUSED, "no")

    quiet = Story(lambda node, number, weights: weights).run().weights
    assert Story(fails).run().weights.tolist() == quiet.tolist()


def test_a_run_ends_before_the_round_that_would_pass_its_budget() -> None:
    story = Story(learns(0.01), rounds=50, noise_multiplier=3.0, max_epsilon=4.0)
    done = story.run()
    last = done.rounds[-1]
    assert 1 < last.round < 50
    assert last.client_epsilon is not None
    assert last.client_epsilon <= 4.0
    assert done.best_round == last.round
    assert story.notes == [
        f"Ended before round {last.round + 1}: it would raise the client-level epsilon above "
        "privacy.client.max_epsilon = 4."
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"cohort": 5},
        {"cohort": 5, "clip_norm": "adaptive"},
        {"cohort": 5, "mechanism": "matrix"},
    ],
    ids=["gaussian", "adaptive", "matrix"],
)
def test_rounds_that_go_on_give_the_same_bits(settings: dict[str, Any]) -> None:
    whole = Story(learns(0.01), rounds=9, **settings)
    done = whole.run()
    kept = whole.checkpointer.all[4]
    assert kept.round == 4
    start = Start(replace(kept), done.rounds[:4])
    again = Story(learns(0.01), rounds=9, start=start, **settings)
    over = again.run()
    assert over.weights.tolist() == done.weights.tolist()
    assert over.protection == done.protection
    assert [r.client_epsilon for r in over.rounds] == [r.client_epsilon for r in done.rounds]
    assert again.asked[-1] == whole.asked[-1]


def test_an_adaptive_bound_travels_with_the_round_and_follows_what_comes_back() -> None:
    story = Story(learns(1.0), rounds=6, clip_norm="adaptive")
    story.run()
    bounds = [p.protection.clip_norm for p in story.checkpointer.all if p.protection]
    # Every update is clipped, so the bound grows by about exp(0.2 / 2) a round.
    assert bounds[0] == 0.1
    assert bounds[-1] == pytest.approx(0.1 * math.exp(0.1 * 6), rel=0.2)


class Dies(Kept):
    """A process that dies with the noise of a round drawn and the round not committed."""

    def commit(self, progress: Progress, record: RoundRecord | None) -> None:
        if progress.round == 3:
            raise KeyboardInterrupt
        super().commit(progress, record)


def test_noise_that_was_not_committed_is_never_sent() -> None:
    sent: dict[int, set[bytes]] = {}

    def sees(node: int, number: int, weights: Vector) -> Vector:
        sent.setdefault(number, set()).add(weights.tobytes())
        return weights

    first = Story(sees, rounds=5, randomness=SystemEntropy(), checkpointer=Dies())
    with pytest.raises(KeyboardInterrupt):
        first.run()
    kept = first.checkpointer.all[-1]
    assert kept.round == 2
    start = Start(kept, tuple(first.records[:2]))
    done = Story(sees, rounds=5, randomness=SystemEntropy(), start=start).run()
    # Round 3 was noised twice, and each of its models depends on other noise: one was sent.
    assert [len(sent[number]) for number in range(1, 6)] == [1] * 5
    assert [record.round for record in done.rounds] == [1, 2, 3, 4, 5]
