"""Settings of fine-tuning: what it optimises, how it computes, and what it does about faults."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedcore.config.section import (
    BatchSize,
    ClipNorm,
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

ENDPOINT = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"
"""A host, or an IPv6 address in brackets, and a port."""


class FinetunePrivacy(Section):
    """``[finetune.privacy]``: differential privacy of the cloud's data, by DP-SGD."""

    unit: Literal["none", "example"] = "none"
    """``example``: each example of the task's ``cloud_data``, against everyone who gets the model,
    by noise in fine-tuning; zero-out adjacency, so their number is public. Every other step then
    reads the task's ``cloud_heldout`` alone, which is not protected. ``none``: no protection."""
    max_epsilon: Annotated[float, Field(ge=0.01, le=1e6)] = 8.0
    """Budget of all trainings that the ledger records."""
    target_delta: Annotated[float, Field(ge=1e-12, lt=1)] = 1e-5
    """The delta of the budget; at most a tenth of one over the number of examples."""
    clip_norm: ClipNorm = 1.0
    """L2 bound of one example's gradient."""
    noise_multiplier: Annotated[float, Field(ge=0.1, le=1e6)] | Literal["auto"] = "auto"
    """Noise over ``clip_norm``; ``auto`` uses the least that keeps ``trainings`` within
    ``max_epsilon``, counted by ``privacy.accountant``."""
    trainings: Rounds = 1
    """Trainings on these data that ``auto`` plans for."""
    ledger: Annotated[str, Field(min_length=1, max_length=1024)] = "cloud-ledger.json"
    """File that records what each training on these data spends, relative to this file; runs on the
    same data share one. Keep it as long as the data."""


class Finetune(Section):
    """``[finetune]``: training on the cloud's data by DDP, after the rounds."""

    epochs: Annotated[int, Field(ge=0, le=10_000)] = 10
    """Passes over the cloud's data; 0 to skip fine-tuning."""
    every: Rounds | None = None
    """Fine-tune after every so many rounds, too: the next round starts from the result, if the gate
    keeps it by the cloud's held-out data. Unset: only after the rounds, for release."""
    after_stall: Rounds | None = None
    """Likewise when so many rounds have not improved on the best one."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes on this machine, one a GPU where there are GPUs. A single one is the process that
    does everything else; additional ones load the task from its file."""
    batch_size: BatchSize = 32
    """Examples a step, over all processes."""
    learning_rate: LearningRate = 0.05
    """Step size, for candidates that train too."""
    momentum: Momentum = 0.9
    """Momentum of SGD; other optimisers have moments of their own."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    weight_decay: WeightDecay = 0.0
    """L2 penalty; with ``adamw``, decoupled decay of the weights instead."""
    max_grad_norm: ClipNorm | None = None
    """Longer gradients of a batch are scaled down to this L2 norm."""
    optimizer: Optimizer = "sgd"
    """The optimiser in the cloud."""
    remember: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """The guard against forgetting: the weight that the answers of the model before fine-tuning, or
    before pruning, have beside the labels of the cloud's data (distillation). Raise it where those
    data do not look like the clients'; 0 learns from the labels alone."""
    holdout: Fraction = 0.3
    """The share of the cloud's data, drawn at random, for the gate and for choosing a candidate; a
    task with ``cloud_heldout`` uses that instead."""
    max_metric_drop: Annotated[float, Field(ge=0, le=1e9)] = 0.0
    """The gate: how much worse the held-out metric may be after fine-tuning."""
    judge: Literal["clients", "cloud", "both"] | None = None
    """Whose held-out data the gate uses. Unset: the clients', if they hold data back
    (``federation.evaluate_cohort``), or else the cloud's. With clients, the worse end of a 95 %
    interval counts, and in a simulation they also judge candidates, together with the cloud."""
    timeout_s: Seconds = 3600.0
    """Fine-tuning fails when it takes longer, or when a process waits this long for another."""
    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Machines that train together, each with ``processes`` processes. On all but one run
    ``fedcore finetune RUN --join``."""
    rendezvous: Annotated[str, Field(pattern=ENDPOINT)] | None = None
    """``HOST:PORT`` at which nodes meet, on the one that has the model."""
    rendezvous_s: Seconds = 45.0
    """How long a node waits for the others, at the beginning and after one was lost."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of matrix products and convolutions; weights stay in float32. ``fp16`` scales the
    loss, so that small gradients do not vanish; ``bf16`` needs no scaling."""
    accumulate_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Parts in which a process computes its share of a batch, one after the other, to save memory.
    The step has the gradient of the whole batch, up to rounding."""
    activation_checkpointing: bool = False
    """Computes activations of repeated blocks again in the backward pass in place of keeping them:
    less memory for about a third more time. The bits of the result are the same."""
    compile: bool = False
    """Compiles the model with ``torch.compile``, which takes up to minutes before the first step;
    needs a C++ compiler on CPUs."""
    fused: bool = False
    """One kernel for all of the optimiser's update: faster, and other rounding."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate over all steps: ``cosine`` falls along half a cosine to 0."""
    warmup_steps: Annotated[int, Field(ge=0, le=100_000_000)] = 0
    """Steps in which the learning rate rises evenly from near 0."""
    communication: Literal["fp32", "bf16", "powersgd"] = "fp32"
    """How gradients travel under DDP: whole; rounded to 16 bits; or as low-rank factors, with what
    they miss added to the next step (PowerSGD)."""
    powersgd_rank: Annotated[int, Field(ge=1, le=1024)] = 2
    """Rank of PowerSGD's factors. Larger ones are more exact, and send more."""
    prefetch: Annotated[int, Field(ge=0, le=1024)] = 0
    """Batches that a thread reads ahead, in pinned memory where there is a GPU. A data set that
    draws from process-wide random streams is then no longer reproducible."""
    shard: Literal["auto", "never", "always", "tensor"] = "auto"
    """Whether parameters, gradients and optimiser state are divided among processes (FSDP2) in
    place of copied (DDP). ``auto``: where an estimate of their memory does not fit a process; a
    note tells the estimate. ``tensor``: the matrices of feed-forward layers are divided, and every
    process computes the whole batch with its part (tensor parallelism)."""
    auto: bool = False
    """Tries other ways to compute a step before training, for at most ``auto_s``, and trains in the
    fastest that fits into memory: ``processes``, ``accumulate_steps``, ``prefetch``, ``fused`` and
    ``compile``, with ``activation_checkpointing`` where memory is short. Each gives the gradient of
    the same batch up to rounding. What this file sets itself stays as it is."""
    auto_s: Seconds = 60.0
    """How long ``auto`` may try."""
    auto_precision: bool = False
    """Lets ``auto`` also choose ``precision = "bf16"``, which is less exact."""
    price_per_hour: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Price of the machine in any currency, for the cost in ``fedcore finetune --report``."""
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 2
    """How often several processes are started again after one of them was killed: from the last
    checkpoint, or from the beginning where there is none."""
    checkpoints: str | None = None
    """Folder for checkpoints of unfinished training, relative to this file; none are written when
    unset. All nodes must share it. Training continues from the last checkpoint after a fault, and
    in the next call with equal settings; a stop by Ctrl-C or SIGTERM writes one first. Removed
    when training ends."""
    checkpoint_steps: Steps = 200
    """Steps between two checkpoints."""
    checkpoint_keep: Annotated[int, Field(ge=1, le=100)] = 2
    """How many checkpoints are kept."""
    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 3
    """With checkpoints: how often a loss that is not finite takes training back to the last
    checkpoint, with half the learning rate. After that, training fails."""

    privacy: FinetunePrivacy = Field(default_factory=FinetunePrivacy)
    """Settings of differential privacy for the cloud's data."""

    @property
    def private(self) -> bool:
        """Whether fine-tuning protects each example of the cloud's data."""
        return self.privacy.unit == "example"

    @property
    def in_rounds(self) -> bool:
        """Whether fine-tuned models go back into the rounds."""
        return self.every is not None or self.after_stall is not None
