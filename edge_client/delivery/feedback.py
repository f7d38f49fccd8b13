"""Tells the project's server how the models of this device are used, if the owner allows it.

A window of counts (`edge_client.delivery.observed`) is told once, when it has ended. What is told
of it is written before it is sent, so that noise is drawn once, however often it is sent.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from edge_client.delivery import store as installed
from edge_client.delivery.observed import (
    MAX_EARLIER,
    ToldWindow,
    read_observed,
    read_told,
    telling,
    write_told,
)
from fedcore.artifacts.feedback import MIN_ROWS, Observation
from fedcore.artifacts.manifest import Manifest
from fedcore.config.owner import OwnerPolicy
from fedcore.errors import DataError
from fedcore.privacy.count_noise import count_deviation, noised_counts
from fedcore.rpc.delivery_pb2 import Bins, ServingReport

if TYPE_CHECKING:
    from edge_client.delivery.network import DeliveryLink

log = logging.getLogger("fedcore.device")

DELTA = 1e-6
"""The delta of ``feedback_epsilon``, unless the owner's ``target_delta`` is smaller."""


def tell_feedback(store: Path, model: str, link: DeliveryLink, *, owner: OwnerPolicy) -> bool:
    """Sends the counts of the latest window that has ended, unless they have arrived before.

    Returns:
        Whether anything was sent.

    Raises:
        RepositoryUnreachable: the server could not be reached; the same counts are sent later.
        CertificateRefused: the server refuses this device.
        FedcoreError: the version cannot be read, or nothing can be written.
    """
    if not owner.feedback:
        return False
    with telling(store, model):
        decided = _decided(store, model, owner)
    if decided is None:
        return False
    manifest, told = decided
    link.report_serving(_report(manifest, told.observation))
    write_told(store, model, told.model_copy(update={"arrived": True}))
    return True


def _decided(store: Path, model: str, owner: OwnerPolicy) -> tuple[Manifest, ToldWindow] | None:
    """Returns what is told of the latest window, and keeps it: noise is drawn once for a window."""
    record = installed.read_record(store, model, "active")
    observed = read_observed(store, model, record)
    if observed is None or observed.ended is None:
        return None
    version = installed.serving(store, model)
    if version.record != record:  # damaged: the version before answers, which is not what counted
        return None
    manifest, ended = version.manifest, observed.ended
    try:
        told = read_told(store, model)
    except DataError as error:  # it may be out with other noise, so nothing more may be told of it
        log.warning("%s: nothing is told of this window: %s", model, error)
        told = ToldWindow(window=ended.id, observation=Observation(), arrived=True)
        write_told(store, model, told)
    earlier: tuple[str, ...] = ()
    if told is not None:
        drawn = told.observation.noise_deviation > 0
        same = told.window == ended.id
        if ended.id in told.earlier or (same and told.arrived):
            return None
        if same and drawn and owner.feedback_epsilon is not None:
            return manifest, told
        earlier = told.earlier if same else (*told.earlier, told.window)[-MAX_EARLIER:]
    public = what_to_tell(ended.observation, manifest, owner)
    told = ToldWindow(window=ended.id, observation=public, earlier=earlier)
    write_told(store, model, told)
    return manifest, told


def what_to_tell(observation: Observation, manifest: Manifest, owner: OwnerPolicy) -> Observation:
    """Returns the part of a window that may leave this device.

    Guarantee:
        Where privacy is on, which is where the owner sets a budget or the model was trained with
        protection of examples, no bins leave, or with noise for the owner's ``feedback_epsilon``.
        Fewer than 100 rows never leave. Where privacy is on or noise is set, errors and latencies
        stay, too: who signs a model decides on which inputs it fails or takes long.
    """
    why = _reason_to_keep(observation, manifest, owner)
    if _is_private(manifest, owner) or owner.feedback_epsilon is not None:
        observation = observation.model_copy(
            update={"errors": 0, "latency": (0,) * len(observation.latency)}
        )
    if why:
        log.info("%s: how much it is used is told, but no bins: %s", manifest.model, why)
        return observation.model_copy(update={"rows": 0, "counts": ()})
    if owner.feedback_epsilon is None:
        return observation
    deviation = _deviation(observation, owner.feedback_epsilon, owner)
    log.info(
        "%s: bins of %d rows are told with noise of deviation %.0f: epsilon %g for each row",
        manifest.model,
        observation.rows,
        deviation,
        owner.feedback_epsilon,
    )
    noised = noised_counts(observation.counts, deviation=deviation)
    return observation.model_copy(update={"counts": noised, "noise_deviation": deviation})


def _is_private(manifest: Manifest, owner: OwnerPolicy) -> bool:
    return owner.max_epsilon is not None or manifest.privacy.unit in ("example", "both")


def _reason_to_keep(observation: Observation, manifest: Manifest, owner: OwnerPolicy) -> str:
    """Returns why no bins may leave this device; empty if they may."""
    if observation.rows < MIN_ROWS:
        return f"{observation.rows} rows were counted, fewer than {MIN_ROWS}"
    if owner.feedback_epsilon is not None:
        deviation = _deviation(observation, owner.feedback_epsilon, owner)
        drowned = f"noise of deviation {deviation:.0f} would drown {observation.rows} rows"
        return drowned if deviation > observation.rows else ""
    if owner.max_epsilon is not None:
        return f"{owner.file} sets max_epsilon, and no feedback_epsilon"
    if manifest.privacy.unit in ("example", "both"):
        return f"the model was trained with privacy, and {owner.file} sets no feedback_epsilon"
    return ""


def _deviation(observation: Observation, epsilon: float, owner: OwnerPolicy) -> float:
    """Returns the deviation of the noise on each count for the epsilon of a row."""
    delta = min(DELTA, owner.target_delta or 1.0)
    return count_deviation(len(observation.counts), epsilon=epsilon, target_delta=delta)


def _report(manifest: Manifest, observation: Observation) -> ServingReport:
    return ServingReport(
        model=manifest.model,
        version=manifest.version,
        rows=observation.rows,
        features=[Bins(counts=row) for row in observation.counts],
        requests=observation.requests,
        errors=observation.errors,
        latency=observation.latency,
        noise_deviation=observation.noise_deviation,
    )
