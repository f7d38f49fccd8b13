"""Fine-tuning between rounds: the result becomes the next global model, if the cloud's gate agrees.

In: a round's global model and the cloud's data. Out: a `RoundTuning`. Start with `tuner_of`.
"""

from __future__ import annotations

from functools import partial

from fedcore.config.run import RunConfig
from fedcore.observability.events import Sink
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from fedcore.training.evaluate import evaluate
from server.cloud import CloudData
from server.finetune.launch import passes, tune
from server.rounds.tuning import RoundTuning, Tuner


def tuner_of(task: Task, run: RunConfig, cloud: CloudData | None, emit: Sink) -> Tuner | None:
    """Returns what fine-tunes the global model between rounds; None where the run does not.

    Args:
        task: The task whose loss is minimised.
        run: ``[finetune]`` and the seed are used.
        cloud: The cloud's data; its held-out part decides whether a result is kept.
        emit: Callback with the progress of each training.
    """
    if cloud is None or not run.finetune.in_rounds or not run.finetune.epochs:
        return None
    return partial(_tune, task, run, cloud, emit)


def _tune(
    task: Task, run: RunConfig, cloud: CloudData, emit: Sink, model: FullModel, number: int
) -> RoundTuning:
    primary = task.primary
    tuned = tune(task, run, model, cloud, name=f"round {number}", emit=emit)
    before = evaluate(model, cloud.heldout, [primary])[primary.name]
    after = evaluate(tuned, cloud.heldout, [primary])[primary.name]
    kept = passes(run.finetune, primary, before, after, None)
    return RoundTuning(tuned if kept else model, kept, before, after)
