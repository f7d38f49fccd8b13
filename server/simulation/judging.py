"""Virtual clients measure models after the rounds: fine-tuned models, and exported ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fedcore.config.owner import OwnerPolicy
from fedcore.config.run import RunConfig
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from server.evaluation import ClientScores
from server.rounds.evaluation.judging import Judge, Judgement, MeasureOnnx, draw_judges, judging_app
from server.simulation.evaluating import Unmeasured, answers_of, measure_clients
from server.simulation.federate import federate
from server.simulation.virtual.state import SimulationState


def judge_in_simulation(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: Sequence[str],
    on_note: Callable[[str], None],
    *,
    locals: Mapping[str, bytes] = MappingProxyType({}),
) -> Judge:
    """Returns a function that has virtual clients measure two models.

    Devices on a virtual clock are ignored: every client is reachable. A client measures both models
    with the layers that it keeps to itself, ``locals`` by name, as a device does.
    """

    def judge(before: FullModel, after: FullModel) -> Judgement:
        found: list[Judgement] = []
        app = judging_app(task, run, (before, after), on_note=on_note, on_end=found.append)
        federate(
            app,
            task,
            run,
            owner,
            clients,
            state=SimulationState(locals=dict(locals)),
            fleet=None,
            on_choice=lambda choice, workers: None,
        )
        return found[0]

    return judge


def measure_onnx_in_simulation(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: Sequence[str],
    on_note: Callable[[str], None],
) -> MeasureOnnx:
    """Returns a function that has virtual clients measure an ONNX file on their held-out data.

    It runs the file as devices do. A client that fails is noted once, and left out.
    """
    names = [clients[place] for place in draw_judges(run, range(len(clients)))]
    noted, primary = set[str](), task.primary.name

    def measure_onnx(onnx: bytes) -> Mapping[str, tuple[int, float]]:
        answer, found = answers_of(onnx, threads=run.serving.threads), {}
        for each in measure_clients(run, task, owner, names, answer, "heldout"):
            if isinstance(each, ClientScores) and primary in each.metrics:
                found[each.client] = (each.examples, each.metrics[primary])
                continue
            if each.client not in noted:
                if isinstance(each, Unmeasured):
                    why = each.reason
                else:
                    why = f"its {primary} is undefined ({each.undefined[primary]})"
                on_note(f"client {each.client!r} did not measure a candidate: {why}")
            noted.add(each.client)
        return found

    return measure_onnx
