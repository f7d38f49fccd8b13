"""The cloud's ledger: charged before a training, and complete before its model comes out."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedcore.config.run import RunConfig
from fedcore.errors import BudgetExhausted, ConfigError, DataError, ResourceError
from fedcore.task.definition import size_of
from fedcore.task.model import build_model
from server.cloud import CloudData, read_cloud_data
from server.finetune.cloud_ledger import charged
from server.finetune.launch import Finetuned, fine_tune
from server.finetune.private_plan import plan_of
from tests.unit.server.finetune.conftest import make_examples, make_run, make_task


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    privacy = {"unit": "example", "target_delta": 1e-3, "max_epsilon": 4.0}
    found = make_run(epochs=2, optimizer="sgd", remember=0.0, privacy=privacy)
    return found.model_copy(update={"base": tmp_path})


def tuned(run: RunConfig) -> Finetuned:
    task = replace(
        make_task(model=lambda: nn.Linear(5, 3)),
        cloud_data=lambda folder: make_examples(),
        cloud_heldout=lambda folder: make_examples(21),
    )
    cloud = read_cloud_data(task, None, holdout=0.3, seed=0, private=True)
    assert cloud is not None
    return fine_tune(task, run, build_model(task, run), cloud)


def recorded(run: RunConfig) -> list[dict[str, Any]]:
    path = run.base / "cloud-ledger.json"
    return json.loads(path.read_text())["trainings"] if path.exists() else []  # type: ignore[no-any-return]


def test_a_training_states_what_it_spent_and_a_second_one_is_refused(run: RunConfig) -> None:
    found = tuned(run)
    assert found.privacy is not None
    assert 3.8 < found.privacy.epsilon <= 4.0
    assert (found.privacy.steps, found.privacy.trainings, found.cloud_alone) == (12, 1, None)
    assert all(map(math.isnan, found.curve))
    assert not torch.equal(found.candidate.model.weight, build_model_weight(run))
    assert [one["complete"] for one in recorded(run)] == [True]
    with pytest.raises(BudgetExhausted, match=r"1 training .* spent epsilon 4\.00, and one more"):
        tuned(run)
    assert len(recorded(run)) == 1


def build_model_weight(run: RunConfig) -> torch.Tensor:
    return build_model(make_task(model=lambda: nn.Linear(5, 3)), run).model.weight  # type: ignore[union-attr,return-value]


def test_two_trainings_share_a_budget_that_was_planned_for_both(run: RunConfig) -> None:
    privacy = run.finetune.privacy.model_copy(update={"trainings": 2})
    finetune = run.finetune.model_copy(update={"privacy": privacy})
    planned = run.model_copy(update={"finetune": finetune})
    first, second = tuned(planned), tuned(planned)
    assert first.privacy is not None
    assert second.privacy is not None
    assert first.privacy.epsilon < 3.5 < second.privacy.epsilon <= 4.0
    assert second.privacy.trainings == 2
    # Noise comes from the operating system: equal settings give other weights.
    assert not torch.equal(first.candidate.model.weight, second.candidate.model.weight)
    with pytest.raises(BudgetExhausted):
        tuned(planned)


def test_an_interrupted_training_goes_on_under_its_charge(run: RunConfig) -> None:
    plan = plan_of(run, 44)
    interrupted = ExitStack()
    statement = interrupted.enter_context(charged(run, plan, identity="a"))
    assert [one["complete"] for one in recorded(run)] == [False]  # charged before
    assert not interrupted.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    with charged(run, plan, identity="a") as again:
        assert again == statement
        busy = pytest.raises(ResourceError, match="another training uses this ledger")
        with busy, charged(run, plan, identity="a"):
            pass
    assert [one["complete"] for one in recorded(run)] == [True]
    with pytest.raises(BudgetExhausted), charged(run, plan, identity="a"):
        pass
    with pytest.raises(BudgetExhausted), charged(run, plan, identity="another"):
        pass


@pytest.mark.parametrize("spoilt", [b"{", b'{"format": 2}', b'{"trainings": [{"steps": 0}]}'])
def test_a_damaged_ledger_stops_training(run: RunConfig, spoilt: bytes) -> None:
    (run.base / "cloud-ledger.json").write_bytes(spoilt)
    with pytest.raises(DataError, match=r"no privacy ledger.*restore the file"):
        tuned(run)


def test_only_fine_tuning_reads_private_data() -> None:
    task = replace(
        make_task(),
        cloud_data=lambda folder: make_examples(),
        cloud_heldout=lambda folder: make_examples(21),
    )
    cloud = read_cloud_data(task, None, holdout=0.3, seed=0, private=True)
    assert isinstance(cloud, CloudData)
    assert size_of(cloud.of_tuning) == 44
    assert {size_of(cloud.train), size_of(cloud.heldout)} == {10, 11}
    with pytest.raises(ConfigError, match="needs cloud_heldout"):
        read_cloud_data(replace(task, cloud_heldout=None), None, holdout=0.3, seed=0, private=True)
