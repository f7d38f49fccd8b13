"""Scores of the models of a run on the final test split, together and by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.measured import measure_outputs
from fedcore.task.model import FullModel
from fedcore.training.evaluate import evaluate
from server.compression.compress import Compressed
from server.compression.runtime import answers, open_session
from server.records import ClientTestRecord
from server.release.final_test import FinalTest, Scores

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
    task: Task, examples: Examples, models: Mapping[str, FullModel], released: Released
) -> Scores:
    """Computes every metric of every model on the final test split; NaN where one is undefined.

    Args:
        task: Defines the metrics.
        examples: The final test split.
        models: Models by name.
        released: The file to release, which is scored as ``released``.
    """
    scores: Scores = {metric.name: {} for metric in task.metrics}
    for name, model in models.items():
        for measured, value in evaluate(model, examples, task.metrics).items():
            scores[measured][name] = value
    found = measure_outputs(task.metrics, *released(examples)).scores(task.metrics)
    for name, value in found.items():
        scores[name]["released"] = value
    return scores


def client_tests(
    task: Task, test: FinalTest, federated: FullModel, released: Released
) -> tuple[ClientTestRecord, ...]:
    """Computes the primary metric of the federated and the released model by client.

    Args:
        task: Defines the metric.
        test: The final test, perhaps without clients' test data: the result is then empty.
        federated: The federated model.
        released: The file to release.
    """
    primary, records = task.primary, []
    for name, examples in sorted(test.clients.items()):
        before = evaluate(federated, examples, [primary])[primary.name]
        after = measure_outputs([primary], *released(examples)).score(primary)
        records.append(ClientTestRecord(name, size_of(examples), before, after))
    return tuple(records)
