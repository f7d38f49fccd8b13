"""Finds settings of a run that contradict each other; a run's file with any is rejected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.config.addresses import check_bucket
from fedcore.config.in_round import schedule_problems
from fedcore.privacy.unsound import unsound

if TYPE_CHECKING:
    from fedcore.config.finetune import Finetune
    from fedcore.config.run import ClientConfig, ReleaseConfig, RunConfig
    from fedcore.config.simulated import DeviceClass


def contradictions(run: RunConfig) -> list[str]:
    """Returns each contradiction with its reason and remedy: unsound privacy first."""
    federation, privacy, compression = run.federation, run.privacy, run.compression
    found = unsound(run)
    found += of_optimizer("client", run.client, private=run.private)
    found += of_optimizer("finetune", run.finetune)
    found += schedule_problems(run)
    names = [device.name for device in run.simulation.devices]
    if len(set(names)) < len(names):
        found.append(
            "simulation.devices contains two classes of the same name: give each its own name."
        )
    if names and run.simulation.trace is not None:
        found.append(
            f"simulation.trace = {run.simulation.trace!r} contradicts simulation.devices: "
            "clients are described either by a trace or by device classes. Remove one of the two."
        )
    if federation.over_selection > 1 and federation.cohort is None:
        found.append(
            f"federation.over_selection = {federation.over_selection:g} needs federation.cohort: "
            "without it every client is selected, and none is left to over-select."
        )
    answering = _answering(run.simulation.devices) * federation.over_selection
    if answering < federation.quorum:
        found.append(
            f"federation.quorum = {federation.quorum:g} contradicts simulation.devices: with "
            f"their availability and dropout, {answering:.3g} of a cohort responds on average, "
            "so most rounds would fail. Lower the quorum, or make the devices more reliable."
        )
    if federation.evaluate_cohort and not federation.holdout:
        found.append(
            "federation.evaluate_cohort needs federation.holdout above 0: without it clients "
            "would report metrics on the data that they trained on."
        )
    if federation.holdout and not federation.evaluate_cohort:
        found.append(
            f"federation.holdout = {federation.holdout} withholds data from training that "
            "nothing would use: set federation.evaluate_cohort, or set holdout to 0."
        )
    found += _of_judges(run)
    if run.finetune.judge in ("clients", "both") and not federation.evaluate_cohort:
        found.append(
            f"finetune.judge = {run.finetune.judge!r} needs federation.evaluate_cohort: without "
            "it no client evaluates models on held-out data."
        )
    found += _of_tuning(run)
    found += _of_sharding(run.finetune)
    found += _of_nodes(run.finetune)
    found += _of_auto(run.finetune)
    found += _of_private_tuning(run.finetune)
    if privacy.participations and privacy.participations > federation.rounds:
        found.append(
            f"privacy.participations = {privacy.participations} is more than federation.rounds = "
            f"{federation.rounds}: no client can participate in more rounds than there are."
        )
    if len(set(compression.candidates)) < len(compression.candidates):
        found.append("compression.candidates lists a candidate twice: list each once.")
    if "fp32" not in compression.candidates:
        found.append("compression.candidates must contain 'fp32': the others are compared with it.")
    return found + _of_release(run.release)


def _of_judges(run: RunConfig) -> list[str]:
    """Returns the contradictions of clients that hold back all of their data."""
    federation, found = run.federation, list[str]()
    if federation.holdout_by == "clients" and not federation.holdout:
        found.append(
            "federation.holdout_by = 'clients' needs federation.holdout above 0, the share of "
            "clients that hold back all of their data. Set it, or leave holdout_by out."
        )
    if federation.has_judges and run.client.local:
        found.append(
            "federation.holdout_by = 'clients' contradicts client.local: a client that never "
            "trains has no layers of its own to evaluate a model with. Set holdout_by to 'rows', "
            "or leave client.local out."
        )
    return found


def _of_release(release: ReleaseConfig) -> list[str]:
    """Returns the contradictions of a release, and what is wrong with its bucket's address."""
    found = list[str]()
    if (release.repository is None) != (release.keys is None):
        found.append(
            "release.repository and release.keys must be set together: set both to publish, "
            "or neither."
        )
    if release.push is not None:
        if release.repository is None:
            found.append("release.push needs release.repository, whose copy it makes: set both.")
        if fault := check_bucket(release.push):
            found.append(f"release.push: {fault}")
    return found


def _of_tuning(run: RunConfig) -> list[str]:
    """Returns the contradictions of fine-tuning between rounds, and of FedDF."""
    settings, found = run.finetune, list[str]()
    if run.federation.strategy == "FedDF" and run.client.local:
        found.append(
            "federation.strategy = 'FedDF' contradicts client.local: the server cannot have models "
            "answer whose layers stay on clients. Leave either out."
        )
    if settings.in_rounds and not settings.epochs:
        found.append(
            "finetune.every and finetune.after_stall need finetune.epochs above 0: nothing would "
            "be fine-tuned. Set it, or leave them out."
        )
    if settings.in_rounds and run.client.local:
        found.append(
            "finetune.every and finetune.after_stall contradict client.local: the cloud cannot "
            "measure a model whose layers stay on clients, so no gate could keep one. Leave either "
            "out."
        )
    patience = run.federation.patience
    if settings.after_stall is not None and 0 < patience <= settings.after_stall:
        found.append(
            f"finetune.after_stall = {settings.after_stall} contradicts federation.patience = "
            f"{patience}, which ends the run no later. Set a larger patience, or fewer rounds."
        )
    return found


def _of_auto(settings: Finetune) -> list[str]:
    """Returns the contradictions of trying ways to compute."""
    found = list[str]()
    if settings.auto and settings.nodes > 1:
        found.append(
            f"finetune.auto contradicts finetune.nodes = {settings.nodes}: it tries ways to "
            "compute on one machine. Leave either out."
        )
    if settings.auto and settings.in_rounds:
        found.append(
            "finetune.auto contradicts finetune.every and finetune.after_stall: a resumed run must "
            "compute in the same way. Let `fedcore finetune` choose, and set what it chose."
        )
    if settings.auto_precision and not settings.auto:
        found.append("finetune.auto_precision needs finetune.auto: nothing is tried without it.")
    return found


_NOT_PRIVATE = {
    "remember": (0.0, "the loss of an example must not depend on a second model"),
    "every": (None, "the noise is planned before the first round, for one training"),
    "after_stall": (None, "the noise is planned before the first round, for one training"),
    "max_grad_norm": (None, "finetune.privacy.clip_norm bounds each example's gradient instead"),
    "precision": ("fp32", "the bound on a gradient holds in float32"),
    "communication": ("fp32", "noise is added to the whole sum of gradients"),
    "shard": (("auto", "never"), "each process needs the whole gradient of an example"),
    "accumulate_steps": (1, "batches are computed in parts as memory asks for"),
    "activation_checkpointing": (False, "gradients are computed example by example"),
    "compile": (False, "gradients are computed example by example"),
    "prefetch": (0, "batches are drawn step by step"),
    "auto": (False, "trials would read the data without a charge"),
}
"""Settings that DP-SGD does not work with: the values that it needs, and why."""


def _of_private_tuning(settings: Finetune) -> list[str]:
    """Returns the settings that contradict privacy of the cloud's data."""
    found = list[str]()
    for name, (needed, why) in _NOT_PRIVATE.items() if settings.private else ():
        value, allowed = getattr(settings, name), needed if isinstance(needed, tuple) else (needed,)
        if value not in allowed:
            remedy = "leave it out" if allowed[0] is None else f"set it to {allowed[0]!r}"
            found.append(
                f"finetune.{name} = {value!r} contradicts finetune.privacy.unit = 'example': "
                f"{why}. {remedy[0].upper()}{remedy[1:]}, or set unit to 'none'."
            )
    return found


def _of_nodes(settings: Finetune) -> list[str]:
    """Returns the contradictions among the numbers of nodes, processes and examples."""
    found, world = list[str](), settings.nodes * settings.processes
    if settings.nodes > 1 and settings.rendezvous is None:
        found.append(
            f"finetune.nodes = {settings.nodes} needs finetune.rendezvous: HOST:PORT of one of the "
            "nodes, at which they meet."
        )
    if world > settings.batch_size:
        found.append(
            f"finetune.batch_size = {settings.batch_size} is less than the {world} processes of "
            "all nodes, and each needs an example of every batch. Raise it, or set fewer "
            "finetune.processes or finetune.nodes."
        )
    return found


def _of_sharding(settings: Finetune) -> list[str]:
    """Returns what fine-tuning's settings ask of a divided model that it does not do."""
    found = list[str]()
    if settings.shard == "tensor":
        return _of_tensors(settings)
    if settings.shard != "always":
        return found
    if settings.precision == "fp16":
        found.append(
            "finetune.shard = 'always' contradicts finetune.precision = 'fp16': each process would "
            "scale its share of the gradients by itself. Use 'bf16', which needs no scaling."
        )
    if settings.communication != "fp32":
        found.append(
            f"finetune.shard = 'always' contradicts finetune.communication = "
            f"{settings.communication!r}, which is DDP's. Leave one of the two out."
        )
    return found


_NOT_OF_TENSORS = {
    "nodes": (1, "processes add up activations in every layer, within one machine"),
    "precision": ("fp32", "divided matrices are computed in float32 alone"),
    "communication": ("fp32", "activations travel, and gradients do not"),
    "max_grad_norm": (None, "no process has the whole gradient, whose norm it would need"),
    "fused": (False, "its kernel does not take divided and whole matrices together"),
    "compile": (False, "a compiled model would be divided after it is compiled"),
    "auto": (False, "its trials change the number of processes that divide a batch"),
}
"""Settings that tensor parallelism does not work with: the value that it needs, and why."""


def _of_tensors(settings: Finetune) -> list[str]:
    found = list[str]()
    for name, (needed, why) in _NOT_OF_TENSORS.items():
        value = getattr(settings, name)
        if value != needed:
            remedy = "Leave it out" if needed is None else f"Set it to {needed!r}"
            found.append(
                f"finetune.{name} = {value!r} contradicts finetune.shard = 'tensor': {why}. "
                f"{remedy}, or set shard to 'always' or 'auto'."
            )
    return found


def of_optimizer(
    section: str, settings: ClientConfig | Finetune, *, private: bool = False
) -> list[str]:
    """Returns the contradictions among an optimiser's settings.

    Args:
        section: Name of the table that has the settings.
        settings: The table.
        private: Whether it trains with example-level privacy.
    """
    found = list[str]()
    if settings.nesterov and (settings.optimizer != "sgd" or not settings.momentum):
        found.append(
            f"{section}.nesterov = true needs {section}.optimizer = 'sgd' with {section}.momentum "
            f"above 0, and they are {settings.optimizer!r} and {settings.momentum:g}. Set them, or "
            "leave nesterov out."
        )
    unused = settings.momentum not in (0.0, type(settings).model_fields["momentum"].default)
    if settings.optimizer != "sgd" and unused:
        found.append(
            f"{section}.momentum = {settings.momentum:g} contradicts {section}.optimizer = "
            f"{settings.optimizer!r}, which has moments of its own and would ignore it. Leave "
            "momentum out, or set optimizer to 'sgd'."
        )
    if private and settings.max_grad_norm is not None:
        found.append(
            f"{section}.max_grad_norm = {settings.max_grad_norm:g} contradicts example-level "
            "privacy: DP-SGD bounds each example's gradient by privacy.clip_norm before it adds "
            "noise. Set privacy.clip_norm, and leave max_grad_norm out."
        )
    return found


def _answering(devices: tuple[DeviceClass, ...]) -> float:
    """Returns the expected share of a cohort that replies, without regard to the deadline."""
    if not devices:
        return 1.0
    answers = sum(device.share * device.availability * (1 - device.dropout) for device in devices)
    return answers / sum(device.share for device in devices)
