"""The final test: its data, the manifest's statement, and whether a release is withheld."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.utils.data import TensorDataset

from fedcore.artifacts.manifest import TestStatement
from fedcore.config.run import RunConfig
from fedcore.errors import DataError
from fedcore.finite import finite_or_none
from fedcore.observability.words import counted
from fedcore.seeds import numpy_rng
from fedcore.task.definition import Examples, Folder, Task, check_inputs, size_of
from fedcore.task.metrics import Metric
from fedcore.training.batches import gather_all
from fedcore.training.examples import task_examples
from server.release.draft import Origin

Scores = dict[str, dict[str, float]]
"""Scores by metric, then by model."""
_ROUNDING = 1e-6  # differences that the order of float32 sums makes
_MAX_CLIENTS = 1000  # whose test data are read; a task may have millions of clients


@dataclass(frozen=True)
class FinalTest:
    """The final test split: no training, choice, pruning or calibration reads it."""

    examples: Examples
    """The server's test data; without any, the clients' together."""
    clients: Mapping[str, Examples] = field(default_factory=dict)
    """Test data by client; empty where they are on devices, or the task has none."""
    pooled: bool = False
    """Whether ``examples`` are the clients' test data."""


def read_final_test(
    run: RunConfig, task: Task, data: Folder, clients: Sequence[str] = ()
) -> FinalTest | None:
    """Reads the final test split; returns None if there is none within reach.

    Test data of clients are read in a simulation only, and not under privacy: exact results on
    them, even pooled, would be published without noise. Of more than 1000 clients, some are drawn.

    Args:
        run: The run.
        task: Its task, with ``test_data``, ``client_test``, both or neither.
        data: The folder that loaders receive.
        clients: Names of the simulated clients; empty for devices, whose data are out of reach.

    Raises:
        DataError: the data can't be read, or no client has any.
        TaskError: they don't match the task's example.
    """
    by_client = _by_client(run, task, data, clients)
    load = task.test_data
    if load is not None:
        what = f"task {task.name!r}: test data"
        examples = task_examples(task, lambda: load(data), what=what, folder=data)
        check_inputs(task, examples, what=what)
        return FinalTest(examples, by_client)
    if not by_client:
        return None
    columns = zip(*(gather_all(each) for each in by_client.values()), strict=True)
    joined: Examples = TensorDataset(*map(torch.cat, columns))  # type: ignore[assignment]
    return FinalTest(joined, by_client, pooled=True)


def _by_client(
    run: RunConfig, task: Task, data: Folder, clients: Sequence[str]
) -> dict[str, Examples]:
    load = task.client_test
    if load is None or not clients or run.privacy.unit != "none":
        return {}
    size, found = min(len(clients), _MAX_CLIENTS), dict[str, Examples]()
    drawn = numpy_rng(run.seed, "client tests").choice(len(clients), size=size, replace=False)
    for name in (clients[int(place)] for place in sorted(drawn)):
        what = f"test data of client {name!r}"
        own = partial(load, name, data)
        examples = task_examples(task, own, what=what, folder=data, least=0)
        if size_of(examples):
            check_inputs(task, examples, what=what)
            found[name] = examples
    if not found:
        raise DataError(
            f"task {task.name!r}: client_test gives no examples for any of "
            f"{counted(size, 'client')}. Nothing was run; give some of them test data, or leave "
            "client_test out."
        )
    return found


def no_test_note(run: RunConfig, task: Task) -> str:
    """Returns the note for a run without a final test: why there is none, and what follows."""
    why = f"task {task.name!r} has no test_data"
    if task.client_test is not None:
        why += ", and its client_test is on the devices"
        if run.privacy.unit != "none":
            why += f", whose exact results privacy.unit = {run.privacy.unit!r} does not let out"
    return (
        f"There was no final test: {why}. Whether the released model is worse than the federated "
        "one was not tested, and release.max_test_drop withheld nothing."
    )


def statement_of(task: Task, scores: Scores, test: FinalTest) -> TestStatement:
    """Builds the manifest's statement on the final test; non-finite scores become None."""
    found = {name: scores[task.primary.name][name] for name in ("federated", "released")}
    drop = task.primary.worsening(found["federated"], found["released"])
    return TestStatement(
        metric=task.primary.name,
        examples=size_of(test.examples),
        clients=len(test.clients) if test.pooled else None,
        **finite_or_none({**found, "drop": drop}),
    )


def _drop(primary: Metric, tested: TestStatement) -> float:
    """Returns how much worse the released model is than the federated one; may be infinite."""
    if tested.federated is None:
        return -math.inf
    if tested.released is None:
        return math.inf
    return primary.worsening(tested.federated, tested.released)


def _allowed(run: RunConfig, tested: TestStatement) -> float:
    """Returns the largest drop with which a model is published; one example worse always is."""
    return max(run.release.max_test_drop, 1 / tested.examples) + _ROUNDING


def drop_warning(run: RunConfig, primary: Metric, tested: TestStatement) -> str:
    """Warns that the model to release is worse than the federated one; empty if it isn't."""
    drop = _drop(primary, tested)
    if drop <= _ROUNDING:
        return ""
    consequence = (
        "more than release.max_test_drop allows, so it is not published"
        if drop > _allowed(run, tested)
        else "which release.max_test_drop allows"
    )
    return (
        "WARNING: On the final test split the released model is worse than that of the rounds: "
        f"{primary.name} {_figure(tested.federated)} before, {_figure(tested.released)} after, "
        f"over {counted(tested.examples, 'example')}: {drop:.3g} worse, {consequence}."
    )


def reason_to_withhold(run: RunConfig, primary: Metric, tested: TestStatement) -> str:
    """Returns the reason to withhold a release; empty if none applies or no repository is named."""
    drop = _drop(primary, tested)
    if run.release.repository is None or drop <= _allowed(run, tested):
        return ""
    return (
        f"release: on the final test split {primary.name} is {_figure(tested.federated)} with the "
        f"model of the rounds and {_figure(tested.released)} with the one to release: {drop:.3g} "
        f"worse, and release.max_test_drop = {run.release.max_test_drop:g} is allowed. Nothing was "
        "published, and what was published before stands; the cloud's data, which the gate and "
        "the choice of a candidate ask, may not look like the devices'. Leave out fine-tuning "
        "(finetune.epochs = 0) or pruned candidates, hold out data in the cloud that look like the "
        "devices', or allow more."
    )


def untrained_layers(run: RunConfig, source_sha256: str, origin: Origin) -> str:
    """Warns that layers of the model to release have their initial values; empty if none have.

    Layers that stay on clients are trained there alone, and the server has nothing else for them,
    unless it has fine-tuned the model.

    Args:
        run: ``client.local`` is used.
        source_sha256: Digest of the model that the candidates were made from.
        origin: Where the federated model comes from.
    """
    if not run.client.local or source_sha256 != origin.parent_sha256:
        return ""
    return (
        f"WARNING: Layers of the model to release were never trained: client.local = "
        f"[{', '.join(run.client.local)}] stay on clients, and the server has their initial "
        "values. Its answers mean nothing without the layers of a client."
    )


def reason_untrained(run: RunConfig) -> str:
    """Returns the reason to withhold a model with untrained layers; empty without a repository."""
    if run.release.repository is None:
        return ""
    return (
        f"release: layers that stay on clients (client.local = [{', '.join(run.client.local)}]) "
        "have their initial values in the server's model, so a device would answer by layers that "
        "nothing has trained. Nothing was published, and what was published before stands; have "
        "the cloud train them (finetune.epochs above 0, on data of the task's cloud_data), or "
        "leave release.repository out."
    )


def _figure(value: float | None) -> str:
    return "no number" if value is None else f"{value:.4g}"
