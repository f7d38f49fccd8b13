"""Distillation: a smaller network of the task's own learns the answers of the trained model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, TensorDataset

from fedcore.errors import CompressionError
from fedcore.seeds import global_streams, numpy_rng
from fedcore.task.answers import tensor_model
from fedcore.task.definition import Examples, size_of
from fedcore.task.model import FullModel
from server.compression.confidence import mixed_examples
from server.compression.train_close import CloudTraining, Teacher, short, train_close

FEW = 2048
"""Of fewer examples, a student sees mixtures of two, too, until there are so many."""
_MOST_BYTES = 256 << 20  # of all mixtures
TEACHER_SHARE = 0.9
"""Share of the distance to the teacher's answers in the student's loss; the rest is the labels'."""


def distil(
    module: nn.Module,
    build: Callable[[], nn.Module],
    example_batch: Tensor,
    training: CloudTraining,
    *,
    epochs: int,
) -> FullModel:
    """Returns a trained student behind the preprocessing of the model that teaches it.

    Args:
        module: The trained model, a `fedcore.task.model.FullModel` on the CPU. Not changed.
        build: The task's ``student``; the training's seed determines its initial weights.
        example_batch: Inputs ``(2, ...)``.
        training: Data, loss and settings.
        epochs: Passes over the data.

    Raises:
        CompressionError: the student can't be built, fails on an input, answers in another form
            than the model, or cannot be trained.

    Source:
        Hinton et al. 2015, arXiv:1503.02531; Zhang et al. 2018, arXiv:1710.09412 (mixtures).
    """
    assert isinstance(module, FullModel)
    try:
        with global_streams(training.seed, "student"):
            student = FullModel(copy.deepcopy(module.preprocess), tensor_model(build))
        with torch.no_grad():
            own, told = student.eval()(example_batch), module.eval()(example_batch)
        got = tuple(own.shape[1:])
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        raise CompressionError(
            f"the task's student fails: {type(error).__name__}: {short(error)}"
        ) from error
    wanted = tuple(told.shape[1:])
    if got != wanted:
        raise CompressionError(
            f"the task's student gives outputs of shape {got}, and the model {wanted}"
        )
    training = replace(training, examples=widened(training.examples, seed=training.seed))
    teacher = Teacher(module, TEACHER_SHARE)
    train_close(student, teacher, training, epochs=epochs, purpose="student")
    return student.eval()


def widened(examples: Examples, *, seed: int) -> Examples:
    """Returns the cloud's examples, with mixtures of two where they are few.

    The teacher answers whatever it is asked, so a student need not see real inputs alone.
    """
    missing = min(FEW - size_of(examples), _MOST_BYTES // max(examples[0][0].nbytes, 1))
    if missing <= 0:
        return examples
    mixed = mixed_examples(examples, count=missing, rng=numpy_rng(seed, "student", "mixtures"))
    return ConcatDataset([examples, TensorDataset(*mixed)])
