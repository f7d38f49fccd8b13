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
    WeightDecay,
)


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
    """Step size, for pruned models too."""
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

    @property
    def in_rounds(self) -> bool:
        """Whether fine-tuned models go back into the rounds."""
        return self.every is not None or self.after_stall is not None
