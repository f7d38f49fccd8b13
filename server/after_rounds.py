"""The steps after federated training: fine-tune, compress, test and publish.

In: the `FederatedModel` that rounds produced, the cloud's data and the final test split. Out: a
`Completed` run with its record, and a signed release if the run names a repository and the test
admits it. Start with `after_rounds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedcore.artifacts.manifest import (
    Manifest,
    TestStatement,
)
from fedcore.config.run import IN_MEMORY, RunConfig
from fedcore.errors import FedcoreError
from fedcore.files import sha256_hex, write_atomic
from fedcore.observability.events import Noted, Sink, StageFinished, StageStarted, counted_steps
from fedcore.observability.words import figure
from fedcore.task.definition import Task
from fedcore.task.model import FullModel, checkpoint_bytes
from server.cloud import CloudData
from server.compression.compress import compress
from server.compression.compressed import Compressed
from server.compression.draft import draft_of
from server.final_scores import ModelOf, answers_of_chosen, client_tests, final_scores
from server.finetune.auto import AUTO_FILE, read_trials
from server.finetune.gate_note import gate_note
from server.finetune.launch import Finetuned, fine_tune
from server.origin import origin_of
from server.records import (
    ClientRecord,
    ClientTestRecord,
    FinalTestDetails,
    Finished,
    RunRecord,
    TrainingRecord,
)
from server.release.draft import Origin, aim_of
from server.release.final_details import details_of
from server.release.final_test import (
    FinalTest,
    Scores,
    drop_warning,
    no_test_note,
    reason_to_withhold,
    reason_untrained,
    statement_of,
    untrained_layers,
)
from server.release.publish import publish
from server.release.push import push_published
from server.report.folder import GLOBAL_MODEL
from server.report.settings import shown_settings
from server.report.summary import MODELS
from server.rounds.app import Outcome
from server.rounds.evaluation.judging import Judge, MeasureOnnx


@dataclass
class StageLog:
    """Runs named stages, emits their events, and collects their durations and notes."""

    emit: Sink
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def stage(
        self, name: str, steps: int | None = None, *, before_s: float = 0.0
    ) -> Iterator[list[str]]:
        """Emits the start and end events of a stage around the enclosed code.

        Yields a list; strings appended to it become the note of the end event. ``before_s`` is the
        time in seconds that interrupted processes already spent on this stage.
        """
        self.emit(StageStarted(name, steps))
        started, note = time.monotonic() - before_s, list[str]()
        yield note
        self.seconds[name] = time.monotonic() - started
        self.emit(StageFinished(name, self.seconds[name], "; ".join(note)))

    def note(self, text: str) -> None:
        """Emits a note, and keeps it for the report."""
        self.notes.append(text)
        self.emit(Noted(text))


@dataclass(frozen=True)
class FederatedModel:
    """The result of federated training, over virtual clients or devices, as later steps need it."""

    outcome: Outcome
    clients: tuple[ClientRecord, ...]
    """One record per simulated client; empty for devices, whose figures stay on the device."""
    training: TrainingRecord | None
    device: str
    """Description of the hardware that trained the clients."""
    noise: Literal["none", "simulated", "system"]
    of_client: ModelOf | None = None
    """Gives a simulated client's own model where layers stay on clients; else None."""
    judge: Judge | None = None
    """Evaluates the fine-tuned model on clients; None if they hold no data back."""
    measure_onnx: MeasureOnnx | None = None
    """Evaluates compression candidates on simulated clients; None if they hold no data back. Also
    None for devices: they evaluate weights only, and run no files of an unfinished run."""


@dataclass(frozen=True)
class Completed(Finished):
    """A complete run, with the models and files that later calls continue from."""

    federated: FullModel
    """The model of the best round, or of the last one if no data judged them."""
    model: FullModel
    """The fine-tuned model; the federated model if there was no fine-tuning or the gate rejected
    its result."""
    compressed: Compressed
    origin: Origin


@dataclass(frozen=True)
class StageFunctions:
    """Implementations of the long steps, and of publication, which must happen exactly once.

    Deployments replace them to make the steps resumable.
    """

    fine_tune: Callable[..., Finetuned] = fine_tune
    compress: Callable[..., Compressed] = compress
    publish: Callable[..., Manifest] = publish


AT_ONCE = StageFunctions()
_STARTED_PRIVATE = (
    "The privacy figures are those of this run alone. It started from federation.initial, and what "
    "training that has cost clients is not known: add it, where the same clients took part."
)


def after_rounds(
    run: RunConfig,
    task: Task,
    cloud: CloudData | None,
    test: FinalTest | None,
    trained: FederatedModel,
    folder: Path,
    story: StageLog,
    *,
    steps: StageFunctions = AT_ONCE,
) -> Completed:
    """Fine-tunes, compresses, tests and publishes the federated model.

    The final test split is read once, at the end, and takes part in no choice. If the chosen model
    is worse on it than the federated model by more than ``release.max_test_drop``, the release is
    withheld: nothing is published, and the record states the reason. Without a test split nothing
    shows such a drop, which a note says.

    Args:
        run: The run.
        task: Its task.
        cloud: The cloud's data, if any.
        test: The final test split; None if there is none within reach.
        trained: The result of federated training.
        folder: Folder for models and candidates.
        story: Receives stages and notes.
        steps: Implementations of the steps.

    Returns:
        The completed run.

    Raises:
        FedcoreError: any failure before the release; one of the release itself is in the record.
            Earlier releases remain valid.
    """
    outcome, tuned = trained.outcome, None
    write_atomic(folder / GLOBAL_MODEL, parent := checkpoint_bytes(outcome.model))
    if cloud and run.finetune.epochs:
        tuned = _fine_tuned(run, task, cloud, trained, folder, story, steps)
    model, kept = (tuned.model, tuned.kept) if tuned else (outcome.model, True)
    compressed = _compressed(run, task, cloud, model, kept, trained, folder, story, steps)
    # Models that clients judged: before and after fine-tuning, and candidates.
    asked = 2 * bool(tuned and trained.judge) + len(compressed.files) * bool(trained.measure_onnx)
    spent = tuned.privacy if tuned else None
    origin = origin_of(
        run, outcome, trained.clients, parent, spent, noise=trained.noise, evaluations=asked
    )
    started = _STARTED_PRIVATE if origin.privacy.before == "not known" else ""
    tested = _tested(run, task, test, trained, tuned, compressed, story)
    untrained = untrained_layers(run, compressed.source_sha256, origin)
    withheld = untrained and reason_untrained(run)
    if tested.statement and not withheld:
        withheld = reason_to_withhold(run, task.primary, tested.statement)
    for text in filter(None, (started, tested.warning, untrained, withheld)):
        story.note(text)
    manifest, unreleased = None, ""
    if not withheld:
        manifest, unreleased = _released(
            run, task, origin, compressed, tested.statement, story, steps
        )
    record = RunRecord(
        name=run.name,
        task=task.name,
        kind=task.problem.name,
        primary=task.primary.name,
        higher_is_better=task.primary.higher_is_better,
        device=trained.device,
        noise=trained.noise,
        rounds=outcome.federated.rounds,
        best_round=outcome.federated.best_round,
        training=trained.training,
        clients=_with_tests(trained.clients, tested.clients),
        epsilon=origin.privacy.epsilon,
        initial_sha256=origin.initial_sha256,
        spent_before=origin.privacy.before,
        client_privacy=origin.privacy.client,
        cloud_privacy=origin.privacy.cloud,
        candidates=compressed.records,
        chosen=compressed.chosen,
        manifest=manifest,
        withheld=withheld,
        unreleased=unreleased,
        scores=tested.scores,
        tested=tested.statement,
        test_warning=tested.warning,
        untrained=untrained,
        client_tests=tested.clients,
        details=tested.details,
        task_sha256=_task_sha256(run),
        settings=shown_settings(run),
        finetune_trials=read_trials(folder) if run.finetune.auto and tuned else None,
        stages=story.seconds,
        notes=tuple(story.notes),
    )
    return Completed(record, compressed.torch_p50_us, outcome.model, model, compressed, origin)


def _task_sha256(run: RunConfig) -> str | None:
    """Returns the digest of the task's file; None if it is in memory, or gone meanwhile."""
    path = run.path(run.task)
    return sha256_hex(path.read_bytes()) if run.task != IN_MEMORY and path.is_file() else None


def _released(
    run: RunConfig,
    task: Task,
    origin: Origin,
    compressed: Compressed,
    tested: TestStatement | None,
    story: StageLog,
    steps: StageFunctions,
) -> tuple[Manifest | None, str]:
    """Publishes the chosen candidate if the run names a repository, and pushes it to a bucket.

    Returns:
        The manifest, if it was published; and why publishing or pushing failed: what was computed
        is kept all the same.
    """
    if run.release.repository is None or run.release.keys is None:
        return None, ""
    repository, keys = run.path(run.release.repository), run.path(run.release.keys)
    manifest, unreleased = None, ""
    with story.stage("release") as said:
        try:
            manifest = steps.publish(
                replace(
                    draft_of(run.model_name, task, origin, compressed, tested),
                    canary=aim_of(run.release),
                ),
                repository=repository,
                keys=keys,
                created=datetime.now(UTC),
            )
            said.append(f"published {manifest.model} version {manifest.version}")
            advance = counted_steps(story.emit, "release")
            said += push_published(manifest, repository, keys, run.release.push, advance)
        except FedcoreError as error:
            said.append("failed")
            unreleased = (
                f"{error} Models, report and summary of this run are kept; --resume (in "
                "Python resume=True) continues with the release, and takes other settings of "
                "[compression] and [release]."
            )
    if unreleased:
        story.note(unreleased)
    return manifest, unreleased


@dataclass(frozen=True)
class _Tested:
    """Results of the final test; all empty without one."""

    scores: Scores = field(default_factory=dict)
    statement: TestStatement | None = None
    warning: str = ""
    clients: tuple[ClientTestRecord, ...] = ()
    details: FinalTestDetails | None = None


def _tested(
    run: RunConfig,
    task: Task,
    test: FinalTest | None,
    trained: FederatedModel,
    tuned: Finetuned | None,
    compressed: Compressed,
    story: StageLog,
) -> _Tested:
    outcome = trained.outcome
    if test is None:
        story.note(no_test_note(run, task))
        return _Tested()
    with story.stage("test") as said:
        models = {"federated": outcome.model}
        if tuned:
            alone = {} if tuned.cloud_alone is None else {"cloud_alone": tuned.cloud_alone}
            models |= {**alone, "finetuned": tuned.candidate}
        released = answers_of_chosen(compressed, threads=run.serving.threads)
        own = trained.of_client
        scores = final_scores(task, test, models, released, of_client=own)
        details = details_of(task, *released(test.examples))
        by_client = client_tests(task, test, own or (lambda _: outcome.model), released)
        of_models = scores[task.primary.name].items()
        figures = (f"{MODELS[model]} {figure(value)}" for model, value in of_models)
        said.append(f"{task.primary.name} on the final test split: {', '.join(figures)}")
    statement = statement_of(task, scores, test)
    warning = drop_warning(run, task.primary, statement)
    return _Tested(scores, statement, warning, by_client, details)


def _with_tests(
    clients: Sequence[ClientRecord], tests: Sequence[ClientTestRecord]
) -> tuple[ClientRecord, ...]:
    by_name = {each.client: each for each in tests}
    return tuple(replace(each, test=by_name.get(each.client)) for each in clients)


def _fine_tuned(
    run: RunConfig,
    task: Task,
    cloud: CloudData,
    trained: FederatedModel,
    folder: Path,
    story: StageLog,
    steps: StageFunctions,
) -> Finetuned:
    with story.stage("finetune") as said:
        start, auto_file = trained.outcome.model, folder / AUTO_FILE
        tuned = steps.fine_tune(
            task, run, start, cloud, trained.judge, emit=story.emit, auto_file=auto_file
        )
        said.append(gate_note(tuned, task.primary))
    for text in tuned.notes:
        story.note(text)
    if tuned.kept:
        write_atomic(folder / "finetuned.safetensors", checkpoint_bytes(tuned.model))
    if tuned.clients or not tuned.kept:
        story.note(f"Gate after fine-tuning: {gate_note(tuned, task.primary)}.")
    return tuned


def _compressed(
    run: RunConfig,
    task: Task,
    cloud: CloudData | None,
    model: FullModel,
    kept: bool,
    trained: FederatedModel,
    folder: Path,
    story: StageLog,
    steps: StageFunctions,
) -> Compressed:
    with story.stage("compress") as said:
        progress = counted_steps(story.emit, "compress")
        compressed = steps.compress(
            run,
            task,
            model,
            cloud,
            progress=progress,
            on_clients=trained.measure_onnx,
            tuning_kept=kept,
        )
        said.append(f"chose {compressed.chosen}")
        for name, onnx in compressed.files.items():
            write_atomic(folder / "candidates" / f"{name}.onnx", onnx)
    for text in compressed.notes:
        story.note(text)
    return compressed
