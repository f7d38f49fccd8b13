"""What a run leaves behind, step by step: the frozen types that the report is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedcore.artifacts.manifest import ClientStatement, Manifest


@dataclass(frozen=True)
class VirtualRecord:
    """One round on the virtual clock, as it is reported beside real time."""

    simulated_s: float
    """From its start until the server had nobody to wait for, or the deadline."""
    unavailable: int
    """Clients that could not be reached."""
    dropped: int
    """Clients that vanished on the way."""
    stragglers: int
    """Clients that finished after the deadline."""
    bytes_down: int
    """What crossed the network to clients."""
    bytes_up: int
    """What crossed the network from clients, updates that came too late included."""
    bytes_wasted: int
    """The part of both that belongs to dropped clients and stragglers."""


@dataclass(frozen=True)
class RoundRecord:
    """One round of federated training."""

    round: int
    """From 1."""
    rounds: int
    """How many were planned."""
    seconds: float
    cohort: int
    """Clients that were asked."""
    updates: int
    """Updates that were aggregated."""
    declined: int
    """Clients whose budget is spent."""
    failed: int
    """Clients that failed, or whose update was refused."""
    train_loss: float | None
    """Mean over clients; None where privacy keeps losses on the devices."""
    metrics: dict[str, float]
    """Of the new global model, on data it was not trained on (see ``judged_on``)."""
    judged_on: str
    """``cloud`` (data that no round trained on), ``clients`` (what they hold back), ``nothing``."""
    epsilon_max: float | None
    """The most that any client has said to have spent, in this round or one before."""
    bytes_up: int
    """Payload from clients to server, in this round."""
    bytes_down: int
    """Payload from server to clients, in this round."""
    virtual: VirtualRecord | None = None
    """The round on the virtual clock of a simulation with device classes."""
    client_epsilon: float | None = None
    """Client-level epsilon of the models of all rounds so far; None where clients are not
    protected."""
    median_norm: float | None = None
    """L2 norm of the round's median update, as it counts for the bound on updates; None where they
    are not bounded by it, or were too few."""


@dataclass(frozen=True)
class TrainingRecord:
    """How a simulation trained its clients; it decides the last bits of the result."""

    method: str
    """``loop`` (one after the other) or ``vectorised`` (side by side)."""
    reason: str
    loop_s: float | None
    """Seconds a client, one after the other; None where it was not measured."""
    vectorised_s: float | None
    """Seconds a client, side by side; None where it was not measured."""
    workers: int | None
    """At the end; None where a run was resumed after its last round."""


@dataclass(frozen=True)
class ClientRecord:
    """One client at the end of a simulation; on real devices this stays there."""

    client: str
    examples: int
    metric: float
    """The primary metric of the federated model on all of the client's own data."""
    epsilon: float | None
    rounds: int
    """Rounds that it took part in."""


def epsilon_spent(
    rounds: Sequence[RoundRecord],
    clients: Sequence[ClientRecord],
    *,
    budget: float | None,
    dropped: bool = False,
) -> float | None:
    """The most that any client may have spent, over all updates that left it, used or not.

    A device says what it has spent with each update. An update that was refused, or came too late,
    may be its last and cost what nobody was told; no device spends more than the run's budget, so
    that is stated then. A simulation has all ledgers, and needs no such bound.

    Args:
        rounds: Of the run.
        clients: With their ledgers, in a simulation; empty for devices.
        budget: ``privacy.max_epsilon``; None without example-level privacy.
        dropped: Whether a round may have been dropped after these, whose updates had left devices.

    Returns:
        Epsilon, or None without example-level privacy or before any update.
    """
    told = (*(each.epsilon_max for each in rounds), *(client.epsilon for client in clients))
    spent = [epsilon for epsilon in told if epsilon is not None]
    if budget is None or not spent:
        return None
    unused = dropped or any(each.cohort > each.updates + each.declined for each in rounds)
    if clients:
        return max(spent)
    return budget if unused else min(max(spent), budget)


@dataclass(frozen=True)
class CandidateRecord:
    """One compression candidate, measured."""

    name: str
    metric: float
    """The primary metric on the cloud's held-out data."""
    drop: float
    """How much worse than fp32 that is (`fedcore.task.metrics.Metric.worsening`)."""
    agreement: float
    """With the fp32 file, on the cloud's held-out data."""
    max_abs_error: float
    """Against the torch model that it was exported from."""
    bytes: int
    sha256: str
    p50_us: float
    p50_min_us: float
    p50_max_us: float
    """Median, and the least and largest of the medians of repeated blocks."""
    admitted: bool
    reason: str
    """Why it was admitted, chosen or refused, in a few words."""
    clients_drop: float | None = None
    """How much worse than fp32 it may be on what clients hold back, at 95 % confidence; None where
    no client weighed it."""


@dataclass(frozen=True)
class RunRecord:
    """Everything that the report shows."""

    name: str
    task: str
    kind: str
    primary: str
    """Name of the primary metric."""
    higher_is_better: bool
    device: str
    noise: str
    """How noise was drawn: ``none``, ``simulated`` or ``system``."""
    rounds: tuple[RoundRecord, ...]
    best_round: int
    training: TrainingRecord | None = None
    """How clients were trained; None where they are no simulation's."""
    clients: tuple[ClientRecord, ...] = ()
    candidates: tuple[CandidateRecord, ...] = ()
    chosen: str | None = None
    manifest: Manifest | None = None
    withheld: str = ""
    """Why nothing was published, though a repository was named."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Final test split: by metric, then ``federated``, ``cloud_alone``, ``finetuned``,
    ``released``."""
    epsilon: float | None = None
    """The most that any client may have spent on its examples, see `epsilon_spent`."""
    client_privacy: ClientStatement | None = None
    """What the models guarantee to each client; None where clients are not protected."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of each stage, in order."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A run that reached its end."""

    record: RunRecord
    torch_p50_us: float
    """Median time of one inference of the uncompressed model in torch."""
