"""Clients compare two models: whether post-processing made the federated model worse on their data.

The cloud's held-out data measure a model only on data like the cloud's. Fine-tuning can make the
model worse for clients with different data, which only those clients can measure. The same clients
measure both models on their held-out data, so differences between clients cancel. `judging_app`
collects the measurements; `judgement` computes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from scipy.stats import t as student

from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed
from fedcore.observability.words import counted
from fedcore.task.definition import Task
from fedcore.task.metrics import Metric
from fedcore.task.model import FullModel, preprocess_bytes
from fedcore.training.evaluate import output_shape
from fedcore.updates.frozen import frozen_state
from fedcore.updates.pack import layout_of, pack
from server.rounds.checkpointing.checkpointer import NoCheckpoints
from server.rounds.cohort import Cohort, select
from server.rounds.evaluation.evaluate import ask_to_evaluate
from server.rounds.evaluation.pooling import EvaluationAnswer
from server.rounds.expected import evaluation_spec
from server.rounds.peers import NumberedPeers, Peers

CONFIDENCE = 0.95
"""One-sided confidence of the bound on how much worse a model may be over all clients."""


@dataclass(frozen=True)
class Judgement:
    """Primary metric of two models, measured by the same clients on their held-out data."""

    clients: int
    """Number of clients that measured both models."""
    examples: int
    """Number of their examples in total."""
    before: float
    """Mean of the primary metric over all examples, for the first model."""
    after: float
    """Mean of the primary metric over all examples, for the second model."""
    margin: float
    """Half-width of the one-sided confidence bound at `CONFIDENCE`: how far the measured
    difference may be from the one over all clients. Infinite where a single client measured."""

    def worsening(self, primary: Metric) -> float:
        """Returns an upper bound on how much worse the second model is, see `Metric.worsening`."""
        sign = -1.0 if primary.higher_is_better else 1.0
        return primary.worsening(self.before, self.after + sign * self.margin)


Judge = Callable[[FullModel, FullModel], Judgement]
"""Has clients measure two models and returns the comparison.

Raises:
    RoundFailed: no client measured both."""


MeasureOnnx = Callable[[bytes], Mapping[str, tuple[int, float]]]
"""Has clients measure an ONNX file; returns number of examples and primary metric by client."""


def clients_judge(run: RunConfig) -> bool:
    """Whether clients judge fine-tuned models: they hold data out, and the run allows it."""
    return bool(run.federation.evaluate_cohort) and run.finetune.judge != "cloud"


def draw_judges(run: RunConfig, connected: Sequence[int]) -> list[int]:
    """Draws the nodes that judge: at most ``federation.evaluate_cohort`` of ``connected``.

    Args:
        run: Configuration of the run; its seed fixes the draw.
        connected: Connected nodes.
    """
    size = min(run.federation.evaluate_cohort, len(connected))
    return select(connected, size, seed=run.seed, words=("judging",))


def judgement(measured: Sequence[tuple[int, float, float]]) -> Judgement:
    """Computes a `Judgement` from the measurements of each client.

    Args:
        measured: Number of examples and metric of both models, one tuple per client; not empty.
    """
    total = sum(examples for examples, _, _ in measured)
    # Exact sums: the result must not depend on the order of the replies.
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
    primary: Metric,
    base: Mapping[str, tuple[int, float]],
    other: Mapping[str, tuple[int, float]],
    *,
    few: bool = False,
) -> float:
    """Returns an upper bound on how much worse the second file is than the first.

    Uses only clients that measured both; infinite where none did.

    Args:
        primary: The metric.
        base: Number of examples and metric of the first file, by client.
        other: Number of examples and metric of the second file, by client.
        few: Whether to add one decision that changed for the better and one for the worse, where
            the metric is a share: clients that all measured the same do not show that no example of
            theirs is lost (see `server.compression.confidence.loss_bound`).
    """
    both = sorted(base.keys() & other.keys())
    if not both:
        return math.inf
    found = judgement([(base[name][0], base[name][1], other[name][1]) for name in both])
    if few and primary.higher_is_better and primary.low >= 0 and primary.high <= 1:
        unseen = math.sqrt(2) / (found.examples + 2)
        scale = float(student.ppf(CONFIDENCE, max(found.clients - 1, 1)))
        found = replace(found, margin=math.hypot(found.margin, scale * unseen))
    return found.worsening(primary)


def values_of(
    primary: Metric, answers: Mapping[int, EvaluationAnswer], on_note: Callable[[str], None]
) -> dict[int, tuple[int, float]]:
    """Returns weight and primary metric of each client on whose data the metric is defined.

    Args:
        primary: The metric.
        answers: Answers by node.
        on_note: Callback with a note on clients that are left out.
    """
    judged = {node: one.measured.judged(primary) for node, one in answers.items()}
    undefined = sorted((answers[node].name, why) for node, (_, why) in judged.items() if why)
    if undefined:
        name, why = undefined[0]
        on_note(
            f"{primary.name} is undefined on the data of {counted(len(undefined), 'client')} that "
            f"evaluated a model, which are left out. First: {name}: {why}"
        )
    return {node: (answers[node].weight, value) for node, (value, why) in judged.items() if not why}


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
    """Returns a ServerApp that has ``federation.evaluate_cohort`` clients measure two models.

    Args:
        task: Defines the primary metric.
        run: The run that produced the models; its seed draws the clients.
        models: The model before post-processing and the one after.
        peers: Names and weights of the clients; node ids when None.
        wait: Waits until the given number of nodes is connected, or gives up.
        on_note: Callback for clients that did not measure both.
        on_end: Callback with the result.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        wait(grid, run.federation.evaluate_cohort)
        nodes, known = draw_judges(run, sorted(grid.get_node_ids())), peers or NumberedPeers()
        found: list[dict[int, tuple[int, float]]] = []
        spec = evaluation_spec(task.metrics, output_shape(models[0], task.example_input))
        # A round number each: a client answers one evaluation request per round.
        for number, model in enumerate(models, run.federation.rounds + 1):
            answers = ask_to_evaluate(
                grid,
                Cohort(nodes, known.weights(nodes)),
                pack(model.model),
                layout=layout_of(model.model),
                preprocess=preprocess_bytes(model),
                frozen=frozen_state(model.model),
                number=number,
                spec=spec,
                deadline_s=run.federation.deadline_s,
                checkpointer=NoCheckpoints(),
                peers=known,
                on_note=on_note,
            )
            found.append(values_of(task.primary, answers, on_note))
        both = sorted(found[0].keys() & found[1].keys())
        if not both:
            raise RoundFailed(
                f"evaluating the fine-tuned model: none of {counted(len(nodes), 'client')} "
                "evaluated both models. The fine-tuned model was not evaluated on clients' data, "
                "and is not kept."
            )
        on_end(
            judgement([(found[0][node][0], found[0][node][1], found[1][node][1]) for node in both])
        )

    return app
