"""Virtual clients measure models after the rounds: fine-tuned models, and exported ONNX files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fedcore.config.owner import OwnerPolicy, tighten
from fedcore.config.run import RunConfig
from fedcore.errors import DataError
from fedcore.seeds import Simulated
from fedcore.task.definition import Task
from fedcore.task.model import FullModel
from fedcore.training.client import Client, local_data
from server.compression.runtime import answers, open_session
from server.rounds.judging import Judge, Judgement, Weigh, judges, judging_app
from server.simulation.federate import federate
from server.simulation.virtual.state import SimulationState


def judge_in_simulation(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: Sequence[str],
    on_note: Callable[[str], None],
) -> Judge:
    """Returns a function that has virtual clients measure two models.

    Devices on a virtual clock are ignored: every client is reachable.
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
            state=SimulationState(),
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
) -> Weigh:
    """Returns a function that has virtual clients measure an ONNX file on their held-out data.

    It runs the file as devices do. A client that fails is noted once, and left out.
    """
    names = [clients[place] for place in judges(run, range(len(clients)))]
    client = Client(task, tighten(run, owner), owner, Simulated(run.seed))
    told = set[str]()

    def weigh(onnx: bytes) -> Mapping[str, tuple[int, float]]:
        session, found = open_session(onnx, threads=run.serving.threads), {}
        for name in names:
            try:
                outputs, targets = answers(session, local_data(client, name)[1])
                value = task.primary.compute(torch.from_numpy(outputs), targets)
                if not math.isfinite(value):
                    raise DataError(f"its {task.primary.name} is {value}")
            except (Exception, SystemExit) as error:  # the task's code may raise anything
                if name not in told:
                    on_note(f"client {name!r} weighs no candidate: {type(error).__name__}: {error}")
                told.add(name)
                continue
            found[name] = (len(targets), value)
        return found

    return weigh
