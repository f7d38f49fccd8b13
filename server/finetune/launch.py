"""Fine-tuning with a quality gate, in this process or in several started by torchrun.

In: the federated model and the cloud's data. Out: a `Finetuned`. Start with `fine_tune`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedcore.artifacts.manifest import CloudStatement
from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, FedcoreError, RoundFailed, TrainingError
from fedcore.files import sha256_hex, write_atomic
from fedcore.observability.events import Event, Sink, counted_steps, nowhere
from fedcore.observability.foreign import say
from fedcore.seeds import kept_streams
from fedcore.task.definition import Task, size_of
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel, build_model, checkpoint_bytes, load_checkpoint
from fedcore.training.evaluate import evaluate
from server.cloud import CloudData
from server.finetune.agent import launch
from server.finetune.auto import AutoChoice, choose
from server.finetune.curve import Curve
from server.finetune.failures import unknown_failure
from server.finetune.job import Job, places_of, remember_by_start, settings_digest, trained
from server.finetune.loop import train_start
from server.finetune.parallel import device_of
from server.finetune.progress import TrainingProgress, followed
from server.process.signals import stop_requested
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge

_UNUSED = "Expected to have finished reduction in the prior iteration"
"""Part of DDP's error where a later step leaves a parameter unused. The same seed gives the same
bits again, once DDP looks for such parameters."""


@dataclass(frozen=True)
class Finetuned:
    """The result of fine-tuning; models are on the CPU and in evaluation mode.

    Example::

        tuned = fedcore.finetune(task, "run.toml", result.federated)
        if not tuned.kept:
            print(f"worse on held-out data: {tuned.before} before, {tuned.after} after")
        compressed = fedcore.compress(task, "run.toml", tuned.model)
    """

    model: FullModel = field(repr=False)
    """The model for later steps: the fine-tuned one, or the federated one if the gate rejected
    it."""
    candidate: FullModel = field(repr=False)
    """The fine-tuned model, whether or not the gate kept it."""
    cloud_alone: FullModel | None = field(repr=False)
    """A freshly initialised network, trained only on the cloud's data, for comparison; None where
    those data are private, so that it takes nothing from their budget."""
    kept: bool
    before: float
    after: float
    """The primary metric on the cloud's held-out data, before and after fine-tuning."""
    clients: Judgement | None = None
    """Measurements by clients; None if they weren't asked, or none answered."""
    unjudged: str = ""
    """Reason why the requested evaluation by clients failed; empty otherwise."""
    curve: tuple[float, ...] = field(default=(), repr=False)
    """Mean loss of each step of ``candidate``, over all processes; empty where a live server has
    read the result back. NaN where the cloud's data are private: no loss is computed."""
    notes: tuple[str, ...] = ()
    """What the user should know about the way it was trained."""
    auto: AutoChoice | None = field(default=None, repr=False)
    """What ``finetune.auto`` tried and chose; None without it."""
    privacy: CloudStatement | None = None
    """Guarantee of the cloud's examples; None without ``finetune.privacy``."""
    parent_sha256: str = field(kw_only=True)
    """SHA-256 of the checkpoint of the original federated model, for the manifest of a release."""
    model_sha256: str = field(init=False, repr=False)
    """SHA-256 of the checkpoint of ``model`` as fine-tuning made it, whatever changes it later."""

    def __post_init__(self) -> None:
        digest = sha256_hex(checkpoint_bytes(self.model))
        object.__setattr__(self, "model_sha256", digest)


def fine_tune(
    task: Task,
    run: RunConfig,
    model: FullModel,
    cloud: CloudData,
    judge: Judge | None = None,
    *,
    emit: Sink = nowhere,
    auto_file: Path | None = None,
) -> Finetuned:
    """Trains the federated model on the cloud's data, and an untrained one for comparison.

    The first is held to the federated model's answers by ``finetune.remember``. The gate keeps it
    only if the metric on held-out data isn't worse than before by more than
    ``finetune.max_metric_drop``. The data is the clients' if there is a ``judge``, else the
    cloud's; ``finetune.judge`` can require both.

    With one process, training runs here and restores the random streams afterwards. Several
    processes are started by torchrun, and load the task from its file.

    With ``finetune.auto`` both are trained in the way that short trials show to be the fastest. The
    choice is read from ``auto_file`` if that has one for the same settings and data, else written.

    With ``finetune.privacy``, DP-SGD trains the first model on data that no other step reads, and
    the cloud's ledger is charged before. The second model is then left out.

    With ``finetune.checkpoints``, training continues from the last checkpoint after a fault or an
    interrupt, also in a later call with the same model and settings.

    Guarantee:
        The run's seed determines every bit of both models, in whichever process they are trained,
        and however often training was interrupted. With ``finetune.communication = "powersgd"``,
        an interrupted training is an exception: its continuation has other bits, as what the
        low-rank factors missed is not part of a checkpoint. With ``finetune.privacy``, batches and
        noise come from the operating system, and nothing can be repeated.

    Raises:
        TrainingDiverged: a loss was not finite.
        TrainingError: a process or the task's code failed.
        PrivacyError: the cloud's privacy budget is spent, or the model cannot be trained privately.
        DataError: ``model`` doesn't belong to this task, or a checkpoint is corrupt.
        DiskFull: a checkpoint could not be written.
        KeyboardInterrupt: Ctrl-C, or with checkpoints SIGTERM, after writing a checkpoint.
    """
    parent, choice = checkpoint_bytes(model), None
    if run.finetune.auto:
        choice = choose(run, model, cloud, kept=auto_file, note=counted_steps(emit, "finetune"))
        run = choice.applied(run)
    models = {"finetuned": parent}
    if not run.finetune.private:
        untrained = build_model(task, run)
        untrained.preprocess.load_state_dict(model.preprocess.state_dict())
        models["cloud_alone"] = checkpoint_bytes(untrained)
    with _charged(run, size_of(cloud.of_tuning), parent) as (run, statement):
        found = _trained_from(task, run, cloud, models, emit)
    candidate, cloud_alone = found.models[0], found.models[1] if len(found.models) > 1 else None
    primary = task.primary
    before = evaluate(model, cloud.heldout, [primary])[primary.name]
    after = evaluate(candidate, cloud.heldout, [primary])[primary.name]
    asked, unjudged = None, ""
    if judge is not None:
        try:
            asked = judge(model, candidate)
        except RoundFailed as error:
            unjudged = str(error)
    kept = not unjudged and passes(run.finetune, primary, before, after, asked)
    return Finetuned(
        candidate if kept else model,
        candidate,
        cloud_alone,
        kept,
        before,
        after,
        asked,
        unjudged,
        found.curves[0],
        (*([str(choice)] if choice else []), *found.notes),
        choice,
        statement,
        parent_sha256=sha256_hex(parent),
    )


@contextmanager
def _charged(
    run: RunConfig, examples: int, start: bytes
) -> Iterator[tuple[RunConfig, CloudStatement | None]]:
    """Yields the run with its noise, and what private fine-tuning spends; None without privacy."""
    if not run.finetune.private:
        yield run, None
        return
    from server.finetune.cloud_ledger import charged
    from server.finetune.private_plan import plan_of, with_noise

    plan = plan_of(run, examples)
    run = with_noise(run, plan)
    described = f"{settings_digest(run)} {examples} {run.task} {sha256_hex(start)}"
    with charged(run, plan, identity=sha256_hex(described.encode())) as statement:
        yield run, statement


def tune(
    task: Task, run: RunConfig, model: FullModel, cloud: CloudData, *, name: str, emit: Sink
) -> FullModel:
    """Returns a copy of a global model that was trained on the cloud's data, without a gate.

    It is held to the model's answers by ``finetune.remember``. Progress goes to ``emit`` as that of
    the model ``name``.

    Guarantee:
        The run's seed and the model determine every bit; after an interrupted training only as
        `fine_tune` says.

    Raises:
        TrainingDiverged: a loss was not finite.
        TrainingError: a process or the task's code failed.
    """
    starts = {name: checkpoint_bytes(model)}
    (tuned,) = _trained_from(task, run, cloud, starts, emit).models
    return tuned


@dataclass(frozen=True)
class _TrainedModels:
    models: Sequence[FullModel]
    curves: Sequence[tuple[float, ...]]
    """The losses of each."""
    notes: tuple[str, ...] = ()


def join(task: Task, run: RunConfig, cloud: CloudData) -> None:
    """Trains along with a node that fine-tunes: this one has no model, and keeps no result.

    Raises:
        ConfigError: ``finetune.nodes`` is 1, or the nodes have different settings.
        TrainingError: the nodes did not meet, or training failed.
        FedcoreError: what a process of this node raised.
        KeyboardInterrupt: Ctrl-C or SIGTERM, which ends training in all nodes.
    """
    if run.finetune.nodes == 1:
        raise ConfigError(
            "finetune.nodes = 1: there is nothing to join. Nothing was trained; set the number of "
            "nodes and finetune.rendezvous, the same ones on every node."
        )
    untrained = checkpoint_bytes(build_model(task, run))
    names = ["finetuned", "cloud_alone"]
    if run.finetune.private:
        from server.finetune.private_plan import plan_of, with_noise

        names, run = names[:1], with_noise(run, plan_of(run, size_of(cloud.of_tuning)))
    starts = dict.fromkeys(names, untrained)
    results = [build_model(task, run) for _ in starts]
    places = places_of(run, list(starts.values()), size_of(cloud.of_tuning))
    _train_apart(run, starts, results, places, nowhere, joins=True)


def _trained_from(
    task: Task, run: RunConfig, cloud: CloudData, starts: Mapping[str, bytes], emit: Sink
) -> _TrainedModels:
    """Trains a model from each checkpoint, by the name of its progress; the first is federated."""
    results = [build_model(task, run) for _ in starts]
    places = places_of(run, list(starts.values()), size_of(cloud.of_tuning))
    if run.finetune.processes == run.finetune.nodes == 1:
        found = _train_here(task, run, cloud, starts, results, places, emit)
    else:
        found = _train_apart(run, starts, results, places, emit)
    for place in places:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)  # another node may do so, too
    return found


def passes(
    limits: Finetune, primary: Metric, before: float, after: float, asked: Judgement | None
) -> bool:
    """Returns whether the gate admits a fine-tuned model.

    Args:
        limits: ``max_metric_drop``, and whether both clients and cloud must agree.
        primary: The metric.
        before: The federated model's metric on the cloud's held-out data.
        after: The fine-tuned model's metric on the cloud's held-out data.
        asked: Measurements by clients, which then decide; None if clients weren't asked.
    """
    drops = [] if asked is None else [asked.worsening(primary)]
    if asked is None or limits.judge == "both":
        drops.append(primary.worsening(before, after))
    return all(drop <= limits.max_metric_drop for drop in drops)  # NaN fails


def _train_here(
    task: Task,
    run: RunConfig,
    cloud: CloudData,
    starts: Mapping[str, bytes],
    results: Sequence[FullModel],
    places: Sequence[Path | None],
    emit: Sink,
) -> _TrainedModels:
    """Trains each result from its start, in this process."""
    device, curves, failed = device_of(0), list[Curve](), list[Exception]()

    def show(event: Event) -> None:
        try:
            emit(event)
        except Exception as error:  # not one of training
            failed.append(error)
            raise

    try:
        with kept_streams(), _stop(places) as asked:
            remembered = remember_by_start(run, len(starts))
            for number, ((name, start), result, remember, place) in enumerate(
                zip(starts.items(), results, remembered, places, strict=True), 1
            ):
                load_checkpoint(start, result, where="the model to fine-tune")
                curves.append(Curve(None if place is None else place / "curve.jsonl"))
                train_start(
                    result.to(device),
                    task,
                    cloud.of_tuning,
                    run,
                    device,
                    remember=remember,
                    place=place,
                    stop=asked,
                    curve=curves[-1],
                    on_part=TrainingProgress(show, name, len(starts) - number),
                )
                result.to("cpu").eval()
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        if error in failed:
            raise
        raise TrainingError(unknown_failure(0, error)) from error
    return _TrainedModels(results, [curve.losses for curve in curves])


@contextmanager
def _stop(places: Sequence[Path | None]) -> Iterator[Callable[[], bool] | None]:
    """Yields whether Ctrl-C or SIGTERM asked training to stop; None where nothing is saved."""
    if not any(places):
        yield None
        return
    with stop_requested(lambda: say("Stopping after a checkpoint.", to=sys.stderr)) as asked:
        yield asked


def _train_apart(
    run: RunConfig,
    starts: Mapping[str, bytes],
    results: Sequence[FullModel],
    places: Sequence[Path | None],
    emit: Sink,
    *,
    joins: bool = False,
) -> _TrainedModels:
    """Trains each result from its start, in new processes that load the task from its file."""
    with tempfile.TemporaryDirectory(prefix="fedcore-finetune-") as folder:
        paths = [Path(folder) / f"start-{number}.safetensors" for number in range(len(starts))]
        for path, start in zip(paths, starts.values(), strict=True):
            write_atomic(path, start)
        job = Job(
            run=run.model_dump_json(),
            base=str(run.base),
            starts=tuple(map(str, paths)),
            folder=folder,
            models=tuple(starts),
            places=tuple(None if place is None else str(place) for place in places),
            joins=joins,
        )
        with followed(job.progress_file, emit):
            try:
                launch(job)
            except TrainingError as error:
                if _UNUSED not in str(error):
                    raise
                launch(replace(job, unused=True))
        for path, result in zip(map(trained, paths), results, strict=True):
            load_checkpoint(path.read_bytes(), result.eval(), where=str(path))
        curves = [Curve(job.curve_file(number)) for number in range(len(starts))]
        notes = job.notes_file.read_text().splitlines() if job.notes_file.exists() else []
        losses = [curve.losses for curve in curves]
        return _TrainedModels(results, losses, tuple(dict.fromkeys(notes)))
