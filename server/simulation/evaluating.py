"""Evaluation of one model on the data of virtual clients, as torch or onnxruntime answers them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, InsufficientMemory
from fedcore.files import sha256_hex
from fedcore.privacy.ledger import Ledger
from fedcore.seeds import Simulated
from fedcore.task.definition import Examples, Part, Task
from fedcore.task.measured import Measured, measure_outputs
from fedcore.task.model import FullModel, build_model, checkpoint_bytes
from fedcore.training.client import Client
from fedcore.training.evaluate import output_shape, outputs_of
from fedcore.training.evaluate_private import measure_privately
from fedcore.training.noised_evaluation import Answer, answer_of
from fedcore.training.parts import part_of
from server.compression.runtime import answer as answer_onnx
from server.compression.runtime import answers, open_session

Answers = Callable[[Examples], tuple[Tensor, Tensor]]
"""Returns a model's outputs ``(N, ...)`` for examples, and their targets ``(N, ...)``."""


@dataclass(frozen=True)
class Unmeasured:
    """A client that could not evaluate a model."""

    client: str
    reason: str


@dataclass(frozen=True)
class VirtualClients:
    """Virtual clients that evaluate models, one after the other.

    Under example-level privacy they charge their ledgers and add noise as devices do, from the
    run's seed.
    """

    run: RunConfig
    task: Task
    owner: OwnerPolicy
    ledgers: dict[str, Ledger] = field(default_factory=dict)
    """Privacy ledgers by client, charged under example-level privacy."""

    def measure(
        self, model: FullModel | bytes, clients: Sequence[str], part: Part
    ) -> Iterator[tuple[str, Measured] | Unmeasured]:
        """Yields what each client measures of a model on its own data.

        Args:
            model: A torch model, or an ONNX file, which onnxruntime runs as on devices.
            clients: Names of the clients to ask.
            part: Which of a client's examples are used; held-out ones under privacy.

        Raises:
            CompressionError: onnxruntime can't load the file.
        """
        if self._client.run.private:
            assert part == "heldout", "callers refuse other data under privacy"
            of_client = self._privately(model)
        else:
            of_client = self._exactly(model, part)
        for name in clients:
            try:
                found = of_client(name)
            except InsufficientMemory:
                raise
            except (Exception, SystemExit) as error:  # the task's code may raise anything
                kind = "" if isinstance(error, FedcoreError) else f"{type(error).__name__}: "
                yield Unmeasured(name, f"{kind}{error}")
                continue
            yield name, found

    @cached_property
    def _client(self) -> Client:
        run = tighten(self.run, self.owner)
        return Client(self.task, run, self.owner, Simulated(run.seed))

    def _exactly(self, model: FullModel | bytes, part: Part) -> Callable[[str], Measured]:
        answer = answers_of(model, threads=self.run.serving.threads)

        def of_client(name: str) -> Measured:
            examples = part_of(self._client, name, part)
            return measure_outputs(self.task.metrics, *answer(examples))

        return of_client

    def _privately(self, model: FullModel | bytes) -> Callable[[str], Measured]:
        if isinstance(model, bytes):
            answer = _one_by_one(model, threads=self.run.serving.threads)
            digest, of = sha256_hex(model), build_model(self.task, self.run)
        else:
            answer, digest, of = answer_of(model), sha256_hex(checkpoint_bytes(model)), model
        outputs = output_shape(of, self.task.example_input)

        def of_client(name: str) -> Measured:
            return measure_privately(
                self._client,
                name,
                answer,
                outputs,
                part_of(self._client, name, "heldout"),
                self.ledgers.get(name, Ledger()),
                round=self.run.federation.rounds + 1,
                digest=digest,
                on_spend=partial(self.ledgers.__setitem__, name),
            )

        return of_client


def _one_by_one(onnx: bytes, *, threads: int) -> Answer:
    session = open_session(onnx, threads=threads)
    return lambda inputs: torch.from_numpy(
        answer_onnx(session, np.ascontiguousarray(inputs.numpy()))
    )


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
