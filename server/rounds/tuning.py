"""When the cloud fine-tunes the global model between rounds, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flwr.serverapp.strategy import FedAvgM

from fedcore.config.finetune import Finetune
from fedcore.task.model import FullModel
from fedcore.updates.messages import check_weights
from fedcore.updates.pack import Layout, Vector, pack, unpack
from server.records import RoundRecord

if TYPE_CHECKING:
    from server.rounds.federation import Federation


@dataclass(frozen=True)
class RoundTuning:
    """The result of fine-tuning after a round."""

    model: FullModel = field(repr=False)
    """The next global model: the fine-tuned one, or the round's if the gate rejected it."""
    kept: bool
    before: float
    after: float
    """The primary metric on the cloud's held-out data, before and after fine-tuning."""


Tuner = Callable[[FullModel, int], RoundTuning]
"""Fine-tunes the global model of a round, given by number, on the cloud's data; equal models give
equal bits.

Raises:
    TrainingError: training failed."""


def is_due(settings: Finetune, records: Sequence[RoundRecord], best_round: int) -> bool:
    """Returns whether the global model is fine-tuned after the last of the completed rounds.

    After the last round of a run it is not: fine-tuning then follows anyway.

    Args:
        settings: ``every`` and ``after_stall`` are used.
        records: Of all completed rounds.
        best_round: Number of the best one.
    """
    number = records[-1].round
    if number >= records[-1].rounds:
        return False
    if settings.every is not None and number % settings.every == 0:
        return True
    if settings.after_stall is None:
        return False
    last = max((each.round for each in records if each.finetuned is not None), default=0)
    return number - max(best_round, last) >= settings.after_stall


def tune(
    federation: Federation, model: FullModel, layout: Layout, weights: Vector, *, number: int
) -> tuple[Vector, bool]:
    """Fine-tunes the weights of round ``number``; returns the next ones, and whether they changed.

    Raises:
        TrainingError: training failed.
        InvalidUpdate: fine-tuned weights are not finite.
    """
    assert federation.tuner is not None  # the caller has asked `is_due`
    unpack(weights, model.model)
    found = federation.tuner(model.eval(), number)
    verdict = "the next round starts from it" if found.kept else "not kept"
    federation.on_note(
        f"round {number}: fine-tuned on the cloud's data: {federation.primary.name} on held-out "
        f"cloud data {found.before:.4g} before, {found.after:.4g} after: {verdict}."
    )
    if not found.kept:
        return weights, False
    strategy = federation.chosen.strategy
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = None  # its copy of the global model; the next round sets it
    return check_weights(pack(found.model.model), layout, where="fine-tuned model"), True
