"""Devices that judge a model after the rounds, over both ports of a real server."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

from fedcore.errors import RoundFailed
from fedcore.observability.events import Event
from fedcore.rpc.hello import hello_of
from fedcore.seeds import SystemEntropy
from fedcore.task.model import FullModel, build_model
from server.live import judge as judge_module
from server.live.deployment import LiveRun
from server.live.inputs import Inputs
from server.live.journal.journal import create
from server.live.judge import JudgeOnDevices
from server.live.network.serve import Address
from server.live.operators.control import Control
from server.live.operators.drained import write_drained
from server.live.rounds.settings import device_settings
from server.report.folder import JOURNAL_FOLDER
from server.rounds.evaluation.judgement import Judgement, judgement


@pytest.fixture
def judging(project: Any) -> Iterator[Callable[..., tuple[JudgeOnDevices, FullModel]]]:
    with ExitStack() as stack:

        def judge(
            *, drained: Collection[str] = (), **federation: Any
        ) -> tuple[JudgeOnDevices, FullModel]:
            run = project.run(**{"evaluate_cohort": 3, "holdout": 0.3} | federation)
            folder = project.root / "results"
            (folder / JOURNAL_FOLDER).mkdir(parents=True)
            write_drained(project.root / "server", drained)
            live = LiveRun(
                run=run,
                inputs=Inputs(run.model_copy(update={"task": str(project.task)})),
                identity=project.server(),
                address=Address("127.0.0.1", project.port, 0),
                hello=hello_of("tiny", project.task),
                settings=device_settings(run, instance="first"),
                folder=folder,
                journal=stack.enter_context(closing(create(folder / JOURNAL_FOLDER, {}))),
                control=Control(run, identity=project.root / "server", results=folder),
                emit=list[Event]().append,
                randomness=SystemEntropy(),
            )
            return JudgeOnDevices(live), build_model(live.inputs.task, run).eval()

        yield judge


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "REJOIN_S", 5.0)


def test_those_who_are_there_measure_both_models(project: Any, start: Any, judging: Any) -> None:
    for name in ("edge-0", "edge-1", "edge-2"):
        start(name)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    judge, model = judging()
    other = build_model(judge.live.inputs.task, judge.live.run).eval()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(-1.0)
    found = judge(model, other)
    assert found.clients == 3
    assert found.before != found.after
    assert judge(model, model).margin == 0.0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_who_is_drained_is_asked_for_nothing(project: Any, start: Any, judging: Any) -> None:
    for name in ("edge-0", "edge-1", "edge-2"):
        start(name)
    judge, model = judging(drained=["edge-1"])
    assert judge(model, model).clients == 2


def test_of_devices_that_hold_back_all_or_nothing_those_that_judge_are_asked(
    project: Any, start: Any, judging: Any
) -> None:
    """By their names edge-0 and edge-1 judge."""
    for name in ("edge-0", "edge-1", "edge-2"):
        start(name)
    judge, model = judging(evaluate_cohort=9, holdout=0.5, holdout_by="clients")
    began = time.monotonic()
    assert judge(model, model).clients == 2
    assert time.monotonic() - began < 4.0, "it waited for more judges than the project has"


def test_where_nobody_comes_it_is_said(judging: Any) -> None:
    judge, model = judging()
    with pytest.raises(RoundFailed, match="none of 0 clients"):
        judge(model, model)


def test_a_signal_that_comes_as_the_last_device_answers_is_obeyed(
    judging: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def signalled(work: object, listening: Any) -> Judgement:
        listening.interrupted.append(signal.SIGTERM)
        return judgement([(1, 0.5, 0.5)])

    monkeypatch.setattr(judge_module, "run_beside", signalled)
    judge, model = judging()
    with pytest.raises(KeyboardInterrupt):
        judge(model, model)
