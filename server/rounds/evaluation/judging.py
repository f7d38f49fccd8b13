"""Clients compare two models: whether post-processing made the federated model worse on their data.

The cloud's held-out data measure a model only on data like the cloud's. Fine-tuning can make the
model worse for clients with different data, which only those clients can measure. The same clients
measure both models on their held-out data. `judging_app` collects the measurements;
`server.rounds.evaluation.judgement` compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

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
from server.rounds.evaluation.judgement import Judgement, compared
from server.rounds.evaluation.pooling import EvaluationAnswer
from server.rounds.expected import evaluation_of
from server.rounds.peers import NumberedPeers, Peers
from server.rounds.roles import roles_of

Judge = Callable[[FullModel, FullModel], Judgement]
"""Has clients measure two models and returns the comparison.

Raises:
    RoundFailed: no client measured both."""


MeasureOnnx = Callable[[bytes], Mapping[str, EvaluationAnswer]]
"""Has clients measure an ONNX file; returns the answers of those with a primary metric, by name."""


def clients_judge(run: RunConfig) -> bool:
    """Whether clients judge fine-tuned models: they hold data out, and the run allows it."""
    return bool(run.federation.evaluate_cohort) and run.finetune.judge != "cloud"


def draw_judges(run: RunConfig, connected: Sequence[int]) -> list[int]:
    """Draws the nodes that judge: at most ``federation.evaluate_cohort`` of ``connected``.

    Args:
        run: Configuration of the run; its seed fixes the draw.
        connected: Connected nodes that evaluate, sorted.
    """
    size = min(run.federation.evaluate_cohort, len(connected))
    return select(connected, size, seed=run.seed, words=("judging",))


def usable_answers(
    primary: Metric, answers: Mapping[int, EvaluationAnswer], on_note: Callable[[str], None]
) -> dict[int, EvaluationAnswer]:
    """Returns the answers of clients on whose data the primary metric has a value or sums.

    Args:
        primary: The metric.
        answers: Answers by node.
        on_note: Callback with a note on clients that are left out.
    """
    whys = {node: one.measured.undefined.get(primary.name, "") for node, one in answers.items()}
    undefined = sorted((answers[node].name, why) for node, why in whys.items() if why)
    if undefined:
        name, why = undefined[0]
        on_note(
            f"{primary.name} is undefined on the data of {counted(len(undefined), 'client')} that "
            f"evaluated a model, which are left out. First: {name}: {why}"
        )
    return {node: one for node, one in answers.items() if not whys[node]}


def judging_app(
    task: Task,
    run: RunConfig,
    models: tuple[FullModel, FullModel],
    *,
    peers: Peers | None = None,
    client_name: Callable[[int], str] | None = None,
    wait: Callable[[Callable[[], int], int], None] = lambda connected, wanted: None,
    on_note: Callable[[str], None],
    on_end: Callable[[Judgement], None],
) -> ServerApp:
    """Returns a ServerApp that has ``federation.evaluate_cohort`` clients measure two models.

    Args:
        task: Defines the primary metric.
        run: The run that produced the models; its seed draws the clients.
        models: The model before post-processing and the one after.
        peers: Names and weights of the clients; node ids when None.
        client_name: Maps a node to its client's name, which says whether it evaluates; ``peers``
            does when None.
        wait: Waits until as many nodes that evaluate are connected as its second argument says, or
            gives up; the first returns how many are.
        on_note: Callback for clients that did not measure both.
        on_end: Callback with the result.
    """
    app, known = ServerApp(), peers or NumberedPeers()
    roles = roles_of(run.federation, client_name or (peers.client if peers is not None else None))

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        def connected() -> Sequence[int]:
            return roles.evaluating(grid.get_node_ids())

        wait(lambda: len(connected()), run.federation.evaluate_cohort)
        nodes = draw_judges(run, sorted(connected()))
        found: list[dict[int, EvaluationAnswer]] = []
        spec = evaluation_of(run, task.metrics, output_shape(models[0], task.example_input))
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
            found.append(usable_answers(task.primary, answers, on_note))
        both = sorted(found[0].keys() & found[1].keys())
        if not both:
            raise RoundFailed(
                f"evaluating the fine-tuned model: none of {counted(len(nodes), 'client')} "
                "evaluated both models. The fine-tuned model was not evaluated on clients' data, "
                "and is not kept."
            )
        on_end(compared(task.primary, [(found[0][node], found[1][node]) for node in both]))

    return app
