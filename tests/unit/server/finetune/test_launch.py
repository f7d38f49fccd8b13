"""Fine-tuning with the real processes: slow, for each of them imports torch."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.config.finetune import Finetune
from fedcore.config.run import RunConfig
from fedcore.errors import RoundFailed, TrainingDiverged, TrainingError
from fedcore.observability.events import Event, Sink, TrainingAdvanced, nowhere
from fedcore.task.definition import Task, load_task
from fedcore.task.metrics import ACCURACY
from fedcore.task.model import FullModel, build_model
from fedcore.updates.pack import pack
from server.cloud import CloudData, read_cloud_data
from server.finetune.launch import Finetuned, fine_tune, passes
from server.rounds.evaluation.judgement import Judgement
from server.rounds.evaluation.judging import Judge

pytestmark = pytest.mark.slow

TASK = """
import multiprocessing
import os
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task
from fedcore.task.metrics import ACCURACY, Metric

rng = torch.Generator().manual_seed(0)
targets = torch.randint(3, (120,), generator=rng)
data = TensorDataset(
    nn.functional.one_hot(targets, 5) + 0.3 * torch.randn(120, 5, generator=rng), targets
)
RANK = os.environ.get("RANK")  # set in the processes that fine-tune


def loss(outputs, targets):
    value = nn.functional.cross_entropy(outputs, targets)
    {loss}
    return value


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(5, 8), {norm}, nn.Linear(8, 3))
        self.aux = nn.Linear({aux}, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        hidden = self[1](self[0](x))
        outputs = self[2](hidden)
        return outputs + self.aux(hidden) if {uses} else outputs


task = Task(
    name="tiny",
    kind="classification",
    model=Net,
    clients=lambda folder: ["anna"],
    client_data=lambda client, folder: data,
    cloud_data=lambda folder: data,
    test_data=lambda folder: data,
    example_input=torch.zeros(5),
    loss=loss,
    metrics=({metric},),
)
"""


class Case:
    """A task on disk and what fine-tuning it takes."""

    def __init__(
        self,
        folder: Path,
        *,
        loss: str = "",
        metric: str = "ACCURACY",
        norm: str = "nn.ReLU()",
        aux: int = 0,
        uses: str = "False",
        **settings: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        text = TASK.replace("{loss}", loss).replace("{metric}", metric).replace("{norm}", norm)
        text = text.replace("{uses}", uses).replace("nn.Linear({aux}, 3)", _aux(aux))
        (folder / "task.py").write_text(text)
        finetune = {"epochs": 20, "batch_size": 32, "learning_rate": 0.1} | settings
        values = {"name": "run", "task": "task.py", "finetune": finetune}
        self.run = RunConfig.model_validate(values).model_copy(update={"base": folder})
        self.task: Task = load_task(folder / "task.py")
        cloud = read_cloud_data(self.task, None, holdout=self.run.finetune.holdout, seed=0)
        assert cloud is not None
        self.cloud: CloudData = cloud
        start = self.run.model_copy(update={"seed": 9})
        self.model: FullModel = build_model(self.task, start).eval()

    def fine_tune(self, judge: Judge | None = None, emit: Sink = nowhere) -> Finetuned:
        return fine_tune(self.task, self.run, self.model, self.cloud, judge, emit=emit)


@pytest.mark.timeout(900)  # five launches, each of which imports torch twice
def test_two_processes_do_what_one_does_and_repeat_it_bit_for_bit(tmp_path: Path) -> None:
    events = list[Event]()
    two = Case(tmp_path / "two", processes=2).fine_tune(emit=events.append)
    assert told_of(events) == ["finetuned", "cloud_alone"]
    again = _harmed(tmp_path / "again")
    assert again.curve == two.curve
    for part in ("candidate", "cloud_alone"):
        bits = {pack(getattr(result, part).model).tobytes() for result in (two, again)}
        assert len(bits) == 1
    assert two.kept
    assert two.model is two.candidate
    assert two.after > two.before

    # No client is there to judge it: what is not known to be as good is not kept.
    def nobody(before: FullModel, after: FullModel) -> Judgement:
        raise RoundFailed("nobody was there")

    events = []
    alone = Case(tmp_path / "alone", processes=1).fine_tune(nobody, events.append)
    assert told_of(events) == ["finetuned", "cloud_alone"]
    assert (alone.kept, alone.unjudged, alone.clients) == (False, "nobody was there", None)
    assert alone.after > alone.before

    # One process, judged by how little it learns: the gate closes, and the result is still there.
    case = Case(
        tmp_path / "one",
        processes=1,
        metric='Metric("ignorance", lambda o, t: -ACCURACY.compute(o, t), higher_is_better=True)',
    )
    federated = pack(case.model.model)
    one = case.fine_tune()
    assert not one.kept
    assert one.model is case.model
    assert pack(one.model.model).tobytes() == federated.tobytes()
    assert one.after < one.before
    for part in ("candidate", "cloud_alone"):
        # The same batches, summed in two halves: nothing but rounding differs.
        single, double = (pack(getattr(result, part).model) for result in (one, two))
        assert np.abs(single - double).max() < 1e-4
        assert np.abs(single - federated).max() > 0.5


def told_of(events: list[Event]) -> list[str]:
    """The models whose training was told to its end, in order; nothing else was told."""
    told = [event for event in events if isinstance(event, TrainingAdvanced)]
    assert len(told) == len(events)
    return [event.model for event in told if event.done == event.steps]


def _harmed(folder: Path) -> Finetuned:
    """Fine-tunes with an interrupt first, and in the second call with a process that is killed."""
    kills = (
        "mark = __import__('pathlib').Path(__file__).with_name('kill'); "
        "RANK == '1' and mark.exists() and (mark.unlink(), os.kill(os.getpid(), 9))"
    )
    case = Case(folder, loss=kills, processes=2, checkpoints="kept", checkpoint_steps=3)
    kept = folder / "kept" / "run"

    def interrupt() -> None:
        while not list(kept.glob("*/step-0000000003")):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        case.fine_tune()
    watcher.join()
    assert list(kept.glob("*/step-*"))
    (folder / "kill").touch()
    found = case.fine_tune()
    assert not (folder / "kill").exists()
    assert not list(kept.iterdir())
    return found


def _aux(width: int) -> str:
    return f"nn.Linear({width}, 3)" if width else "None"


@pytest.mark.parametrize("uses", ["False", "self.calls != 5"], ids=["in every step", "in one step"])
def test_parameters_without_a_gradient_in_some_steps_are_trained_by_several(
    tmp_path: Path, uses: str
) -> None:
    """The last unused step comes after those that are tried: the processes are started again."""
    settings: dict[str, Any] = {"aux": 8, "uses": uses, "epochs": 3, "remember": 0.0}
    two = Case(tmp_path / "two", processes=2, **settings).fine_tune()
    one = Case(tmp_path / "one", processes=1, **settings).fine_tune()
    for part in ("candidate", "cloud_alone"):
        single, double = (pack(getattr(result, part).model) for result in (one, two))
        assert np.abs(single - double).max() < 1e-4
    before = build_model(Case(tmp_path / "new", **settings).task, RunConfig(name="a", task="b"))
    assert torch.equal(before.model.aux.weight, two.cloud_alone.model.aux.weight) == (  # type: ignore[union-attr]
        uses == "False"
    )


def test_a_last_batch_of_one_row_joins_the_one_before_in_each_process(tmp_path: Path) -> None:
    """Of 120 examples 84 train, 42 in each process: 41 and a lone one, for batch normalisation."""
    settings: dict[str, Any] = {"norm": "nn.BatchNorm1d(8)", "batch_size": 82, "epochs": 3}
    case = Case(tmp_path, processes=2, **settings)
    found = case.fine_tune()
    assert np.isfinite(pack(found.candidate.model)).all()
    assert found.candidate.model[1].num_batches_tracked == 3  # type: ignore[index,union-attr]


def test_a_loss_that_turns_nan_arrives_as_what_it_is_and_in_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    threads = threading.active_count()
    case = Case(
        tmp_path, processes=2, loss="RANK and print('working'); value = value * float('nan')"
    )
    with pytest.raises(TrainingDiverged, match="the loss was nan"):
        case.fine_tune()
    shown = capfd.readouterr()
    assert shown.out == ""  # nothing of what the processes print
    assert "Traceback" not in shown.err
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert threading.active_count() <= threads + 1  # pytest's own may come and go


def test_a_process_that_dies_takes_the_others_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, processes=2, loss="if RANK == '1': os._exit(7)", max_restarts=1)
    with pytest.raises(TrainingError, match=r"fine-tuning: process \d .*federated model is kept"):
        case.fine_tune()
    assert "Traceback" not in capfd.readouterr().err


WORSE, BETTER = Judgement(8, 400, 0.8, 0.6, 0.02), Judgement(8, 400, 0.6, 0.8, 0.02)


@pytest.mark.parametrize(
    ("judge", "asked", "after", "kept"),
    [
        (None, None, 0.7, True),
        (None, None, 0.49, False),
        (None, None, float("nan"), False),
        (None, WORSE, 0.9, False),
        (None, BETTER, 0.1, True),
        ("clients", BETTER, 0.1, True),
        ("both", BETTER, 0.1, False),
        ("both", BETTER, 0.9, True),
        ("both", WORSE, 0.9, False),
        # Better by less than it may differ from client to client.
        (None, Judgement(8, 400, 0.6, 0.61, 0.02), 0.9, False),
    ],
)
def test_who_judges_decides_what_is_kept(
    judge: Any, asked: Judgement | None, after: float, kept: bool
) -> None:
    assert passes(Finetune(judge=judge), ACCURACY, 0.5, after, asked) == kept
