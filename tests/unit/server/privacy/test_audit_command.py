from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

import fedcore
from fedcore.errors import ConfigError, DiskFull, PrivacyError, ResourceError
from fedcore.observability.words import epsilon_text
from fedcore.privacy.accounting import Charge, epsilon_of
from fedcore.privacy.draws import Draws
from fedcore.seeds import SystemEntropy
from server.privacy import audit as auditing
from server.privacy.audit import Effort
from server.privacy.audit_command import audit

QUICK = Effort(canaries=128, pilot=10, releases=40, one_run_canaries=60)
TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from fedcore import Task

data = TensorDataset(torch.zeros(60, 2), torch.zeros(60, dtype=torch.long))
print("read by nobody")
task = Task(
    name="small", kind="classification", model=lambda: nn.Linear(2, 2),
    clients=lambda folder: ["anna"], client_data=lambda client, folder: data,
    test_data=lambda folder: data, example_input=torch.zeros(2),
)
"""
RUN = """
name = "small"
task = "task.py"
[federation]
rounds = 2
[client]
batch_size = 30
[privacy]
unit = "example"
noise_multiplier = 2.0
target_delta = 1e-4
clip_norm = 0.5
"""


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    audit.arguments(parser)
    return audit.run(parser.parse_args(words))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auditing, "USUAL_EFFORT", QUICK)
    monkeypatch.setattr(
        auditing.audit, "__kwdefaults__", {**auditing.audit.__kwdefaults__, "effort": QUICK}
    )
    monkeypatch.setattr("server.privacy.auditing._PICTURES", 1)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.mark.usefixtures("quick")
def test_without_a_run_one_step_is_audited_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--seeds", "1", "--report", str(tmp_path / "audit")) == 0
    said = capsys.readouterr().out
    assert "one step with every example: noise multiplier 1, 1 step at sample rate 1" in said
    stated = epsilon_of((Charge(1, 1.0, 1.0, 1),), target_delta=1e-5, accountant="prv")
    assert f"stated epsilon {epsilon_text(stated)} at delta 1e-05" in said
    assert "gradient inversion" in said
    assert {path.name for path in (tmp_path / "audit").iterdir()} == {
        "report.html",
        "inversion.png",
    }


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.usefixtures("quick")
def test_a_run_is_audited_as_it_is_planned(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(config), "--seeds", "1", "--json") == 0
    *progress, summary = events(capsys.readouterr().out)
    assert {"stage_started", "stage_finished"} <= {event["event"] for event in progress}
    one, planned = summary["statements"]
    assert (one["sample_rate"], one["steps"], one["noise_multiplier"]) == (1.0, 1, 2.0)
    assert (planned["sample_rate"], planned["steps"]) == (0.5, 2)
    assert planned["clip_norm"] == 0.5
    assert planned["target_delta"] == 1e-4
    assert not summary["refuted"]
    assert one["confidence"] == pytest.approx(0.975)


@pytest.mark.usefixtures("quick")
def test_examples_stand_for_a_client_and_its_data_are_not_read(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "task.py").unlink()
    assert run(str(config), "--seeds", "1", "--json", "--examples", "30") == 0
    (statement,) = events(capsys.readouterr().out)[-1]["statements"]  # a round is one step then
    assert (statement["sample_rate"], statement["steps"]) == (1.0, 1)


class Silent:
    """Draws without noise."""

    def __init__(self, right: Draws) -> None:
        self.seed, self.poisson = right.seed, right.poisson

    def add_noise(self, *_: object, **__: object) -> None:
        return


@pytest.mark.usefixtures("quick")
def test_training_without_noise_ends_in_an_error_after_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = SystemEntropy.draws
    monkeypatch.setattr(SystemEntropy, "draws", lambda *words: Silent(right(*words)))
    with pytest.raises(PrivacyError, match=r"at least \d+.* stated 4\.4.*0\.000 was measured"):
        run("--seeds", "1", "--report", str(tmp_path))
    assert PrivacyError.exit_code == 5
    assert "REFUTED" in capsys.readouterr().out
    assert "REFUTED" in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("noise", [True, False], ids=["sound", "refuted"])
def test_findings_outlast_a_report_that_cannot_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    noise: bool,
) -> None:
    def full(*_: object) -> None:
        raise DiskFull("report.html: the disk has no room for this file.")

    monkeypatch.setattr("server.privacy.audit_report.write_atomic", full)
    if not noise:
        right = SystemEntropy.draws
        monkeypatch.setattr(SystemEntropy, "draws", lambda *words: Silent(right(*words)))
    with pytest.raises(DiskFull if noise else PrivacyError):
        run("--seeds", "1", "--report", str(tmp_path / "audit"))
    said = capsys.readouterr()
    assert "audited at least" in said.out
    assert ("not refuted" if noise else "REFUTED") in said.out
    assert "gradient inversion" in said.out
    assert ("DiskFull: report.html" in said.err) == (not noise)
    with pytest.raises(DiskFull if noise else PrivacyError):
        run("--seeds", "1", "--report", str(tmp_path / "audit"), "--json")
    assert events(capsys.readouterr().out)[-1]["refuted"] == (not noise)


def test_where_the_report_goes_is_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(_: object) -> None:
        raise AssertionError("something was audited")

    monkeypatch.setattr("server.privacy.audit_command._statements", work)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "audit" / "report.html").mkdir(parents=True)
    for folder, said in (
        (tmp_path / "file", "is a file, expected a folder"),
        (tmp_path / "file" / "below", "is a file, expected a folder"),
        (tmp_path / "audit", "expected a file to write"),
        (Path("/proc/audit"), "cannot write into /proc"),
    ):
        with pytest.raises(ResourceError, match=said):
            run("--report", str(folder))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(AssertionError):
        run("--report", str(tmp_path / "new" / "deep"))
    assert not (tmp_path / "new").exists()


def test_a_run_without_privacy_states_nothing(config: Path) -> None:
    with pytest.raises(
        ConfigError, match="unit is 'none', so the run states no epsilon of examples"
    ):
        run(str(config), "--set", "privacy.unit='none'")
    with pytest.raises(ConfigError, match=r"privacy\.unit is 'client'"):
        run(str(config), "--set", "privacy.unit='client'", "--set", "privacy.noise_multiplier=1.0")


@pytest.mark.parametrize("words", [["--examples", "600"], ["--set", "privacy.max_epsilon=4"]])
def test_what_is_said_of_no_run_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="no run's file was given"):
        run(*words)


@pytest.mark.parametrize(
    "words",
    [
        *(["--seeds", "0"], ["--seeds", "x"], ["--examples", "-1"], ["--seeds", "9" * 20]),
        *(["--seeds", "9" * 5000], ["--seeds", "10001"], ["--examples", "9" * 20]),
        ["--seeds", "\u00b2"],
    ],
)
def test_counts_have_bounds(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*words)
    assert f"{words[0]}: expected a whole number from 1 to " in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_an_audit_is_one_call(config: Path, tmp_path: Path) -> None:
    events: list[object] = []
    found = fedcore.audit_privacy(config, examples=30, seeds=1, progress=events.append, seed=4)
    (statement,) = found.statements
    assert statement.statement.plan.charge.noise_multiplier == 2.0
    assert not found.refuted
    assert events
    found.require_sound()
    assert str(found).startswith("one step with every example: noise multiplier 2")
    found.write_report(tmp_path / "audit")
    assert (tmp_path / "audit" / "report.html").is_file()
    with pytest.raises(ConfigError, match="states no epsilon"):
        fedcore.audit_privacy(config, examples=30, privacy={"unit": "none"})
    for wrong in ({"seeds": 0}, {"examples": 30}, {"seed": 4}):
        with pytest.raises(ConfigError, match="Nothing was audited"):
            fedcore.audit_privacy(**wrong)
