"""Virtual clients measure models after the rounds: fine-tuned models, and exported ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from fedcore.task.model import FullModel
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge, MeasureOnnx, draw_judges, judging_app
from server.rounds.evaluation.pooling import EvaluationAnswer
from server.rounds.roles import Roles
from server.simulation.evaluating import Unmeasured, VirtualClients
from server.simulation.federate import federate
from server.simulation.virtual.nodes import FIRST_NODE_ID
from server.simulation.virtual.state import SimulationState


def judge_in_simulation(
    virtual: VirtualClients,
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
        app = judging_app(
            virtual.task,
            virtual.run,
            (before, after),
            client_name=lambda node: clients[node - FIRST_NODE_ID],
            on_note=on_note,
            on_end=found.append,
        )
        federate(
            app,
            virtual.task,
            virtual.run,
            virtual.owner,
            clients,
            state=SimulationState(virtual.ledgers, locals=dict(locals)),
            fleet=None,
            on_choice=lambda choice, workers: None,
        )
        return found[0]

    return judge


def measure_onnx_in_simulation(
    virtual: VirtualClients, clients: Sequence[str], on_note: Callable[[str], None]
) -> MeasureOnnx:
    """Returns a function that has virtual clients measure an ONNX file on their held-out data.

    It runs the file as devices do. A client that fails is noted once, and left out.
    """
    run, primary = virtual.run, virtual.task.primary.name
    places = Roles(run.federation, clients.__getitem__).evaluating(range(len(clients)))
    names = [clients[place] for place in draw_judges(run, places)]
    noted = set[str]()

    def left_out(client: str, why: str) -> None:
        if client not in noted:
            on_note(f"client {client!r} did not measure a candidate: {why}")
        noted.add(client)

    def measure_onnx(onnx: bytes) -> Mapping[str, EvaluationAnswer]:
        found: dict[str, EvaluationAnswer] = {}
        for each in virtual.measure(onnx, names, "heldout"):
            if isinstance(each, Unmeasured):
                left_out(each.client, each.reason)
                continue
            name, measured = each
            if why := measured.undefined.get(primary):
                left_out(name, f"its {primary} is undefined ({why})")
                continue
            found[name] = EvaluationAnswer(name, measured.examples, measured)
        return found

    return measure_onnx
