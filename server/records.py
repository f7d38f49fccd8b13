"""Frozen record types of a run, from which report and summary are made.

Start with `RunRecord`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedcore.artifacts.manifest import ClientStatement, CloudStatement, Manifest, TestStatement


@dataclass(frozen=True)
class VirtualRecord:
    """Timing and traffic of one round on the virtual clock of a simulation."""

    simulated_s: float
    """Seconds from the round's start until no client was outstanding, or the deadline."""
    unavailable: int
    """Clients that were offline."""
    dropped: int
    """Clients that disconnected during the round."""
    stragglers: int
    """Clients that finished after the deadline."""
    bytes_down: int
    """Bytes sent from the server to clients."""
    bytes_up: int
    """Bytes sent from clients to the server, late updates included."""
    bytes_wasted: int
    """The part of both directions that was spent on dropped clients and stragglers."""


@dataclass(frozen=True)
class MetricSource:
    """The clients that a metric of a round comes from, where clients evaluated it."""

    clients: int
    """Number of clients whose sums or values count."""
    asked: int
    """Number of clients that evaluated the round's model."""
    undefined: int
    """Number of clients on whose data the metric is undefined; they count for the other metrics."""
    averaged: bool
    """Whether the value is the mean of the clients' values. Otherwise it follows from sums over
    all of their examples, and is the value over these."""
    reason: str
    """Why the metric is undefined, by the first such client; empty if none is undefined."""


@dataclass(frozen=True)
class RoundRecord:
    """One round of federated training, from `fedcore.ServerClient.rounds` or ``Result.record``.

    Example::

        for done in fedcore.ServerClient("authority/server").rounds():
            print(done.round, done.updates, done.metrics)
    """

    round: int
    """Number of the round, from 1."""
    rounds: int
    """Number of rounds planned."""
    seconds: float
    cohort: int
    """Clients in the round's cohort."""
    updates: int
    """Number of aggregated updates."""
    declined: int
    """Clients that declined because their privacy budget is spent."""
    failed: int
    """Clients that failed, or whose update was rejected."""
    train_loss: float | None
    """Mean training loss over clients; None if privacy keeps losses on the devices."""
    metrics: dict[str, float | None]
    """Metrics of the new global model, on data it was not trained on (see ``judged_on``); None
    where one is undefined."""
    judged_on: str
    """Data of the metrics: ``cloud`` (no round trains on it), ``clients`` (held back),
    ``nothing``."""
    epsilon_max: float | None
    """Largest epsilon that any client has reported up to and including this round."""
    bytes_up: int
    """Payload bytes from clients to the server in this round."""
    bytes_down: int
    """Payload bytes from the server to clients in this round."""
    virtual: VirtualRecord | None = None
    """Timing on the virtual clock; None without device classes."""
    client_epsilon: float | None = None
    """Client-level epsilon of the models of all rounds so far; None if clients aren't protected."""
    median_norm: float | None = None
    """L2 norm of the round's median update, as used for the adaptive bound on update norms; None if
    that bound is not in use or there were too few updates."""
    client: dict[str, float] = field(default_factory=dict)
    """Settings of local training that are this round's own, by name: of a schedule, or common to
    all clients by the strategy. Empty where the run's hold."""
    sources: dict[str, MetricSource] = field(default_factory=dict)
    """Clients behind each metric, by metric; empty unless clients evaluated the round."""
    finetuned: bool | None = field(default_factory=lambda: None)  # absent in earlier versions
    """Whether the next round starts from this one's model as the cloud has fine-tuned it; None if
    it was not fine-tuned."""


@dataclass(frozen=True)
class TrainingRecord:
    """How a simulation trained its clients. The method affects the last bits of the result."""

    method: str
    """``loop`` (clients sequentially) or ``vectorised`` (several clients at once)."""
    reason: str
    loop_s: float | None
    """Measured seconds per client with ``loop``; None if not measured."""
    vectorised_s: float | None
    """Measured seconds per client with ``vectorised``; None if not measured."""
    workers: int | None
    """Number of workers at the end; None if the run was resumed after its last round."""


@dataclass(frozen=True)
class ClientTestRecord:
    """One client's results on its own test data, in a simulation."""

    client: str
    examples: int
    federated: float
    """Primary metric of the federated model; NaN if it is undefined on these data."""
    released: float
    """Primary metric of the released file; NaN if it is undefined on these data."""


@dataclass(frozen=True)
class ClassResult:
    """One class on the final test."""

    label: str
    support: int
    """Number of its targets."""
    precision: float | None
    """Share of the decisions for it that are right; None if there are none."""
    recall: float | None
    """Share of its targets that were decided right; None if it has none."""
    f1: float | None
    """Harmonic mean of both; None if it occurs in neither."""


@dataclass(frozen=True)
class CalibrationBin:
    """Decisions of similar confidence on the final test."""

    decisions: int
    confidence: float
    """Mean probability that the model gives its own decisions."""
    accuracy: float
    """Share of them that are right."""


@dataclass(frozen=True)
class FinalTestDetails:
    """The released model on the final test, in detail."""

    examples: int
    interval: tuple[float, float] | None
    """95 % interval of the primary metric over examples like these; None if it is not known."""
    method: str
    """How the interval was computed; empty without one."""
    classes: tuple[ClassResult, ...] = ()
    """By class, or by label where an input has several; empty for other kinds of problem, and for
    more than 100."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """How often each class (row) was taken for each (column); empty without classes that exclude
    each other."""
    calibration: tuple[CalibrationBin, ...] = ()
    """By confidence, from the lowest; empty for kinds without decisions."""
    calibration_error: float | None = None
    """Expected calibration error; None for kinds without decisions."""


@dataclass(frozen=True)
class ClientRecord:
    """One client at the end of a simulation. Real devices keep these figures to themselves."""

    client: str
    examples: int
    metric: float
    """Primary metric of the federated model on all data of the client."""
    epsilon: float | None
    rounds: int
    """Rounds in which the client took part."""
    test: ClientTestRecord | None = None
    """Results on the client's own test data; None if it has none within reach."""


def epsilon_spent(
    rounds: Sequence[RoundRecord],
    clients: Sequence[ClientRecord],
    *,
    budget: float | None,
    dropped: bool = False,
) -> float | None:
    """Returns the largest epsilon that any client may have spent, counting every update it sent.

    Devices report their spending with each update. The last update of a device may be lost if it
    was rejected or late, and with it the report of its cost. In that case the result is the run's
    budget, which no device exceeds. A simulation has all ledgers, and needs no such bound.

    Args:
        rounds: The rounds of the run.
        clients: Client records with their ledgers, in a simulation; empty for devices.
        budget: ``privacy.max_epsilon``; None without example-level privacy.
        dropped: Whether a later round may have been dropped after devices had sent updates.

    Returns:
        Epsilon, or None without example-level privacy or before any update.
    """
    epsilons = (*(each.epsilon_max for each in rounds), *(client.epsilon for client in clients))
    spent = [epsilon for epsilon in epsilons if epsilon is not None]
    if budget is None or not spent:
        return None
    unused = dropped or any(each.cohort > each.updates + each.declined for each in rounds)
    if clients:
        return max(spent)
    return budget if unused else min(max(spent), budget)


@dataclass(frozen=True)
class CandidateRecord:
    """Measurements of one compression candidate."""

    name: str
    metric: float
    """Primary metric on the cloud's held-out data."""
    drop: float
    """How much worse the metric is than that of fp32 (`fedcore.task.metrics.Metric.worsening`)."""
    agreement: float
    """Agreement of outputs with the fp32 file, on the cloud's held-out data."""
    max_abs_error: float
    """Largest absolute difference from the outputs of the torch model it was exported from."""
    bytes: int
    sha256: str
    p50_us: float
    p50_min_us: float
    p50_max_us: float
    """Median latency in microseconds, and the smallest and largest median of repeated blocks."""
    admitted: bool
    reason: str
    """Why the candidate was admitted, chosen or rejected, in a few words."""
    drop_bound: float | None = None
    """Upper bound, at 95 % confidence, on the drop beyond the held-out data
    (`server.compression.confidence`); None without held-out data."""
    evidence: str = ""
    """What the bound follows from: so many held-out examples, or inputs without labels."""
    clients_drop: float | None = None
    """Upper bound, at 95 % confidence, on how much worse than fp32 the metric is on data that
    clients hold back; None if no client evaluated the candidate."""
    missed: tuple[str, ...] = ()
    """Names of the limits that it misses; empty if it was admitted, or could not be built."""


@dataclass(frozen=True)
class RunRecord:
    """The complete record of a run."""

    name: str
    task: str
    kind: str
    primary: str
    """Name of the primary metric."""
    higher_is_better: bool
    device: str
    noise: str
    """Source of the privacy noise: ``none``, ``simulated`` (from the seed) or ``system``."""
    rounds: tuple[RoundRecord, ...]
    best_round: int
    """The round whose model was kept: the best by the primary metric, or the last one if no data
    judged the rounds (`judged`)."""
    training: TrainingRecord | None = None
    """How clients were trained; None for a run over devices."""
    clients: tuple[ClientRecord, ...] = ()
    candidates: tuple[CandidateRecord, ...] = ()
    chosen: str | None = None
    manifest: Manifest | None = None
    withheld: str = ""
    """Reason why the release was withheld; empty if it was not."""
    unreleased: str = ""
    """Why publishing the model failed; empty if it did not. The run can be resumed."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Scores on the final test split: by metric, then ``federated``, ``cloud_alone``,
    ``finetuned``, ``released``."""
    tested: TestStatement | None = None
    """Statement on the final test, as a manifest has it; None without a test split."""
    test_warning: str = ""
    """Warning that the released model is worse on the final test than the federated one; empty if
    it isn't."""
    untrained: str = ""
    """Warning that layers of the model to release were never trained; empty if all were."""
    client_tests: tuple[ClientTestRecord, ...] = ()
    """Results on clients' own test data; empty without them."""
    details: FinalTestDetails | None = None
    """The released model on the final test, in detail; None without a test split."""
    task_sha256: str | None = None
    """Digest of the task's file when the run ended; None for a task made in memory."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings of the run that matter for its result, by name."""
    epsilon: float | None = None
    """Largest epsilon that any client may have spent on its examples (`epsilon_spent`)."""
    initial_sha256: str | None = None
    """Digest of the checkpoint that the run started from; None if it started from new weights."""
    spent_before: str = "nothing"
    """What the run's start had spent: ``nothing`` or ``not known``."""
    client_privacy: ClientStatement | None = None
    """Client-level privacy guarantee of the models; None if clients aren't protected."""
    cloud_privacy: CloudStatement | None = None
    """Privacy guarantee of the cloud's examples; None if they aren't protected."""
    finetune_trials: dict[str, Any] | None = None
    """What ``finetune.auto`` tried and chose, by name; None where it tried nothing."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds per stage, in order."""
    notes: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether any data judged the rounds, so that one of them can be called the best."""
        return any(each.metrics.get(self.primary) is not None for each in self.rounds)


@dataclass(frozen=True)
class Finished:
    """A complete run."""

    record: RunRecord
    torch_p50_us: float
    """Median time in microseconds of one inference of the uncompressed model in torch."""
