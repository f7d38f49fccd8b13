"""`fedcore.evaluate`: any model, evaluated on the data of each simulated client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcore.artifacts.manifest import MAX_MODEL_BYTES
from fedcore.config.owner import OPEN_POLICY, OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, DataError, InvalidUpdate, PrivacyError
from fedcore.files import read_bytes, sha256_hex
from fedcore.flower.quiet import quiet
from fedcore.observability.console import shown
from fedcore.observability.events import Sink, StageAdvanced
from fedcore.observability.words import counted
from fedcore.privacy.contributions import noised_limits
from fedcore.seeds import numpy_rng
from fedcore.task.definition import Part, Task, data_folder
from fedcore.task.model import FullModel, build_model, checkpoint_bytes, load_preprocess
from fedcore.training.evaluate import output_shape
from fedcore.training.roles import is_judge
from fedcore.updates.frozen import load_frozen
from fedcore.updates.pack import unpack
from server.after_rounds import StageLog
from server.api.arguments import AnyModel, AnyRun, AnyTask, configured, loaded, model_of
from server.evaluation import ClientScores, Evaluation, NoiseStatement
from server.preflight import clients_of
from server.report.folder import CHECKPOINT
from server.simulation.checkpoint import read_checkpoint
from server.simulation.evaluating import Unmeasured, VirtualClients

_MAX_CLIENTS = 1000
"""Clients that are evaluated unless the caller says otherwise; a task may have millions."""
_STEPS = 20  # events of progress, at most


def evaluate(
    task: AnyTask | None,
    run: AnyRun | None,
    model: AnyModel | bytes,
    *,
    clients: int | Sequence[str] | None = None,
    data: Part | None = None,
    owner: OwnerPolicy = OPEN_POLICY,
    progress: bool | Sink = True,
    **settings: Any,
) -> Evaluation:
    """Evaluates a model on the data of each simulated client, which stays where it is.

    Under example-level privacy each client gives the primary metric's sums over held-out data, with
    noise.

    Example::

        found = fedcore.evaluate(task, "run.toml", result.federated)
        found.spread("accuracy").mean, [each.client for each in found.worst(3)]
        onnx = result.compressed.files["int8_static"]
        print(fedcore.evaluate(task, "run.toml", onnx, clients=50))

    Args:
        task: A task, or the file that defines one; None for the task that the run names.
        run: The run, or its file; ``federation.holdout``, ``[serving]`` and the seed are used. None
            for default settings.
        model: A torch model, the bytes of an ONNX file, or the path of a checkpoint
            (``.safetensors``, also that of an interrupted run) or of an ONNX file (``.onnx``). An
            ONNX file must be trusted: it runs in this process, without limits.
        clients: How many clients to draw by the run's seed, or their names; None for all, or for
            1000 if the task has more.
        data: Which of a client's examples to use. None: those that it holds back from training; if
            the run holds none back, its test data (``client_test``); without them all of its data.
        owner: The policy that virtual clients enforce.
        progress: Whether to show progress, or a callback that receives the events.
        settings: Sections or settings of the run to override.

    Returns:
        Each client's metrics, their spread, and the clients that could not evaluate the model.

    Raises:
        ConfigError: the task has no client of that name, or no such data.
        PrivacyError: the run protects clients, or examples other than those held back: no noise
            covers what metrics tell of them.
        DataError: the model can't be read, doesn't belong to the task, or no client could evaluate
            it.
    """
    config = configured(task, run, settings)
    found = loaded(task, config)
    refuse_private(config, owner, data)
    quiet()
    part = _part(found, config, data)
    known = clients_of(found, config, data_folder())
    if part == "heldout":
        known = _holding_back(found, config, known, clients)
    names = _names(found, known, clients, seed=config.seed)
    of, raw, taken = _model(model, found, config)
    noise = _noise(found, config, taken)
    limits, metrics = (noise.limits, found.metrics[:1]) if noise else (None, found.metrics)
    virtual = VirtualClients(config, found, owner)
    scores, failed = list[ClientScores](), dict[str, str]()
    with shown(progress) as emit, StageLog(emit).stage("evaluate", len(names)) as said:
        step = -(-len(names) // _STEPS)
        for done, each in enumerate(virtual.measure(taken, names, part), start=1):
            if isinstance(each, Unmeasured):
                failed[each.client] = each.reason
            else:
                scores.append(ClientScores.of(*each, metrics, limits))
            if done % step == 0:
                emit(StageAdvanced("evaluate", done, ""))
        _refuse_none(found, scores, failed)
        said.append(f"{counted(len(scores), 'client')} measured it")
    return Evaluation(
        model=of,
        sha256=sha256_hex(raw),
        part=part,
        metrics=metrics,
        clients=tuple(sorted(scores, key=lambda each: each.client)),
        failed=failed,
        known=len(known),
        noise=noise,
    )


def _noise(task: Task, run: RunConfig, model: FullModel | bytes) -> NoiseStatement | None:
    """Returns what noise clients add; None without privacy."""
    if not run.private:
        return None
    of = model if isinstance(model, FullModel) else build_model(task, run)
    limits = noised_limits(run, task.primary, output_shape(of, task.example_input))
    return NoiseStatement.of(run, limits)


def refuse_private(run: RunConfig, owner: OwnerPolicy, data: Part | None) -> None:
    """Rejects an evaluation that noise does not cover.

    Under example-level privacy clients add noise to the sums over their held-out data.

    Raises:
        PrivacyError: the run, or the owner's policy, protects clients; or it protects examples, and
            other data than those held back are asked for, or none are.
    """
    run = tighten(run, owner)
    unit = run.privacy.unit
    if unit == "none":
        return
    if not run.client_private and data in (None, "heldout"):
        if run.evaluates_privately:
            return
        raise PrivacyError(
            f"privacy.unit = {unit!r}: clients evaluate with noise on data that they hold back, "
            "and this run has none. Nothing was evaluated; run it with federation.evaluate_cohort "
            "and federation.holdout, so that training leaves them out."
        )
    raise PrivacyError(
        f"privacy.unit = {unit!r}: a client's exact metrics tell of its examples, and no noise "
        "covers them. Nothing was evaluated; evaluate on data that need no protection "
        "(privacy.unit = 'none', in a simulation of public data), or judge on the cloud's."
    )


def _part(task: Task, run: RunConfig, requested: Part | None) -> Part:
    """Returns which of a client's examples to use, and checks that there are such."""
    if requested == "heldout" and not run.federation.holdout:
        raise ConfigError(
            "data = 'heldout': federation.holdout is 0, so no client holds data back. Nothing was "
            "evaluated; set federation.holdout to what it was in training, or choose other data."
        )
    if requested == "test" and task.client_test is None:
        raise ConfigError(
            f"data = 'test': task {task.name!r} has no client_test. Nothing was evaluated; give "
            "the task one, or choose other data."
        )
    if requested is not None:
        return requested
    if run.federation.holdout:
        return "heldout"
    return "all" if task.client_test is None else "test"


def _holding_back(
    task: Task, run: RunConfig, known: Sequence[str], requested: int | Sequence[str] | None
) -> Sequence[str]:
    """Returns the clients that hold data back: all, unless some hold back all of theirs.

    Raises:
        ConfigError: a client is asked for that holds nothing back.
    """
    if not run.federation.has_judges:
        return known
    named = [] if requested is None or isinstance(requested, int) else requested
    for name in [named] if isinstance(named, str) else named:
        if name in known and not is_judge(run.federation, name):
            raise ConfigError(
                f"clients: {name!r} trains, and federation.holdout_by = 'clients' has others of "
                f"task {task.name!r} hold back all of their data. Nothing was evaluated; name "
                "those, or choose other data (--data test, --data all)."
            )
    return [name for name in known if is_judge(run.federation, name)]


def _names(
    task: Task, known: Sequence[str], requested: int | Sequence[str] | None, *, seed: int
) -> Sequence[str]:
    """Returns the names of the clients to ask: as named, or drawn, in the task's order."""
    if requested is not None and not isinstance(requested, int):
        names = [requested] if isinstance(requested, str) else list(requested)
        strange = sorted(set(names) - set(known))
        if strange or not names:
            wrong = f"{strange[0]!r} is none of them" if strange else "none is named"
            raise ConfigError(
                f"clients: task {task.name!r} has {counted(len(known), 'client')}, and {wrong}. "
                "Nothing was evaluated; name clients of the task, or how many to draw."
            )
        return list(dict.fromkeys(names))
    size = min(_MAX_CLIENTS if requested is None else requested, len(known))
    if size < 1:
        raise ConfigError(f"clients = {requested}: expected at least 1. Nothing was evaluated.")
    drawn = numpy_rng(seed, "evaluate").choice(len(known), size=size, replace=False)
    return [known[int(place)] for place in sorted(drawn)]


def _model(
    model: AnyModel | bytes, task: Task, run: RunConfig
) -> tuple[str, bytes, FullModel | bytes]:
    """Returns what a model is called, its bytes, and the model itself or its ONNX file."""
    if isinstance(model, bytes):
        return "an ONNX file", model, model
    if isinstance(model, FullModel):
        return "a model in memory", checkpoint_bytes(model), model
    path = Path(model)
    if path.suffix == ".onnx":
        onnx = read_bytes(path, max_bytes=MAX_MODEL_BYTES, what="an ONNX file")
        return str(path), onnx, onnx
    if path.is_dir():
        raise ConfigError(
            f"{path}: this is a folder. Nothing was evaluated; name a file in it: a checkpoint "
            "such as global.safetensors, or a candidate such as candidates/fp32.onnx."
        )
    if path.name == CHECKPOINT:
        taken = _interrupted(path, task, run)
        return f"{path} (the best round so far)", checkpoint_bytes(taken), taken
    taken = model_of(path, task, run)
    return str(path), checkpoint_bytes(taken), taken


def _interrupted(path: Path, task: Task, run: RunConfig) -> FullModel:
    """Returns the best model so far of an interrupted run.

    Raises:
        DataError: the checkpoint can't be read, or is of another model.
    """
    progress, model = read_checkpoint(path).progress, build_model(task, run)
    try:
        load_preprocess(progress.preprocess, model)
        load_frozen(progress.frozen, model.model)
        unpack(progress.best, model.model)
    except InvalidUpdate as error:
        raise DataError(
            f"{path}: this checkpoint is of another model than that of task {task.name!r}: {error}"
        ) from None
    return model.eval()


def _refuse_none(task: Task, scores: Sequence[ClientScores], failed: Mapping[str, str]) -> None:
    """Rejects an evaluation in which no client has a value of the primary metric.

    Raises:
        DataError: there is none.
    """
    name = task.primary.name
    if any(name in each.metrics for each in scores):
        return
    reason = next(iter(failed.values()), f"{name} is undefined on the data of each of them")
    raise DataError(
        f"task {task.name!r}: none of {counted(len(scores) + len(failed), 'client')} could "
        f"evaluate the model. First: {reason}"
    )
