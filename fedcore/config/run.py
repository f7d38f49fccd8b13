"""The settings of a run: one TOML file for the whole pipeline, as frozen models.

The same file drives a simulation and a deployment. Start with `RunConfig`. The owner of a device
has a separate file on the device (`fedcore.config.owner`), which only tightens these settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fedcore.config.client_privacy import ClientPrivacy
from fedcore.config.contradictions import contradictions
from fedcore.config.finetune import Finetune
from fedcore.config.patterns import NAME
from fedcore.config.schedule import ClientSchedule
from fedcore.config.section import (
    BatchSize,
    ClipNorm,
    Epochs,
    Fraction,
    LearningRate,
    Momentum,
    Optimizer,
    Rounds,
    Seconds,
    Section,
    Steps,
    WeightDecay,
)
from fedcore.config.simulated import Simulation
from fedcore.config.tracking import Tracking

MAX_CLIENTS = 10_000_000
Clients = Annotated[int, Field(ge=1, le=MAX_CLIENTS)]
Name = Annotated[str, Field(pattern=NAME)]
Pattern = Annotated[str, Field(min_length=1, max_length=256)]

DeviceChoice = Literal["auto", "cpu", "cuda", "mps"]
CandidateName = Literal[
    "fp32",
    "int8_static",
    "int8_dynamic",
    "int8_mixed",
    "int8_weights",
    "int4_weights",
    "pruned",
    "pruned_int8",
    "int8_trained",
    "distilled",
    "distilled_int8",
]
CANDIDATES: tuple[CandidateName, ...] = get_args(CandidateName)
DEFAULT_CANDIDATES: tuple[CandidateName, ...] = (
    "fp32",
    "int8_static",
    "int8_dynamic",
    "pruned",
    "pruned_int8",
)


class FederationConfig(Section):
    """``[federation]``: which clients a round selects, and how it aggregates their updates."""

    rounds: Rounds = 10
    """How many rounds to run at most."""
    cohort: Clients | None = None
    """Clients a round, or their expected number (see ``privacy.client``); every client when unset.
    On a live run these are the project's devices that are online before the first round; the server
    waits for all of them, until the deadline."""
    strategy: str = "FedAvg"
    """The name of a strategy in ``flwr.serverapp.strategy``; ``FedDF``, which distils the clients'
    models into their average on the cloud's inputs; or ``FILE.py:CLASS`` for your own, a
    `fedcore.Algorithm` or a Flower strategy, with the file relative to this one. Only the server
    loads it, and a resumed run needs the same file."""
    strategy_options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Keyword arguments of that strategy's class."""
    weighting: Literal["examples", "uniform"] = "examples"
    """``examples``: an update weighs as many examples as its client has. ``uniform``: all weigh the
    same. On a live run the number of examples is the one that the device enrolled with, whatever it
    reports later; unless every device of the project enrolled with one, all weigh the same. This is
    decided when a round selects its devices. Under client-level privacy all weigh the same in any
    case, because the guarantee needs a bound on each single update."""
    max_update_norm: Annotated[float, Field(ge=1e-9, le=1e12)] | Literal["adaptive", "none"] = (
        "adaptive"
    )
    """L2 bound of an update (the difference to the weights that were sent). A longer update is
    clipped, and a note names its client. ``adaptive`` works on live runs only: ten times the median
    of the round's updates, and at most 20 times the median of earlier rounds, which also bounds
    rounds of fewer than three updates. Client-level privacy has its own bound."""
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.0
    """Selects this many times the cohort, and aggregates the first ``cohort`` updates that arrive;
    later ones do not count. With a cohort of ten and 1.3, three of thirteen clients may be slow."""
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.75
    """The share of a cohort whose updates a round needs, rounded up: three of four by default, so
    that one may be missing. A live run's later rounds also begin with this share of devices."""
    deadline_s: Seconds = 3600.0
    """After this time a round continues with the updates that have arrived."""
    evaluate_cohort: Annotated[int, Field(ge=0, le=MAX_CLIENTS)] = 0
    """How many clients report metrics on held-back data in each round; 0 for none. Under
    example-level privacy they evaluate only the models after the rounds."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The share of a client's data that is held back from training to evaluate on; with
    ``holdout_by = "clients"``, the share of clients that hold back all of their data."""
    holdout_by: Literal["rows", "clients"] = "rows"
    """``rows``: every client trains, and holds back rows drawn at random. ``clients``: some, drawn
    by their names, only evaluate and never train: for clients whose rows resemble each other."""
    patience: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Stop after this many rounds without a better validation metric; 0 to run every round."""
    normalisation: Literal["task", "cloud", "federated"] = "task"
    """Where the mean and deviation of the inputs come from: the task's own preprocessing, the
    cloud's data, or sums over all clients."""
    initial: str | None = None
    """A safetensors checkpoint to start from, relative to this file."""

    @property
    def has_judges(self) -> bool:
        """Whether some clients only evaluate, and the others only train."""
        return self.holdout_by == "clients" and self.holdout > 0


class ClientConfig(Section):
    """``[client]``: local training."""

    epochs: Epochs = 1
    """Passes over a client's data in one round."""
    steps: Steps | None = None
    """Optimiser steps in one round, in place of ``epochs``: as many passes over the data as they
    need, the last one perhaps in part."""
    batch_size: BatchSize = 32
    """Examples a step; under privacy the expected number of a Poisson sample."""
    physical_batch_size: BatchSize | None = None
    """Most examples in memory at once. A larger batch is computed in parts whose gradients add up
    to that of the whole; layers that mix examples, such as batch normalisation, see one part."""
    learning_rate: LearningRate = 0.1
    """Step size of the local optimiser."""
    momentum: Momentum = 0.0
    """Momentum of SGD; begins at zero in every round. Other optimisers have their own moments."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty; with ``adamw``, decoupled decay of the weights instead."""
    max_grad_norm: ClipNorm | None = None
    """Longer gradients of a batch, all parameters together, are scaled down to this L2 norm.
    Example-level privacy has a bound of its own, ``privacy.clip_norm``."""
    optimizer: Optimizer = "sgd"
    """The local optimiser. Its state (momentum, moments) is not kept from one round to the next."""
    local: Annotated[tuple[Pattern, ...], Field(max_length=64)] = ()
    """Layers that stay on each client and never travel: patterns of names (``head.*``) or of
    layers' classes (``BatchNorm*``)."""
    frozen: Annotated[tuple[Pattern, ...], Field(max_length=64)] = ()
    """Parameters that nobody trains, neither clients nor the cloud: patterns of names
    (``encoder.*``), beside those whose ``requires_grad`` the task sets to False."""
    device: DeviceChoice = "auto"
    """Where to train: CUDA, else MPS, else CPU when ``auto``."""
    schedule: ClientSchedule = Field(default_factory=ClientSchedule)
    """A setting's schedule is a kind (``learning_rate = "cosine"``), a list
    (``epochs = [5, 3, 1]``) or a table (``learning_rate = { kind = "step", every = 10,
    factor = 0.5, warmup = 3 }``). What a strategy or an algorithm sends takes precedence."""

    def steps_of(self, examples: int) -> int:
        """Returns the optimiser steps of one round on this many examples."""
        return self.epochs * -(-examples // self.batch_size) if self.steps is None else self.steps

    def passes_of(self, examples: int) -> float:
        """Returns the passes over this many examples in one round."""
        steps_per_pass = -(-examples // self.batch_size)
        return self.epochs if self.steps is None else self.steps / max(steps_per_pass, 1)


class Privacy(Section):
    """``[privacy]``: differential privacy; these settings protect single examples, by DP-SGD."""

    unit: Literal["none", "example", "client", "both"] = "none"
    """What is protected. ``example``: each example of each client, also from the server, by noise
    that the client adds. Neighbouring data sets have a null record in place of one example
    (zero-out adjacency), so the number of examples is public. ``client``: each client with all of
    its data, by noise that the server adds (see ``[privacy.client]``), from everyone who gets the
    models. ``both``: both guarantees. ``none``: no protection."""
    max_epsilon: Annotated[float, Field(ge=0.01, le=1e6)] = 8.0
    """Budget of each client over the whole run."""
    target_delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    """The delta of the epsilon budget. A client declines when it is above a tenth of one over the
    number of its examples, unless its owner allows more."""
    clip_norm: ClipNorm = 1.0
    """L2 bound of one example's gradient."""
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1e6)] | Literal["auto"] = "auto"
    """Noise over ``clip_norm``; ``auto`` uses, for each client, the least that keeps
    ``participations`` rounds within ``max_epsilon``."""
    participations: Rounds | None = None
    """Rounds in which one client is expected to take part; ``federation.rounds`` when unset. A
    client whose budget is spent earlier takes no further part."""
    accountant: Literal["rdp", "prv"] = "prv"
    """How charges add up. Both give an upper bound on epsilon: ``prv`` by the distribution of
    privacy losses, which needs 4 to 12 % less noise; ``rdp`` by Renyi divergences."""
    evaluation_noise_multiplier: Annotated[float, Field(ge=0.1, le=1e6)] | Literal["auto"] = "auto"
    """Noise on the sums of one evaluation by a client (``federation.evaluate_cohort``), over what
    one held-out example can add to them; ``auto`` uses the least that keeps ``evaluations`` within
    ``max_epsilon``. Held-out examples are never trained on, so evaluations take nothing from the
    budget of training."""
    evaluations: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Evaluations by one client that ``auto`` plans for; when unset, two by the gate after
    fine-tuning, and one of each candidate. A client declines those that exceed the budget."""
    evaluation_limits: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=1e9)]], Field(max_length=64)
    ] = Field(default_factory=dict)
    """By metric, the most that one example may add to any of its sums; larger contributions are
    cut off. Needed for a primary metric without limits of its own: ``{ rmse = 25.0 }`` counts
    errors above 5 as 5, squared."""
    client: ClientPrivacy = Field(default_factory=ClientPrivacy)
    """Settings of client-level privacy."""

    @property
    def of_examples(self) -> bool:
        """Whether each example is protected, by noise on the device."""
        return self.unit in ("example", "both")

    @property
    def of_clients(self) -> bool:
        """Whether each client is protected, by noise at the server."""
        return self.unit in ("client", "both")


class Compression(Section):
    """``[compression]``: which candidates are built, and limits that the released one must meet."""

    candidates: tuple[CandidateName, ...] = DEFAULT_CANDIDATES
    """Candidates to build. ``fp32`` must be among them: the others are compared with it."""
    max_accuracy_drop: Annotated[float, Field(ge=0, le=1e9)] = 0.01
    """How much worse than fp32 the held-out metric may be (an absolute accuracy; for an error
    such as RMSE, a fraction of it). The upper end of a one-sided 95 % interval counts, too."""
    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Smallest share of decisions on held-out data that equal those of fp32 (for regression, 1
    minus the RMS difference over the deviation)."""
    max_bytes: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """Largest size of the ONNX file, in bytes."""
    max_p50_us: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Largest median time of one inference on the machine that compresses, in microseconds."""
    max_slowdown: Annotated[float, Field(ge=0, le=1e9)] = 0.05
    """How much longer than fp32 a smaller candidate may take, as a share, unless only such ones
    meet ``max_bytes``."""
    prune_fraction: Fraction = 0.5
    """The share of each hidden layer's channels that structured pruning removes."""
    prune_epochs: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Epochs on the cloud's data after pruning, which ``finetune.epochs = 0`` rules out."""
    rounding_epochs: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Epochs on the cloud's data in which the weights of ``int8_trained`` learn with rounding."""
    distil_epochs: Annotated[int, Field(ge=1, le=10_000)] = 50
    """Epochs on the cloud's data in which the task's ``student`` learns the model's answers."""
    calibration_examples: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Most examples of the cloud's data that calibrate static quantisation."""
    reduce_range: bool | None = None
    """Keep weights of layers that compute in 8 bits to 7 bits, for x86 processors without VNNI or
    AMX, whose sums of products can saturate. Unset: if this machine's processor is one of them."""
    time_limit_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0
    """Most seconds that the search for the layers of ``int8_mixed`` takes."""
    timing_runs: Annotated[int, Field(ge=100, le=1_000_000)] = 2000
    """Timed inferences of each candidate, in turn."""


class ReleaseConfig(Section):
    """``[release]``: where signed models are published."""

    model: Name | None = None
    """The name that devices request; the run's name when unset."""
    repository: str | None = None
    """Folder of the signed repository, relative to this file; nothing is published when unset."""
    keys: str | None = None
    """Folder of the keys that ``fedcore release init`` created."""
    push: str | None = None
    """Address of a bucket that gets a copy after the release, such as ``s3://bucket/fleet``;
    devices fetch it from there. Credentials come from the environment, never from this file."""
    canary_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    """Publish to so many percent of the devices first, drawn by their keys; to all when unset.
    ``fedcore release promote`` gives the version to the others."""
    canary_cohort: Annotated[tuple[str, ...], Field(max_length=1000)] = ()
    """Names of further devices that get it first."""
    max_test_drop: Annotated[float, Field(ge=0, le=1e9)] = 0.01
    """How much worse than the federated model the published model may be on the final test
    split (an absolute accuracy; for an error such as RMSE, a fraction of it). One example worse is
    always allowed. A model that is worse is withheld: the run ends with exit code 9, and its files
    and report remain."""


class Serving(Section):
    """``[serving]``: how devices run the model, and how candidates are timed."""

    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Threads of one inference."""


IN_MEMORY = "<made in memory>"
"""Stands for the task file of a task without one, such as a task defined in a notebook."""


class RunConfig(Section):
    """A whole run, one section for each part; all but ``name`` and ``task`` have defaults.

    Example::

        run = fedcore.RunConfig(name="churn", task="churn/task.py", seed=3)
        fedcore.simulate("churn/task.py", run, federation={"rounds": 5})
    """

    name: Name
    """Results go to ``runs/<name>``."""
    task: str
    """The task file, relative to this file."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Determines all randomness of a simulation. Real devices never draw noise from it."""
    federation: FederationConfig = Field(default_factory=FederationConfig)
    client: ClientConfig = Field(default_factory=ClientConfig)
    privacy: Privacy = Field(default_factory=Privacy)
    finetune: Finetune = Field(default_factory=Finetune)
    compression: Compression = Field(default_factory=Compression)
    release: ReleaseConfig = Field(default_factory=ReleaseConfig)
    serving: Serving = Field(default_factory=Serving)
    simulation: Simulation = Field(default_factory=Simulation)
    tracking: Tracking = Field(default_factory=Tracking)
    base: Path = Field(default=Path(), exclude=True, repr=False)
    """The folder that relative paths start from; set by the loader."""

    @property
    def model_name(self) -> str:
        """The name under which the model is released."""
        return self.release.model or self.name

    @property
    def private(self) -> bool:
        """Whether clients train with example-level differential privacy."""
        return self.privacy.of_examples

    @property
    def evaluates_privately(self) -> bool:
        """Whether clients evaluate models after the rounds by sums with noise."""
        return self.private and self.federation.evaluate_cohort > 0

    @property
    def client_private(self) -> bool:
        """Whether the server releases models with client-level differential privacy."""
        return self.privacy.of_clients

    @property
    def uniform(self) -> bool:
        """Whether all updates have equal weight."""
        return self.federation.weighting == "uniform" or self.client_private

    def path(self, relative: str) -> Path:
        """Returns a path from the file, resolved against the file's folder."""
        return (self.base / relative).resolve()

    @model_validator(mode="after")
    def _check_contradictions(self) -> Self:
        for problem in contradictions(self):
            raise ValueError(problem)
        return self
