"""Whether a model that came after the rounds is as good where the data live: clients measure it.

The cloud's held-out data tell how a model does on data like the cloud's. What fine-tuning takes
away from clients whose data are others, only they can tell: the same clients measure both models on
what they hold back, so that what differs between clients does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from scipy.stats import t as student

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.observability.words import counted
from fedcore.task.definition import Task
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel, preprocess_bytes
from fedcore.updates.pack import layout_of, pack
from server.rounds.checkpointing import NoCheckpoints, NumberedPeers, Peers
from server.rounds.cohort import select
from server.rounds.evaluation import ask_to_evaluate

CONFIDENCE = 0.95
"""Of the bound on how much worse a model may be on all clients, one-sided."""


@dataclass(frozen=True)
class Judgement:
    """What clients measured of two models, one after the other, on what they hold back."""

    clients: int
    """How many measured both."""
    examples: int
    """Of all of them together."""
    before: float
    """The mean of the primary metric over their examples, of the first model."""
    after: float
    """Of the second one."""
    margin: float
    """How far the difference of the two may be from that over all clients, at `CONFIDENCE`;
    infinite where one client alone measured them."""

    def worsening(self, primary: Metric) -> float:
        """How much worse the second model may be, as `Metric.worsening` counts."""
        sign = -1.0 if primary.higher_is_better else 1.0
        return primary.worsening(self.before, self.after + sign * self.margin)


Judge = Callable[[FullModel, FullModel], Judgement]
"""Has clients measure two models.

Raises:
    RoundFailed: no client measured both.
"""


Weigh = Callable[[bytes], Mapping[str, tuple[int, float]]]
"""Has clients measure an ONNX file: of each its number of examples, and the primary metric."""


def clients_judge(run: RunConfig) -> bool:
    """Whether clients judge what fine-tuning gives: as asked for, or where they hold data back."""
    return bool(run.federation.evaluate_cohort) and run.finetune.judge != "cloud"


def judges(run: RunConfig, there: Sequence[int]) -> list[int]:
    """Who is asked of those that are there: ``federation.evaluate_cohort`` of them at most."""
    size = min(run.federation.evaluate_cohort, len(there))
    return select(there, size, seed=run.seed, words=("judging",))


def judgement(measured: Sequence[tuple[int, float, float]]) -> Judgement:
    """What clients' measurements come to.

    Args:
        measured: Of each client its number of examples, and its metric of both models; not empty.
    """
    total = sum(examples for examples, _, _ in measured)
    # Summed as if with infinite precision: the order in which clients answer must not show.
    before = math.fsum(examples * one for examples, one, _ in measured) / total
    after = math.fsum(examples * other for examples, _, other in measured) / total
    count, margin = len(measured), math.inf
    if count > 1:
        gap = after - before
        squares = ((examples * (other - one - gap)) ** 2 for examples, one, other in measured)
        error = math.sqrt(math.fsum(squares) * count / (count - 1)) / total
        margin = float(student.ppf(CONFIDENCE, count - 1)) * error
    return Judgement(count, total, before, after, margin)


def drop_of(
    primary: Metric, base: Mapping[str, tuple[int, float]], other: Mapping[str, tuple[int, float]]
) -> float:
    """How much worse one file may be than another, by what the same clients measured of both."""
    both = sorted(base.keys() & other.keys())
    if not both:
        return math.inf
    return judgement([(base[name][0], base[name][1], other[name][1]) for name in both]).worsening(
        primary
    )


def judging_app(
    task: Task,
    run: RunConfig,
    models: tuple[FullModel, FullModel],
    *,
    peers: Peers | None = None,
    wait: Callable[[Grid, int], None] = lambda grid, wanted: None,
    on_note: Callable[[str], None],
    on_end: Callable[[Judgement], None],
) -> ServerApp:
    """A ServerApp that asks ``federation.evaluate_cohort`` clients for both models, and ends.

    Args:
        task: Whose primary metric is measured.
        run: The run that the models are of; its seed draws the clients.
        models: The one before and the one after.
        peers: Who clients are; numbers when None.
        wait: Waits until so many nodes are there, or it is in vain to.
        on_note: Told of clients that did not measure both.
        on_end: Gets what they come to.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        wait(grid, run.federation.evaluate_cohort)
        nodes = judges(run, sorted(grid.get_node_ids()))
        found: list[dict[int, tuple[int, float]]] = []
        # A round each: a client answers one question of a kind a round, and no second one.
        for number, model in enumerate(models, run.federation.rounds + 1):
            answers = ask_to_evaluate(
                grid,
                nodes,
                pack(model.model),
                layout=layout_of(model.model),
                preprocess=preprocess_bytes(model),
                number=number,
                metrics=task.metrics,
                deadline_s=run.federation.deadline_s,
                checkpointer=NoCheckpoints(),
                peers=peers or NumberedPeers(),
                on_note=on_note,
            )
            name = task.primary.name
            found.append({node: (one.num_examples, one.metrics[name]) for node, one in answers})
        both = sorted(found[0].keys() & found[1].keys())
        if not both:
            raise RoundFailed(
                f"judging: none of {counted(len(nodes), 'client')} measured both models. The "
                "fine-tuned model was not judged where the data live, and is not kept."
            )
        on_end(
            judgement([(found[0][node][0], found[0][node][1], found[1][node][1]) for node in both])
        )

    return app
