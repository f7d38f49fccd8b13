"""Scores of the models of a run on the final test split, together and by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.measured import measure_outputs
from fedcore.task.model import FullModel
from fedcore.training.evaluate import evaluate, outputs_of
from server.compression.compressed import Compressed
from server.compression.runtime import answers, open_session
from server.records import ClientTestRecord
from server.release.final_test import FinalTest, Scores

ModelOf = Callable[[str], FullModel]
"""Returns the federated model with the layers that the client of a name keeps to itself."""
Released = Callable[[Examples], tuple[Tensor, Tensor]]
"""Returns the outputs ``(N, ...)`` of the file to release for examples, and their targets."""


def answers_of_chosen(compressed: Compressed, *, threads: int) -> Released:
    """Returns the function that runs the chosen candidate's ONNX file, as devices will."""
    session = open_session(compressed.files[compressed.chosen], threads=threads)

    def answer(examples: Examples) -> tuple[Tensor, Tensor]:
        outputs, targets = answers(session, examples)
        return torch.from_numpy(outputs), targets

    return answer


def final_scores(
    task: Task,
    test: FinalTest,
    models: Mapping[str, FullModel],
    released: Released,
    *,
    of_client: ModelOf | None = None,
) -> Scores:
    """Computes every metric of every model on the final test split; NaN where one is undefined.

    Args:
        task: Defines the metrics.
        test: The final test split.
        models: Models by name.
        released: The file to release, which is scored as ``released``.
        of_client: Gives each client's own model where layers stay on clients: on clients' test
            data that is the model of the rounds, ``federated``.
    """
    answers: dict[str, Released] = {
        name: partial(outputs_of, model) for name, model in models.items()
    }
    if of_client is not None and test.pooled:
        answers["federated"] = lambda _: _own_answers(test, of_client)
    scores: Scores = {metric.name: {} for metric in task.metrics}
    for name, answer in {**answers, "released": released}.items():
        found = measure_outputs(task.metrics, *answer(test.examples)).scores(task.metrics)
        for metric, value in found.items():
            scores[metric][name] = value
    return scores


def _own_answers(test: FinalTest, of_client: ModelOf) -> tuple[Tensor, Tensor]:
    each = [outputs_of(of_client(name), examples) for name, examples in test.clients.items()]
    outputs, targets = zip(*each, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def client_tests(
    task: Task, test: FinalTest, federated: ModelOf, released: Released
) -> tuple[ClientTestRecord, ...]:
    """Computes the primary metric of the federated and the released model by client.

    Args:
        task: Defines the metric.
        test: The final test, perhaps without clients' test data: the result is then empty.
        federated: Gives the federated model of each client.
        released: The file to release.
    """
    primary, records = task.primary, []
    for name, examples in sorted(test.clients.items()):
        before = evaluate(federated(name), examples, [primary])[primary.name]
        after = measure_outputs([primary], *released(examples)).score(primary)
        records.append(ClientTestRecord(name, size_of(examples), before, after))
    return tuple(records)
