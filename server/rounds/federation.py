"""What the rounds of a run work with, fixed before the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from flwr.serverapp import Grid

from fedcore.config.run import RunConfig
from fedcore.seeds import Randomness
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel
from server.records import RoundRecord
from server.rounds.checkpointing import (
    NoCheckpoints,
    NumberedPeers,
    Peers,
    RoundCheckpointer,
    Start,
)
from server.rounds.cohort import asked_for
from server.rounds.inbound import (
    FoldingGrid,
)
from server.rounds.norm_bound import is_bounded
from server.rounds.strategies import Chosen

Judge = Callable[[FullModel], dict[str, float]]


@dataclass(frozen=True)
class Federation:
    """What rounds run with; fixed before the first."""

    run: RunConfig
    grid: Grid
    chosen: Chosen
    cohort: int
    metrics: tuple[Metric, ...]
    """Of the task; the first is its primary one."""
    randomness: Randomness
    judge: Judge | None
    """Scores a model on the cloud's data; None when there is none."""
    on_round: Callable[[RoundRecord], None]
    on_note: Callable[[str], None]
    checkpointer: RoundCheckpointer = field(default_factory=NoCheckpoints)
    start: Start | None = None
    """Where to go on; from the beginning when None."""
    peers: Peers = field(default_factory=NumberedPeers)
    """Who clients are."""
    live: bool = False
    """Whether they are devices, whose updates are bounded unless the run says otherwise."""
    clients: int = 0
    """Those that rounds draw from, as client-level privacy counts on; as many as are there, or
    as a round asks, where those are more."""

    def nodes(self) -> Sequence[int]:
        """The nodes that are there now."""
        found = self.grid.get_node_ids()
        return found if isinstance(found, Sequence) else list(found)

    @property
    def primary(self) -> Metric:
        """What rounds are compared by."""
        return self.metrics[0]

    @cached_property
    def folding(self) -> FoldingGrid | None:
        """The grid, where it adds updates up itself and the strategy lets it."""
        bounded = is_bounded(self.run, live=self.live)  # which looks at each update
        chosen = self.chosen
        folds = chosen.folds and chosen.in_place and self.asked == self.cohort and not bounded
        return self.grid if folds and isinstance(self.grid, FoldingGrid) else None

    @cached_property
    def asked(self) -> int:
        """How many clients a round asks, where so many are there; ``cohort`` updates are enough."""
        return asked_for(self.run, self.cohort, simulated=self.virtual is not None)

    @cached_property
    def virtual(self) -> FoldingGrid | None:
        """The grid, where it may have a virtual clock."""
        return self.grid if isinstance(self.grid, FoldingGrid) else None
