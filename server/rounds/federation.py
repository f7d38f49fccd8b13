"""`Federation`: the fixed parts of a run that every round uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flwr.serverapp import Grid

from fedcore.config.run import RunConfig
from fedcore.seeds import Randomness
from fedcore.task.measured import Measured
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel
from server.records import RoundRecord
from server.rounds.aggregation.norm_bound import is_bounded
from server.rounds.checkpointing.checkpointer import NoCheckpoints, RoundCheckpointer
from server.rounds.checkpointing.progress import Start
from server.rounds.cohort import selection_size
from server.rounds.inbound import FoldingGrid
from server.rounds.peers import NumberedPeers, Peers
from server.rounds.roles import Roles
from server.rounds.strategies.flower import ChosenStrategy
from server.rounds.tuning import Tuner

EvaluateModel = Callable[[FullModel], Measured]


@dataclass(frozen=True)
class Federation:
    """Fixed parts of a run: settings, grid, strategy, callbacks."""

    run: RunConfig
    grid: Grid
    chosen: ChosenStrategy
    cohort: int
    metrics: tuple[Metric, ...]
    """Metrics of the task; the first is the primary one."""
    randomness: Randomness
    evaluate_on_cloud: EvaluateModel | None
    """Evaluates a model on the cloud's data; None when there is none."""
    on_round: Callable[[RoundRecord], None]
    on_note: Callable[[str], None]
    annotate: Callable[[RoundRecord], RoundRecord] = lambda record: record
    """Adds to a round's record what is known outside of the rounds."""
    checkpointer: RoundCheckpointer = field(default_factory=NoCheckpoints)
    start: Start | None = None
    """State to resume from; None to start from the beginning."""
    peers: Peers = field(default_factory=NumberedPeers)
    """Names of the clients."""
    live: bool = False
    """Whether clients are devices, whose updates are bounded unless the run specifies otherwise."""
    tuner: Tuner | None = None
    """Fine-tunes the global model between rounds; None where the run does not."""
    outputs: tuple[int, ...] = ()
    """Shape of the model's outputs for one example, where clients evaluate rounds."""
    clients: int = 0
    """Number of clients that rounds draw from, which client-level privacy relies on. Its plan
    uses the number of connected nodes, or the cohort's size, where that is larger."""
    roles: Roles | None = None
    """Which nodes train and which evaluate; None where all do both."""

    def nodes(self) -> Sequence[int]:
        """Returns the nodes that are connected now and train."""
        found = self.grid.get_node_ids()
        if self.roles is not None:
            return self.roles.training(found)
        return found if isinstance(found, Sequence) else list(found)

    def evaluators(self) -> Sequence[int]:
        """Returns the nodes that are connected now and evaluate."""
        found = self.grid.get_node_ids()
        if self.roles is not None:
            return self.roles.evaluating(found)
        return found if isinstance(found, Sequence) else list(found)

    @property
    def primary(self) -> Metric:
        """Primary metric of the task, by which rounds are compared."""
        return self.metrics[0]

    @cached_property
    def folding(self) -> FoldingGrid | None:
        """The grid, where it can add updates up itself and the run and the strategy allow it."""
        bounded = is_bounded(self.run, live=self.live)  # a bound needs each update
        chosen = self.chosen
        folds = (
            chosen.folds and chosen.in_place and self.selection_size == self.cohort and not bounded
        )
        return self.grid if folds and isinstance(self.grid, FoldingGrid) else None

    @cached_property
    def selection_size(self) -> int:
        """Number of clients that a round selects if enough are connected."""
        return selection_size(self.run, self.cohort, simulated=isinstance(self.grid, FoldingGrid))
