"""Fine-tuning, compression and release as separate calls; `fedcore.simulate` runs all three."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any

from fedcore.artifacts.manifest import Manifest, TestStatement
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, ReleaseError
from fedcore.files import sha256_hex
from fedcore.flower.quiet import quiet
from fedcore.observability.console import shown
from fedcore.observability.events import Sink, counted_steps, nowhere, tee
from fedcore.task.definition import Task, check_inputs, data_folder
from fedcore.task.model import checkpoint_bytes
from server.after_rounds import StageLog
from server.api.arguments import (
    AnyModel,
    AnyRun,
    AnyTask,
    configured,
    loaded,
    model_of,
    refuse_elsewhere,
)
from server.api.result import Result
from server.cloud import CloudData, cloud_data_of
from server.compression.compress import compress as make_candidates
from server.compression.compressed import Compressed
from server.compression.draft import draft_of
from server.final_scores import answers_of_chosen, final_scores
from server.finetune.auto import AUTO_FILE
from server.finetune.gate_note import gate_note
from server.finetune.launch import Finetuned, fine_tune
from server.origin import with_cloud
from server.preflight import clients_of
from server.release.draft import aim_of
from server.release.final_test import (
    read_final_test,
    reason_to_withhold,
    reason_untrained,
    statement_of,
    untrained_layers,
)
from server.release.publish import check_publishable
from server.release.publish import publish as sign_and_publish
from server.release.push import check_push, push_published
from server.report.mlflow_runs import mlflow_run
from server.report.tensorboard import tensorboard_events
from server.rounds.evaluation.judging import clients_judge
from server.simulation.evaluating import VirtualClients
from server.simulation.judging import judge_in_simulation, measure_onnx_in_simulation


def finetune(
    task: AnyTask | None,
    run: AnyRun | None,
    model: AnyModel,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    progress: bool | Sink = True,
    tensorboard: str | PathLike[str] | None = None,
    **settings: Any,
) -> Finetuned:
    """Fine-tunes a model on the cloud's data and keeps the result only if a quality gate admits it.

    Requires a task with ``cloud_data``. By default training runs in this process, which works for a
    task made in memory; several processes load the task from its file. If the run has clients hold
    data back (``federation.evaluate_cohort``), simulated clients evaluate the fine-tuned model,
    too.

    Example::

        result = fedcore.simulate(task, "run.toml", finetune={"epochs": 0})
        tuned = fedcore.finetune(task, "run.toml", result.federated, finetune={"epochs": 20})
        tuned.kept, tuned.before, tuned.after, tuned.model

    Args:
        task: A task, or the file that defines one; None for the one that the run names.
        run: The run, or its file; ``[finetune]``, ``[federation]`` and the seed are used. None for
            default settings.
        model: The model to start from, or its checkpoint. Not changed.
        owner: The policy that evaluating virtual clients enforce.
        progress: Whether to show progress, or a callback that receives the events.
        tensorboard: Folder for TensorBoard events: loss, learning rate, speed and memory. Events of
            an earlier call are replaced. None for none.
        settings: Sections or settings of the run to override.

    Returns:
        The fine-tuned model, whether the gate kept it, and the metrics that the gate compared.

    Raises:
        ConfigError: the task has no cloud data, or ``finetune.epochs`` is 0.
        TrainingError: training failed; ``model`` remains valid.
        FedcoreError: any other error, before training starts.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    refuse_elsewhere(config, found, rounds=clients_judge(config))
    cloud = _cloud(config, found)
    if cloud is None or not config.finetune.epochs:
        wrong = "it has no cloud_data" if cloud is None else "finetune.epochs = 0"
        raise ConfigError(
            f"task {found.name!r}: {wrong}, so there is nothing to fine-tune. Nothing was "
            "trained; give the task cloud_data and set finetune.epochs to at least 1, or use the "
            "model as it is."
        )
    quiet()
    start, auto_file = model_of(model, found, config), _auto_file(config)
    with (
        mlflow_run(config, "finetune", None) as tracker,
        _board(tensorboard) as board,
        shown(progress) as show,
    ):
        story = StageLog(tee(tracker, board, show))
        judge = None
        if clients_judge(config):
            clients = clients_of(found, config, data_folder())
            virtual = VirtualClients(config, found, owner)
            judge = judge_in_simulation(virtual, clients, story.note)
        with story.stage("finetune") as said:
            tuned = fine_tune(
                found, config, start, cloud, judge, emit=story.emit, auto_file=auto_file
            )
            said.append(gate_note(tuned, found.primary))
        for text in tuned.notes:
            story.note(text)
    if auto_file is not None:
        auto_file.unlink(missing_ok=True)
    return tuned


def compress(
    task: AnyTask,
    run: AnyRun | None,
    model: AnyModel,
    *,
    owner: OwnerPolicy = OPEN_POLICY,
    progress: bool | Sink = True,
    **settings: Any,
) -> Compressed:
    """Exports a model to ONNX, builds compressed candidates, times them all, and chooses one.

    The cloud's data calibrates and evaluates candidates; without it the only candidate is the
    exported model. If the run has clients hold data back, simulated clients evaluate candidates,
    too.

    Example::

        compressed = fedcore.compress(task, "run.toml", tuned.model)
        compressed.chosen  # its name; its ONNX file is compressed.files[compressed.chosen]
        [(each.name, each.bytes, each.p50_us) for each in compressed.records]

    Args:
        task: A task, or the file that defines one.
        run: The run, or its file; ``[compression]``, ``[finetune]``, ``[serving]`` and the seed are
            used. None for default settings.
        model: The trained model, or its checkpoint. Not changed.
        owner: The policy that evaluating virtual clients enforce.
        progress: Whether to show progress, or a callback that receives the events.
        settings: Sections or settings of the run to override.

    Returns:
        All candidates with their measurements: sizes in bytes, times in microseconds.

    Raises:
        TaskError: the model can't be exported.
        ParityError: outputs of the exported file differ from those of the model.
        CompressionError: weights are not finite, or no candidate meets the run's limits.
        FedcoreError: any other error, before candidates are built.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    cloud = _cloud(config, found)
    quiet()
    start = model_of(model, found, config)
    with shown(progress) as emit:
        story = StageLog(emit)
        measure_onnx = None
        if clients_judge(config):
            clients = clients_of(found, config, data_folder())
            virtual = VirtualClients(config, found, owner)
            measure_onnx = measure_onnx_in_simulation(virtual, clients, story.note)
        with story.stage("compress") as said:
            steps = counted_steps(emit, "compress")
            done = make_candidates(
                config, found, start, cloud, progress=steps, on_clients=measure_onnx
            )
            said.append(f"chose {done.chosen}")
        for text in done.notes:
            story.note(text)
    return done


def publish(
    compressed: Compressed,
    result: Result,
    *,
    tuned: Finetuned | None = None,
    repository: str | PathLike[str] | None = None,
    keys: str | PathLike[str] | None = None,
    model: str | None = None,
) -> Manifest:
    """Evaluates the chosen candidate on the final test split, signs it, and publishes it.

    If the run names a bucket (``release.push``), the repository is pushed to it then.

    Guarantee:
        The manifest states the model's provenance truthfully: round and privacy are those of
        ``result``, and the candidate derives from the model of ``result``, directly or through
        ``tuned``.

    Example::

        result = fedcore.simulate(task, "run.toml")
        fedcore.publish(result.compressed, result, repository="releases", keys="keys")

        tuned = fedcore.finetune(task, result.run, result.federated)
        compressed = fedcore.compress(task, result.run, tuned.model)
        fedcore.publish(compressed, result, tuned=tuned, repository="releases", keys="keys")

    Args:
        compressed: The candidates; the chosen one is published.
        result: The simulation that produced the model.
        tuned: The result of `fedcore.finetune`, if fine-tuning was a separate call.
        repository: Folder of the signed repository; None for the run's ``release.repository``.
        keys: Folder of the repository's online keys, made by ``fedcore release init``; None for the
            run's ``release.keys``.
        model: The name under which devices request the model; None for the run's name.

    Returns:
        The signed manifest. Devices that request the model from now on receive this version. If the
        task has no test data within reach, the manifest states no test, and nothing is withheld.

    Raises:
        ConfigError: repository or keys are not given, or the candidates derive from another model.
        ReleaseError: keys are missing, the model has layers that stay on clients and were never
            trained on the cloud's data, or on the final test split the candidate is worse than the
            federated model by more than ``release.max_test_drop``. Earlier releases remain valid.
            Or the bucket cannot take the release; if its push fails later, the version stays
            published in the folder.
        DiskFull: the disk is full; earlier releases remain valid.
    """
    run, task = result.run, result.task
    place = _place(run, repository, run.release.repository, "repository")
    signing = _place(run, keys, run.release.keys, "keys")
    _refuse_others(compressed, result, tuned)
    name = model or run.model_name
    check_publishable(name, repository=place, keys=signing, now=datetime.now(UTC))
    if run.release.push is not None:
        check_push(place, signing, run.release.push)
    tested = _tested(compressed, result)
    release = run.release.model_copy(update={"repository": str(place)})
    config = run.model_copy(update={"release": release})
    if untrained_layers(run, compressed.source_sha256, result.origin):
        raise ReleaseError(reason_untrained(config))
    if tested and (withheld := reason_to_withhold(config, task.primary, tested)):
        raise ReleaseError(withheld)
    origin = result.origin
    if tuned is not None and tuned.privacy is not None:
        origin = with_cloud(origin, tuned.privacy)
    manifest = sign_and_publish(
        replace(draft_of(name, task, origin, compressed, tested), canary=aim_of(run.release)),
        repository=place,
        keys=signing,
        created=datetime.now(UTC),
    )
    push_published(manifest, place, signing, run.release.push)
    return manifest


def _auto_file(run: RunConfig) -> Path | None:
    """Returns the file for the choice of ``finetune.auto``, beside checkpoints; None without."""
    folder = run.finetune.checkpoints
    return None if folder is None else run.path(folder) / run.name / AUTO_FILE


def _board(folder: str | PathLike[str] | None) -> AbstractContextManager[Sink]:
    return nullcontext(nowhere) if folder is None else tensorboard_events(Path(folder))


def _cloud(run: RunConfig, task: Task) -> CloudData | None:
    cloud = cloud_data_of(run, task, data_folder())
    if cloud is not None:
        check_inputs(task, cloud.heldout, what=f"task {task.name!r}: cloud data")
    return cloud


def _place(
    run: RunConfig, given: str | PathLike[str] | None, of_run: str | None, what: str
) -> Path:
    if given is not None:
        return Path(given)
    if of_run is None:
        raise ConfigError(
            f"publish: {what} was not given, and release.{what} of run {run.name!r} is not set. "
            f"Nothing was published; pass {what}=..., a folder created by `fedcore release init`."
        )
    return run.path(of_run)


def _refuse_others(compressed: Compressed, result: Result, tuned: Finetuned | None) -> None:
    """Rejects candidates that don't derive from the federated model of ``result``, by digest.

    Raises:
        ConfigError: the candidates derive from another model.
    """
    parent = result.origin.parent_sha256
    ours = {parent, result.compressed.source_sha256}
    if tuned is not None and tuned.parent_sha256 == parent:
        ours.add(tuned.model_sha256)
    changed = sha256_hex(checkpoint_bytes(result.federated)) != parent
    if changed or compressed.source_sha256 not in ours:
        of = (
            "result.federated was modified afterwards"
            if changed
            else "the candidates belong to a model"
        )
        raise ConfigError(
            f"publish: {of} that does not come from the rounds of {result.run.name!r}, so the "
            "manifest could not state how it was trained. Nothing was published; compress "
            "result.model, result.federated, or the model that fedcore.finetune trained from "
            "result.federated, and pass the fine-tuning result as tuned=..."
        )


def _tested(compressed: Compressed, result: Result) -> TestStatement | None:
    run, task, data = result.run, result.task, data_folder()
    test = read_final_test(run, task, data, clients_of(task, run, data))
    if test is None:
        return None
    released = answers_of_chosen(compressed, threads=run.serving.threads)
    scores = final_scores(task, test, {"federated": result.federated}, released)
    return statement_of(task, scores, test)
