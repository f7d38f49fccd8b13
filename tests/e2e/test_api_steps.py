"""The steps after the rounds as calls of their own, from a simulation to a device's answer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import ConfigError, ReleaseError, ResourceError
from fedcore.observability.events import StageFinished
from fedcore.task.model import checkpoint_bytes
from tests.e2e.test_api import task_of

pytestmark = pytest.mark.xdist_group("api_steps")

TASK = task_of(cloud=True)
SETTINGS = {
    "federation": {"rounds": 4},
    "client": {"learning_rate": 0.5},
    "finetune": {"epochs": 2, "max_metric_drop": 1.0},
    # What is quicker, and by how many workers, differs between runs on a busy machine, and with
    # it the order of float32 sums.
    "simulation": {"training": "vectorised", "workers": 1},
    "compression": {"timing_runs": 100, "candidates": ("fp32", "int8_dynamic")},
    "release": {"max_test_drop": 1.0},
    "progress": False,
}


@pytest.fixture(scope="module")
def result() -> fedcore.Result:
    """A whole run over a task that is in no file."""
    return fedcore.simulate(TASK, **SETTINGS)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """An empty signed repository, and its keys."""
    found = {"repository": tmp_path / "releases", "keys": tmp_path / "keys"}
    fedcore.create_repository(**found)
    return found


def test_steps_one_by_one_do_what_one_call_does(
    result: fedcore.Result, places: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    rng = torch.get_rng_state()
    threads = torch.get_num_threads()
    rounds = fedcore.simulate(TASK, **{**SETTINGS, "finetune": {"epochs": 0}})
    assert checkpoint_bytes(rounds.model) == checkpoint_bytes(result.federated)
    (tmp_path / "global.safetensors").write_bytes(checkpoint_bytes(rounds.federated))
    tuned = fedcore.finetune(
        TASK,
        rounds.run,
        tmp_path / "global.safetensors",
        finetune=SETTINGS["finetune"],
        progress=False,
    )
    assert tuned.kept
    assert checkpoint_bytes(tuned.model) == checkpoint_bytes(result.model)
    compressed = fedcore.compress(TASK, result.run, tuned.model, progress=False)
    assert compressed.files == result.compressed.files
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads

    manifest = fedcore.publish(compressed, rounds, tuned=tuned, model="corners", **places)
    assert (manifest.version, manifest.lineage.finetuned) == (1, True)
    assert manifest.lineage.parent_sha256 == result.origin.parent_sha256
    assert manifest.test is not None
    assert (
        manifest.test.released == result.metrics["accuracy"]["released"]
        or compressed.chosen != result.compressed.chosen
    )
    again = fedcore.publish(result.compressed, result, **places)
    assert again.version == 2
    untuned = fedcore.publish(rounds.compressed, rounds, **places)
    assert (untuned.version, untuned.lineage.finetuned) == (3, False)

    root, store = places["keys"] / "root.json", tmp_path / "device"
    done = fedcore.update_model(store, "corners", repository=places["repository"], root=root)
    assert (done.version, done.changed) == (3, True)
    model = fedcore.open_model(store, "corners")
    inputs = torch.randn(5, 6)
    with torch.inference_mode():
        expected = rounds.model(inputs).numpy()
    assert model.version == 3
    assert np.abs(model.predict(inputs.numpy()) - expected).max() < 0.5
    assert model.predict(inputs[0].tolist()).shape == (3,)


def test_clients_of_a_simulation_judge_and_weigh(result: fedcore.Result) -> None:
    held = {"evaluate_cohort": 4, "holdout": 0.2, "rounds": 2}
    events: list[object] = []
    tuned = fedcore.finetune(
        TASK, result.run, result.federated, federation=held, progress=events.append
    )
    assert tuned.clients is not None
    assert tuned.clients.clients == 4
    (finished,) = (event for event in events if isinstance(event, StageFinished))
    assert "on held-out data of 4 clients" in finished.note
    compressed = fedcore.compress(TASK, result.run, tuned.model, federation=held, progress=False)
    assert all(each.clients_drop is not None for each in compressed.records)


def test_a_release_needs_a_line_of_evidence(
    result: fedcore.Result, places: dict[str, Path]
) -> None:
    other = fedcore.finetune(TASK, result.run, result.federated, seed=9, progress=False)
    compressed = fedcore.compress(TASK, result.run, other.model, progress=False)
    with pytest.raises(ConfigError, match=r"does not come from the rounds.*Nothing was published"):
        fedcore.publish(compressed, result, **places)
    assert fedcore.publish(compressed, result, tuned=other, **places).version == 1
    with torch.no_grad():  # trained on in a notebook, after fine-tuning
        next(other.model.parameters()).add_(0.1)
    changed = fedcore.compress(TASK, result.run, other.model, progress=False)
    with pytest.raises(ConfigError, match="does not come from the rounds"):
        fedcore.publish(changed, result, tuned=other, **places)
    twice = fedcore.finetune(TASK, result.run, other.model, progress=False)
    compressed = fedcore.compress(TASK, result.run, twice.model, progress=False)
    with pytest.raises(ConfigError, match="does not come from the rounds"):
        fedcore.publish(compressed, result, tuned=twice, **places)
    with pytest.raises(ConfigError, match=r"release\.keys of run 'corners' is not set"):
        fedcore.publish(result.compressed, result, repository=places["repository"])


def test_a_result_that_cannot_be_saved_leaves_nothing(
    result: fedcore.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "half").write_text("of it")
        raise shutil.Error([("a", "b", "No space left on device")])

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(ResourceError, match=r"cannot write it .*No space.*Nothing was saved"):
        result.save(tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_the_final_test_withholds_is_not_published(
    result: fedcore.Result, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.release.final_test._drop", lambda primary, tested: 1.5)
    with pytest.raises(ReleaseError, match=r"release\.max_test_drop = 1 is allowed"):
        fedcore.publish(result.compressed, result, **places)
    with pytest.raises(ReleaseError, match="model name 'No good'"):
        fedcore.publish(result.compressed, result, model="No good", **places)


def test_what_cannot_be_done_is_said_before_anything_runs(result: fedcore.Result) -> None:
    with pytest.raises(ConfigError, match="it has no cloud_data"):
        fedcore.finetune(task_of(), None, result.federated)
    with pytest.raises(ConfigError, match=r"finetune\.epochs = 0"):
        fedcore.finetune(TASK, None, result.federated, finetune={"epochs": 0})
    with pytest.raises(ConfigError, match=r"finetune\.processes = 2.*was created in memory"):
        fedcore.finetune(TASK, None, result.federated, finetune={"processes": 2})
    with pytest.raises(ConfigError, match="pass that folder as runs="):
        fedcore.simulate(TASK, resume=True)


def test_a_result_is_a_line_and_a_picture(result: fedcore.Result) -> None:
    assert repr(result).startswith("<Result 'corners': 4 rounds; accuracy: federated 0.")
    plot = result.plot()
    assert plot is not None
    assert plot._repr_html_().startswith("<svg")
    assert len(repr(result.compressed)) < 5000
    assert len(result.history) == 4


def test_an_interrupted_run_of_a_notebook_is_gone_on_with(tmp_path: Path) -> None:
    settings = {**SETTINGS, "finetune": {"epochs": 0}, "runs": tmp_path}
    whole = fedcore.simulate(TASK, **{**settings, "runs": None})

    def stop(event: object) -> None:
        if getattr(event, "values", {}).get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(TASK, **{**settings, "progress": stop})
    resumed = fedcore.simulate(TASK, resume=True, **settings)
    assert len(resumed.history) == 4
    assert checkpoint_bytes(resumed.model) == checkpoint_bytes(whole.model)
