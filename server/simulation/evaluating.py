"""Evaluation of one model on the data of virtual clients, as torch or onnxruntime answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, InsufficientMemory
from fedcore.seeds import Simulated
from fedcore.task.definition import Examples, Part, Task
from fedcore.task.measured import measure_outputs
from fedcore.task.model import FullModel
from fedcore.training.client import Client
from fedcore.training.evaluate import outputs_of
from fedcore.training.parts import part_of
from server.compression.runtime import answers, open_session
from server.evaluation import ClientScores

Answers = Callable[[Examples], tuple[Tensor, Tensor]]
"""Returns a model's outputs ``(N, ...)`` for examples, and their targets ``(N, ...)``."""


@dataclass(frozen=True)
class Unmeasured:
    """A client that could not evaluate a model."""

    client: str
    reason: str


def answers_of(model: FullModel | bytes, *, threads: int) -> Answers:
    """Returns the function that computes a model's outputs, as clients would.

    Args:
        model: A torch model, or an ONNX file, which onnxruntime runs as on devices.
        threads: Threads of onnxruntime.

    Raises:
        CompressionError: onnxruntime can't load the file.
    """
    if isinstance(model, FullModel):
        return lambda examples: outputs_of(model, examples)
    session = open_session(model, threads=threads)

    def answer(examples: Examples) -> tuple[Tensor, Tensor]:
        outputs, targets = answers(session, examples)
        return torch.from_numpy(outputs), targets

    return answer


def measure_clients(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: Sequence[str],
    answer: Answers,
    part: Part,
) -> Iterator[ClientScores | Unmeasured]:
    """Yields each client's metrics of a model on its own data.

    Args:
        run: The run; ``federation.holdout`` splits clients' data.
        task: Defines data and metrics.
        owner: The policy that virtual clients enforce.
        clients: Names of the clients to ask.
        answer: The model, from `answers_of`.
        part: Which of a client's examples are used.
    """
    client = Client(task, tighten(run, owner), owner, Simulated(run.seed))
    for name in clients:
        try:
            examples = part_of(client, name, part)
            measured = measure_outputs(task.metrics, *answer(examples))
        except InsufficientMemory:
            raise
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            kind = "" if isinstance(error, FedcoreError) else f"{type(error).__name__}: "
            yield Unmeasured(name, f"{kind}{error}")
            continue
        yield ClientScores.of(name, measured, task.metrics)
