"""The whole loop, from virtual clients to a signed release, step by step."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Lineage, PrivacyStatement
from fedcore.client_app import Client, client_app
from fedcore.config import RunConfig
from fedcore.files import sha256_hex, write_atomic
from fedcore.metrics import Metric
from fedcore.model import checkpoint_bytes
from fedcore.observability.events import (
    Noted,
    RoundFinished,
    Sink,
    StageAdvanced,
    StageFinished,
    StageStarted,
)
from fedcore.owner import OwnerPolicy, tighten
from fedcore.seeds import Simulated
from fedcore.task import Examples, Task
from fedcore.training.device import available
from fedcore.training.evaluate import evaluate
from server.app import Listener, Outcome, server_app
from server.cloud import CloudData
from server.compression.compress import Compressed, compress
from server.compression.runtime import answers, open_session
from server.finetune.launch import Finetuned, fine_tune
from server.folder import config_json
from server.preflight import Prepared
from server.records import ClientRecord, Finished, RoundRecord, RunRecord
from server.release import Draft, publish
from server.simulation.clients import client_records
from server.simulation.engine import Simulation, simulate
from server.simulation.together import vectorised_clients
from server.strategies import client_mods

Scores = dict[str, dict[str, float]]


@dataclass
class _Stages:
    """Runs stages one after the other and keeps their times."""

    emit: Sink
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, steps: int | None = None) -> Iterator[list[str]]:
        """Tells of a stage; what is put into the list it yields is told at its end."""
        self.emit(StageStarted(name, steps))
        started, note = time.monotonic(), list[str]()
        yield note
        self.seconds[name] = time.monotonic() - started
        self.emit(StageFinished(name, self.seconds[name], "; ".join(note)))


def run_pipeline(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    prepared: Prepared,
    folder: Path,
    emit: Sink,
) -> Finished:
    """Trains in simulation, fine-tunes, compresses, tests, publishes; files go to ``folder``.

    The final test split is read once, at the end, by nothing that chooses.

    Raises:
        FedcoreError: whatever stops it; what was published before stands.
    """
    clients, cloud, test = prepared.clients, prepared.cloud, prepared.test
    stages, notes = _Stages(emit), list[str]()

    def note(text: str) -> None:
        notes.append(text)
        emit(Noted(text))

    with stages.stage("federate", run.federation.rounds):
        outcome, simulation = _federate(run, task, owner, clients, cloud, emit, note)
    write_atomic(folder / "global.safetensors", parent := checkpoint_bytes(outcome.model))
    spread = client_records(tighten(run, owner), task, outcome.model, simulation, prepared.data)

    tuned = None
    if cloud and run.finetune.epochs:
        with stages.stage("finetune") as said:
            tuned = fine_tune(task, run, outcome.model, cloud)
            said.append(_gate_note(tuned, task.primary))
        if tuned.kept:
            write_atomic(folder / "finetuned.safetensors", checkpoint_bytes(tuned.model))
        else:
            note(f"The fine-tuned model was not kept: {_gate_note(tuned, task.primary)}.")
    model = tuned.model if tuned else outcome.model

    with stages.stage("compress") as said:
        compressed = compress(run, task, model, cloud, progress=_steps(emit, "compress"))
        said.append(f"chose {compressed.chosen}")
        for name, onnx in compressed.files.items():
            write_atomic(folder / "candidates" / f"{name}.onnx", onnx)
    for text in compressed.notes:
        note(text)

    with stages.stage("test"):
        scores = _final_scores(task, test, outcome, tuned, compressed, run.serving.threads)

    manifest = None
    if run.release.repository is not None and run.release.keys is not None:
        with stages.stage("release") as said:
            draft = _draft(run, task, outcome, spread, tuned, compressed, parent)
            manifest = publish(
                draft,
                repository=run.path(run.release.repository),
                keys=run.path(run.release.keys),
                created=datetime.now(UTC),
            )
            said.append(f"published {manifest.model} version {manifest.version}")

    return Finished(
        RunRecord(
            name=run.name,
            task=task.name,
            kind=task.kind,
            primary=task.primary.name,
            higher_is_better=task.primary.higher_is_better,
            device=str(available(run.client.device)),
            noise="simulated" if run.private else "none",
            rounds=outcome.federated.rounds,
            best_round=outcome.federated.best_round,
            clients=spread,
            candidates=compressed.records,
            chosen=compressed.chosen,
            manifest=manifest,
            scores=scores,
            stages=stages.seconds,
            notes=tuple(notes),
        ),
        compressed.torch_p50_us,
    )


def _federate(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: tuple[str, ...],
    cloud: CloudData | None,
    emit: Sink,
    note: Callable[[str], None],
) -> tuple[Outcome, Simulation]:
    randomness = Simulated(run.seed)
    outcomes: list[Outcome] = []

    def on_round(record: RoundRecord) -> None:
        emit(RoundFinished(asdict(record)))

    server = server_app(
        task,
        run,
        cloud=cloud,
        randomness=randomness,
        listener=Listener(on_note=note, on_round=on_round, on_end=outcomes.append),
    )
    client = client_app(
        task, run, owner=owner, randomness=randomness, mods=client_mods(run.federation.strategy)
    )
    together = None
    if run.simulation.engine == "vectorised":
        together = vectorised_clients(Client(task, tighten(run, owner), owner, randomness))
    simulation = simulate(server, client, clients, together=together)
    return outcomes[0], simulation


def _steps(emit: Sink, stage: str) -> Callable[[str], None]:
    """Tells of a stage's steps, counting them."""
    count = itertools.count(1)
    return lambda text: emit(StageAdvanced(stage, next(count), text))


def _gate_note(tuned: Finetuned, primary: Metric) -> str:
    verdict = "kept" if tuned.kept else "not kept"
    return (
        f"{primary.name} on held-out cloud data {tuned.before:.4g} before, {tuned.after:.4g} "
        f"after: {verdict}"
    )


def _final_scores(
    task: Task,
    test: Examples,
    outcome: Outcome,
    tuned: Finetuned | None,
    compressed: Compressed,
    threads: int,
) -> Scores:
    """Every metric of every model on the final test split."""
    models = {"federated": outcome.model}
    if tuned:
        models |= {"cloud_alone": tuned.cloud_alone, "finetuned": tuned.candidate}
    scores: Scores = {metric.name: {} for metric in task.metrics}
    for name, model in models.items():
        for measured, value in evaluate(model, test, task.metrics).items():
            scores[measured][name] = value
    session = open_session(compressed.files[compressed.chosen], threads=threads)
    outputs, targets = answers(session, test)
    for metric in task.metrics:
        scores[metric.name]["released"] = metric.compute(torch.from_numpy(outputs), targets)
    return scores


def _draft(
    run: RunConfig,
    task: Task,
    outcome: Outcome,
    spread: tuple[ClientRecord, ...],
    tuned: Finetuned | None,
    compressed: Compressed,
    parent: bytes,
) -> Draft:
    spent = [client.epsilon for client in spread if client.epsilon is not None]
    return Draft(
        model=run.model_name,
        onnx=compressed.files[compressed.chosen],
        golden=golden_bytes(compressed.golden_inputs, compressed.golden_outputs),
        kind=task.kind,
        labels=task.labels,
        input_shape=tuple(task.example_input.shape),
        input_dtype=str(task.example_input.dtype).removeprefix("torch."),
        golden_tolerance=compressed.golden_tolerance,
        lineage=Lineage(
            run=run.name,
            round=outcome.federated.best_round,
            parent_sha256=sha256_hex(parent),
            finetuned=bool(tuned and tuned.kept),
            candidate=compressed.chosen,
            config_sha256=sha256_hex(config_json(run)),
            seed=run.seed,
            calibration=compressed.calibration,
        ),
        privacy=PrivacyStatement(
            unit=run.privacy.unit,
            epsilon=max(spent) if run.private and spent else None,
            target_delta=run.privacy.target_delta if run.private else None,
            noise="simulated" if run.private else "none",
        ),
        parity=compressed.parity,
    )
