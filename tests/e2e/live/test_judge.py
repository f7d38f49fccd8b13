"""Devices that judge a model after the rounds, over both ports of a real server."""

from __future__ import annotations

import signal
from collections.abc import Collection
from typing import Any

import pytest
import torch

from fedcore.errors import RoundFailed
from fedcore.observability.events import Event
from fedcore.rpc.hello import hello_of
from fedcore.task.definition import load_task
from fedcore.task.model import FullModel, build_model
from server.live import judge as judge_module
from server.live.judge import JudgeOnDevices
from server.live.network.serve import Address
from server.live.rounds.settings import device_settings


def judging(project: Any, *, drained: Collection[str] = ()) -> tuple[JudgeOnDevices, FullModel]:
    run = project.run(evaluate_cohort=3, holdout=0.3)
    task = load_task(project.task)
    judge = JudgeOnDevices(
        run=run,
        task=task,
        identity=project.server(),
        hello=hello_of("tiny", project.task),
        address=Address("127.0.0.1", project.port, 0),
        settings=device_settings(run, instance="first"),
        spool=project.root / "incoming",
        drained=lambda: drained,
        emit=list[Event]().append,
    )
    return judge, build_model(task, run).eval()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "REJOIN_S", 5.0)


def test_those_who_are_there_measure_both_models(project: Any, start: Any) -> None:
    for name in ("edge-0", "edge-1", "edge-2"):
        start(name)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    judge, model = judging(project)
    other = build_model(judge.task, judge.run).eval()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(-1.0)
    found = judge(model, other)
    assert found.clients == 3
    assert found.before != found.after
    assert judge(model, model).margin == 0.0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_who_is_drained_is_asked_for_nothing(project: Any, start: Any) -> None:
    for name in ("edge-0", "edge-1", "edge-2"):
        start(name)
    judge, model = judging(project, drained=["edge-1"])
    assert judge(model, model).clients == 2


def test_where_nobody_comes_it_is_said(project: Any) -> None:
    judge, model = judging(project)
    with pytest.raises(RoundFailed, match="none of 0 clients"):
        judge(model, model)
