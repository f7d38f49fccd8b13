"""Models that came after the rounds, judged by virtual clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedcore.config import RunConfig
from fedcore.model import FullModel
from fedcore.owner import OwnerPolicy
from fedcore.task import Task
from server.judging import Judge, Judgement, judging_app
from server.simulation.federate import federate
from server.simulation.state import State


def judge_in_simulation(
    run: RunConfig,
    task: Task,
    owner: OwnerPolicy,
    clients: Sequence[str],
    on_note: Callable[[str], None],
) -> Judge:
    """Has virtual clients measure models, whether or not they would be there on a virtual clock."""

    def judge(before: FullModel, after: FullModel) -> Judgement:
        found: list[Judgement] = []
        app = judging_app(task, run, (before, after), on_note=on_note, on_end=found.append)
        federate(
            app,
            task,
            run,
            owner,
            clients,
            state=State(),
            fleet=None,
            on_choice=lambda choice, workers: None,
        )
        return found[0]

    return judge
