"""Steps that run one step of what clients do: normalise, train alone and side by side, evaluate."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedcore.config.in_round import client_in_round, planned_epochs
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import Privacy, RunConfig
from fedcore.config.schedule import NO_SCHEDULE
from fedcore.errors import ConfigError, FedcoreError, TaskError
from fedcore.observability.words import counted
from fedcore.privacy.accounting import Charge
from fedcore.privacy.draws import SystemDraws
from fedcore.privacy.ledger import Ledger
from fedcore.privacy.planning import PrivatePlan, plan_for
from fedcore.seeds import Simulated, kept_streams
from fedcore.task.definition import Examples, Task, size_of
from fedcore.task.model import (
    FullModel,
    build_model,
    load_preprocess,
    preprocess_bytes,
    standardise_of,
    warm_start,
)
from fedcore.training.batches import gather_all
from fedcore.training.client import Client, learn
from fedcore.training.evaluate import measure
from fedcore.training.per_example.trial import choose_method
from fedcore.training.private import train_private
from fedcore.training.roles import is_judge
from fedcore.training.state import check_integers
from fedcore.updates.frozen import frozen_state
from fedcore.updates.messages import FROZEN, TRAIN_LOSS, Instruction, Update
from fedcore.updates.pack import layout_of, pack, unpack
from server.checking.looking import DataFault
from server.checking.state import CheckState, Fault, StepOutcome
from server.preflight import (
    check_strategy,
    refuse_patience,
    refuse_tuning,
    training_clients,
)
from server.rounds.client_privacy.mechanism import protect
from server.rounds.expected import evaluation_of
from server.simulation.batched.trainer import Trainer, find_trainer, train_in_groups
from server.simulation.batched.work import LocalWork

_TRIED = 1000  # client names for a strategy; a task may have millions
_LONG_S = 6.0  # after which no other client trains
_ROSE = 3.0  # times the loss before training, which is noted
_GREW = 100.0  # times the loss before training
_TINY = 1e-3
_WAYS = {
    "chain": "fastest method, for a chain of known layers",
    "vmap": "all examples of a batch at once",
    "alone": "one example at a time, which is slow",
}


def compute_loss(state: CheckState) -> StepOutcome:
    """Computes the loss of every rehearsed client, and normalisation where the run asks for it."""
    if state.run.federation.normalisation != "task":
        _normalise(state)
    values, faults = [], []
    for name, examples in state.trained_on.items():
        inputs, targets = gather_all(examples)
        try:
            value = state.task.loss_of(state.outputs(inputs), targets)
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            faults.append(_fault(name, "loss", f"{type(error).__name__}: {error}"))
            continue
        if not isinstance(value, Tensor) or value.ndim or not torch.isfinite(value):
            got = value.tolist() if isinstance(value, Tensor) else type(value).__name__
            text = f"the loss is {got}, expected one finite number, the mean"
            faults.append(_fault(name, "loss", f"{text} over the batch"))
            continue
        values.append(float(value))
    if not values:
        return StepOutcome("not computed", faults)
    return StepOutcome(f"{_span(values)} before training", faults)


def _normalise(state: CheckState) -> None:
    """Sets mean and deviation from the rehearsed clients' examples."""
    first = next(iter(state.model.preprocess.children()))
    with torch.inference_mode():
        parts = [first(gather_all(each)[0]).double() for each in state.trained_on.values()]
    values, target = torch.cat(parts), standardise_of(state.model)
    deviation = values.std(dim=0, correction=0)
    constant = deviation < 1e-6 * values.mean(dim=0).abs().clamp(min=1.0)
    with torch.no_grad():
        target.mean.copy_(values.mean(dim=0))
        target.deviation.copy_(torch.where(constant, 1.0, deviation))


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


def _fault(client: str | None, kind: str, text: str, *, required: bool = True) -> Fault:
    return Fault(client, DataFault(kind, None, text, required=required))


def rehearsed(state: CheckState) -> tuple[Task, RunConfig]:
    """Returns task and run for one epoch without privacy on the few examples of each client."""
    parts = state.trained_on
    first = client_in_round(state.run, 1)
    run = state.run.model_copy(
        update={
            "client": first.model_copy(
                update={"epochs": 1, "steps": None, "schedule": NO_SCHEDULE}
            ),
            "privacy": Privacy(),
            "federation": state.run.federation.model_copy(update={"holdout": 0.0}),
        }
    )
    return replace(state.task, client_data=lambda name, folder: parts[name]), run


def _instruction(state: CheckState) -> Instruction:
    model, frozen = state.model, frozen_state(state.model.model)
    return Instruction(
        round=1,
        weights=pack(model.model),
        layout=layout_of(model.model).digest,
        preprocess=preprocess_bytes(model),
        proximal_mu=0.0,
        frozen_sha256=frozen.sha256,
        frozen=frozen.record[FROZEN] if frozen.raw else None,
    )


def train_clients(state: CheckState) -> StepOutcome:
    """Trains each rehearsed client for an epoch, one by one, as a device would."""
    task, run = rehearsed(state)
    client = Client(task, run, OPEN_POLICY, Simulated(run.seed))
    instruction, losses, faults = _instruction(state), list[float](), list[Fault]()
    first: Update | None = None
    began_s = time.monotonic()
    for name, examples in list(state.trained_on.items()):
        if losses and time.monotonic() - began_s > _LONG_S:
            del state.trained_on[name]  # a large model: some clients must do
            continue
        before = _mean_loss(state, examples, state.model)
        try:
            update = learn(client, name, instruction, Ledger(), on_spend=lambda ledger: None)
        except FedcoreError as error:
            faults.append(_fault(name, "training", str(error)))
            continue
        except (Exception, SystemExit) as error:  # the task's code may raise anything
            faults.append(_fault(name, "training", f"{type(error).__name__}: {error}"))
            continue
        after = _mean_loss(state, examples, client.resident.model)
        least = min(after, update.metrics[TRAIN_LOSS])
        after = max(after, update.metrics[TRAIN_LOSS])  # the first one, if that is NaN
        losses.append(after)
        if not after <= _GREW * max(before, _TINY):  # also true for NaN
            text = (
                f"training diverges: the mean loss was {before:.4g} before an epoch on "
                f"{counted(size_of(examples), 'example')} and rose to {after:.4g}; lower "
                f"client.learning_rate ({run.client.learning_rate:g}), or scale the inputs in "
                "preprocess, or set federation.normalisation"
            )
            faults.append(_fault(name, "training", text))
            continue
        if least > _ROSE * max(before, _TINY):
            text = (
                f"the mean loss rose from {before:.4g} to {after:.4g} in an epoch: lower "
                "client.learning_rate, or scale the inputs, as federation.normalisation does"
            )
            faults.append(_fault(name, "rising loss", text, required=False))
        first = first or update
    if first is not None:
        unpack(first.weights, state.model.model)
    if not losses:
        return StepOutcome("no client could be trained", faults)
    names = ", ".join(map(repr, state.trained_on))
    text = f"one epoch each on some examples of {names}: mean loss {_span(losses)}"
    return StepOutcome(text, faults)


def _mean_loss(state: CheckState, examples: Examples, model: FullModel) -> float:
    """Returns the mean loss in evaluation mode."""
    inputs, targets = gather_all(examples)
    with torch.inference_mode():
        return float(state.task.loss_of(model.eval()(inputs), targets))


def train_side_by_side(state: CheckState) -> StepOutcome:
    """Trains the rehearsed clients in vectorised batches, if the run would."""
    how = state.run.simulation.training
    if how == "loop" or state.place != "simulation":
        return StepOutcome("not used: clients train one at a time")
    task, run = rehearsed(state)
    private = run.model_copy(update={"privacy": state.run.privacy})
    client = Client(task, private, OPEN_POLICY, Simulated(run.seed))
    model = client.resident.load(_instruction(state))
    cpu, randomness = torch.device("cpu"), Simulated(run.seed)
    work = [
        LocalWork(examples, partial(randomness.generator, cpu, "order", 1, name))
        for name, examples in state.trained_on.items()
    ]
    with kept_streams():
        found = find_trainer(client, client.resident, work[0], run.client)
        if not isinstance(found, Trainer):
            if how == "vectorised":
                raise ConfigError(f"simulation.training = 'vectorised': {found}; use 'auto'.")
            return StepOutcome(f"not used: {found}")
        if state.run.private:
            return StepOutcome("supported: clients train together in vectorised batches")
        model = client.resident.load(_instruction(state))
        groups = train_in_groups(found, model, work, client, run.client, 0.0)
    names, faults = list(state.trained_on), []
    for places, trained in groups:
        finite = torch.isfinite(trained.weights).all(dim=1).tolist()
        for place, whole, loss in zip(places, finite, trained.losses, strict=True):
            if not whole or (loss is not None and not math.isfinite(loss)):
                text = "trained side by side, its weights or loss are not finite"
                faults.append(_fault(names[place], "training", text))
    return StepOutcome(f"{counted(len(work), 'client')} together in vectorised batches", faults)


def keep_state(state: CheckState) -> StepOutcome:
    """Checks that all state which training changes travels in an update."""
    twin = build_model(state.task, state.run)
    load_preprocess(preprocess_bytes(state.model), twin)
    unpack(pack(state.model.model), twin.model)
    inputs, _ = state.sample_batch()
    expected = state.outputs(inputs)
    with torch.inference_mode():
        got, again = twin.eval()(inputs), state.outputs(inputs)
    if not torch.equal(expected, again):
        return StepOutcome("not compared: the model draws random numbers in evaluation")
    if torch.allclose(got, expected, rtol=1e-4, atol=1e-6, equal_nan=True):
        return StepOutcome("a new model with the update's weights gives the same outputs")
    most = float((got - expected).abs().max())
    raise TaskError(
        f"a new model with the trained weights gives other outputs (by up to {most:.3g}): the "
        "model keeps state that does not travel between server and clients, as only parameters "
        "and buffers do. Keep it in a buffer (register_buffer)."
    )


def compute_metrics(state: CheckState) -> StepOutcome:
    """Evaluates the model on every rehearsed client; names clients where a metric is undefined."""
    metrics = state.task.metrics
    by_client = {
        name: measure(state.model, examples, metrics) for name, examples in state.trained_on.items()
    }
    faults, said = list[Fault](), list[str]()
    for metric in metrics:
        found = {name: measured.judged(metric) for name, measured in by_client.items()}
        values = [value for value, why in found.values() if not why]
        for name, (_, why) in found.items():
            failed = metric.name in by_client[name].faults
            if why:
                text = f"metric {metric.name!r} {'failed' if failed else 'is undefined'}: {why}"
                required = failed and not values
                faults.append(_fault(name, "metric", text, required=required))
        said.append(f"{metric.name} {_span(values)}" if values else f"{metric.name} undefined")
    return StepOutcome(", ".join(said), faults)


def try_strategy(state: CheckState) -> StepOutcome:
    """Makes all checks that a run makes before its rounds; tries the strategy on made-up updates.

    What example-level privacy needs of a model is a step of its own.
    """
    run = state.run
    clients = training_clients(run, state.names, most=min(run.federation.cohort or _TRIED, _TRIED))
    refuse_patience(run, state.task)
    refuse_tuning(run, state.task)
    model = build_model(state.task, run)
    if run.federation.initial is not None:
        warm_start(run, model)
    if run.federation.evaluate_cohort:
        evaluation_of(run, state.task.metrics, tuple(state.output_shape))
    if run.client_private:
        check_integers(state.task, model)
        if state.place == "simulation":
            clients_of_run = len(state.names)
            protect(run, clients=clients_of_run, cohort=run.federation.cohort or clients_of_run)
    return StepOutcome(check_strategy(state.run, state.model, clients=clients))


def train_privately(state: CheckState) -> StepOutcome:
    """Runs one private step for each rehearsed client, even if privacy is off.

    So enabling it later can't surprise.
    """
    model, run = build_model(state.task, state.run), state.run
    load_preprocess(preprocess_bytes(state.model), model)
    method = choose_method(state.task, model)
    if run.private:  # rejects a delta that protects nobody on a client of this size
        rounds = run.federation.rounds
        sizes = [n for name, n in state.sizes.items() if not is_judge(run.federation, name)]
        for count in {min(sizes), max(sizes)} if sizes else ():
            plan_for(
                count,
                client_in_round(run, 1),
                run.privacy,
                round=1,
                participations=rounds,
                epochs_in_all=planned_epochs(run, rounds),
            )
    charge = Charge(round=1, noise_multiplier=1.0, sample_rate=0.5, steps=2)
    plan = PrivatePlan(charge, clip_norm=run.privacy.clip_norm)
    faults = list[Fault]()
    for name, examples in state.trained_on.items():
        skipped = train_private(
            model.preprocess,
            model.model,
            examples,
            state.task.loss_of,
            run.client,
            plan,
            method=method,
            draws=SystemDraws(),
        )
        if skipped:
            text = f"{counted(skipped, 'example')} without a finite gradient counted as zero"
            faults.append(_fault(name, "gradient", text, required=False))
    said = f"example-level privacy: {_WAYS[method.name]}"
    return StepOutcome(said + (f" ({method.why})" if method.why else ""), faults)
