"""Fine-tuning with a quality gate, in this process or in several started by torchrun.

In: the federated model and the cloud's data. Out: a `Finetuned`. Start with `fine_tune`.
"""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import uuid
from _thread import interrupt_main
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import fedcore.errors as errors
from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import FedcoreError, RoundFailed, TrainingError
from fedcore.files import sha256_hex, write_atomic
from fedcore.seeds import kept_streams
from fedcore.task.definition import Task
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel, build_model, checkpoint_bytes, load_checkpoint
from fedcore.training.evaluate import evaluate
from server.cloud import CloudData
from server.finetune.job import Job, remember_by_start, trained
from server.finetune.loop import device_of, is_consequence, train_start, unknown_failure
from server.finetune.worker import work
from server.process.spawn import main_script_hidden
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge

_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")
"""Loggers that print a traceback per failed or stopped process; the error file replaces them."""
_UNUSED = "Expected to have finished reduction in the prior iteration"
"""Part of DDP's error where a later step leaves a parameter unused. The same seed gives the same
bits again, once DDP looks for such parameters."""
_HANDLED = (signal.SIGTERM, signal.SIGHUP)
"""Signals that torchrun forwards to its processes before it ends."""


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
    cloud_alone: FullModel = field(repr=False)
    """A freshly initialised network, trained only on the cloud's data, for comparison."""
    kept: bool
    before: float
    after: float
    """The primary metric on the cloud's held-out data, before and after fine-tuning."""
    clients: Judgement | None = None
    """Measurements by clients; None if they weren't asked, or none answered."""
    unjudged: str = ""
    """Reason why the requested evaluation by clients failed; empty otherwise."""
    parent_sha256: str = field(kw_only=True)
    """SHA-256 of the checkpoint of the original federated model, for the manifest of a release."""
    model_sha256: str = field(init=False, repr=False)
    """SHA-256 of the checkpoint of ``model`` as fine-tuning made it, whatever changes it later."""

    def __post_init__(self) -> None:
        digest = sha256_hex(checkpoint_bytes(self.model))
        object.__setattr__(self, "model_sha256", digest)


def fine_tune(
    task: Task, run: RunConfig, model: FullModel, cloud: CloudData, judge: Judge | None = None
) -> Finetuned:
    """Trains the federated model on the cloud's data, and an untrained one for comparison.

    The first is held to the federated model's answers by ``finetune.remember``. The gate keeps it
    only if the metric on held-out data isn't worse than before by more than
    ``finetune.max_metric_drop``. The data is the clients' if there is a ``judge``, else the
    cloud's; ``finetune.judge`` can require both.

    With one process, training runs here and restores the random streams afterwards. Several
    processes are started by torchrun, and load the task from its file.

    Guarantee:
        The run's seed determines every bit of both models, in whichever process they are trained.

    Raises:
        TrainingDiverged: a loss was not finite.
        TrainingError: a process or the task's code failed.
        DataError: ``model`` doesn't belong to this task.
    """
    parent = checkpoint_bytes(model)
    untrained = build_model(task, run)
    untrained.preprocess.load_state_dict(model.preprocess.state_dict())
    starts = (parent, checkpoint_bytes(untrained))
    candidate, cloud_alone = _trained_from(task, run, cloud, starts)
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
        parent_sha256=sha256_hex(parent),
    )


def tune(task: Task, run: RunConfig, model: FullModel, cloud: CloudData) -> FullModel:
    """Returns a copy of a global model that was trained on the cloud's data, without a gate.

    It is held to the model's answers by ``finetune.remember``.

    Guarantee:
        The run's seed and the model determine every bit.

    Raises:
        TrainingDiverged: a loss was not finite.
        TrainingError: a process or the task's code failed.
    """
    (tuned,) = _trained_from(task, run, cloud, [checkpoint_bytes(model)])
    return tuned


def _trained_from(
    task: Task, run: RunConfig, cloud: CloudData, starts: Sequence[bytes]
) -> list[FullModel]:
    """Trains a model from each checkpoint; the first is a federated one."""
    results = [build_model(task, run) for _ in starts]
    if run.finetune.processes == 1:
        _train_here(task, run, cloud, starts, results)
    else:
        _train_apart(run, starts, results)
    return results


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
    starts: Sequence[bytes],
    results: Sequence[FullModel],
) -> None:
    """Trains each result from its start, in this process."""
    device = device_of(0)
    try:
        with kept_streams():
            remembered = remember_by_start(run, len(starts))
            for start, result, remember in zip(starts, results, remembered, strict=True):
                load_checkpoint(start, result, where="the model to fine-tune")
                train_start(result.to(device), task, cloud.train, run, device, remember=remember)
                result.to("cpu").eval()
    except FedcoreError:
        raise
    except (Exception, SystemExit) as error:  # the task's code may raise anything
        raise TrainingError(unknown_failure(0, error)) from error


def _train_apart(run: RunConfig, starts: Sequence[bytes], results: Sequence[FullModel]) -> None:
    """Trains each result from its start, in new processes that load the task from its file."""
    with tempfile.TemporaryDirectory(prefix="fedcore-finetune-") as folder:
        paths = [Path(folder) / f"start-{number}.safetensors" for number in range(len(starts))]
        for path, start in zip(paths, starts, strict=True):
            write_atomic(path, start)
        job = Job(
            run=run.model_dump_json(),
            base=str(run.base),
            starts=tuple(map(str, paths)),
            folder=folder,
        )
        try:
            _launch(job, run.finetune.processes)
        except TrainingError as error:
            if _UNUSED not in str(error):
                raise
            _launch(replace(job, unused=True), run.finetune.processes)
        for path, result in zip(map(trained, paths), results, strict=True):
            load_checkpoint(path.read_bytes(), result.eval(), where=str(path))


def _launch(job: Job, processes: int) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # one machine: no listening to the network
        start_method="spawn",
        max_restarts=0,
        monitor_interval=0.05,
        signals_to_handle=",".join(number.name for number in _HANDLED),
        # Output of the processes would mix with the events of `--json`.
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(job.folder) / "logs"), redirects=Std.ALL),
    )
    try:
        with _quiet(), _signals(), main_script_hidden():
            elastic_launch(config, work)(job)
    except ChildFailedError as failure:
        raise _reason(job, failure) from failure
    except SignalException as stopped:
        raise KeyboardInterrupt from stopped


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences torchrun's log of failures on standard error."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _signals() -> Iterator[None]:
    """Hides Ctrl-C from processes started inside, and restores signal handlers afterwards.

    A terminal interrupts a program together with its children, and each child would print a
    traceback. Children inherit blocked signals, so SIGINT is blocked here, and a thread that waits
    for it interrupts the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals, in torchrun too
        return
    handlers = {number: signal.getsignal(number) for number in _HANDLED}
    finished = threading.Event()

    def watch() -> None:
        while signal.sigwait({signal.SIGINT}) and not finished.is_set():
            interrupt_main()

    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        signal.pthread_kill(watcher.ident or 0, signal.SIGINT)  # wakes only the watcher
        watcher.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _reason(job: Job, failure: ChildFailedError) -> FedcoreError:
    """Returns the error of the first process that failed, as if it had been raised here."""
    _, first = failure.get_first_failure()
    ranks = sorted(failure.failures, key=lambda rank: rank != first.local_rank)
    told = [json.loads(path.read_text()) for path in map(job.error_file, ranks) if path.exists()]
    if told:
        said = min(told, key=lambda one: is_consequence(one["message"]))
        kind: type[FedcoreError] = getattr(errors, said["type"])
        return kind(said["message"])
    return TrainingError(
        f"fine-tuning: process {first.local_rank} ended with exit code {first.exitcode} without "
        "giving a reason. The federated model is kept; run again, and check for a lack of memory "
        "if it fails again."
    )
