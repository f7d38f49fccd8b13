"""What the steps of a check share: the run, its task, and results that earlier steps leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Subset

from fedcore.config.run import RunConfig
from fedcore.task.definition import Examples, Folder, Task, size_of
from fedcore.task.model import FullModel
from fedcore.training.batches import gather
from server.checking.findings import Place
from server.checking.looking import DataFault, Expected
from server.checking.progress import Tell
from server.checking.selection import Asked
from server.compression.compressed import Compressed

MOST_EXAMPLES = 64
"""Examples that one client trains on in a check, unless a batch is larger."""
_LARGEST_BATCH = 256
_OUTPUT_NUMBERS = 4 << 20
CLOUD, TEST, SYNTHETIC = "the cloud", "the test data", "made-up data"
"""Stand for a client's name where a server uses other data in place of clients'."""


@dataclass(frozen=True)
class Fault:
    """A fault that a step found, and the client whose data it is in."""

    client: str | None
    found: DataFault


@dataclass(frozen=True)
class StepOutcome:
    """The result of a step: a line, and the faults that it found."""

    text: str
    faults: Sequence[Fault] = ()


@dataclass
class CheckState:
    """The inputs of a check, and what its steps have found so far."""

    run: RunConfig
    task: Task
    place: Place
    asked: Asked
    folder: Folder
    tell: Tell
    names: Sequence[str] = ()
    """Names of all clients; empty on a server."""
    chosen: Sequence[int] = ()
    """Places of the clients whose rows are all looked at."""
    sizes: dict[str, int] = field(default_factory=dict)
    built: FullModel | None = None
    wanted: Expected | None = None
    output_shape: torch.Size = field(default_factory=torch.Size)
    """Of the model's output for one input."""
    trained_on: dict[str, Examples] = field(default_factory=dict)
    """A few examples of each client whose training is rehearsed, by name."""
    cloud: Examples | None = None
    cloud_heldout: Examples | None = None
    test: Examples | None = None
    compressed: Compressed | None = None

    @property
    def model(self) -> FullModel:
        """The model; trained by one client once that step is done."""
        assert self.built is not None, "an earlier step builds it"
        return self.built

    @property
    def expected(self) -> Expected:
        """What rows must be like."""
        assert self.wanted is not None, "an earlier step makes it"
        return self.wanted

    def sample_batch(self) -> tuple[Tensor, Tensor]:
        """Returns a batch of the first client's examples, at most 64."""
        examples = next(iter(self.trained_on.values()))  # `few` of them
        return gather(examples, list(range(min(size_of(examples), MOST_EXAMPLES))))

    def outputs(self, inputs: Tensor) -> Tensor:
        """Returns the model's outputs in evaluation mode."""
        with torch.inference_mode():
            found: Tensor = self.model.eval()(inputs)
        return found


def few(examples: Examples, batch_size: int, *, outputs: torch.Size) -> Examples:
    """Returns some of the examples: a full batch, and a last one as short as all of them have.

    So what goes wrong only in a last batch of one shows, and large data sets take no longer. Of a
    model with very many outputs, such as a large vocabulary at each position, there are fewer.
    """
    count, most = size_of(examples), _OUTPUT_NUMBERS // max(outputs.numel(), 1)
    if batch_size > min(_LARGEST_BATCH, most):
        return Subset(examples, range(min(count, MOST_EXAMPLES, max(most, 4))))
    return Subset(examples, range(min(count, batch_size + count % batch_size)))
