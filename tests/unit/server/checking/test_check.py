from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, TaskError
from fedcore.task.definition import load_task
from fedcore.task.templates import KINDS, new_task
from server.api.checking import check as check_call
from server.checking.data_steps import look_at_client_data, make_model, name_clients
from server.checking.findings import CheckFinding, TaskCheck
from server.checking.rehearsal import compute_loss, train_clients, try_strategy
from server.checking.state import CheckState
from server.commands import check as command

STEPS = [
    *("clients", "model", "client data", "cloud data", "test data", "loss", "training"),
    *("side by side", "state", "metrics", "strategy", "privacy", "resume"),
    *("fine-tuning", "distributed", "export", "release"),
]
TASK = """
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset
from fedcore import Task

torch.manual_seed(0)
inputs, targets = torch.randn(30, 4), torch.arange(30) % 3
data = TensorDataset(inputs, targets)
values = dict(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
    clients=lambda folder: ["anna", "ben"],
    client_data=lambda client, folder: data,
    cloud_data=lambda folder: data,
    test_data=lambda folder: data,
    example_input=torch.zeros(4),
)
"""


def write(folder: Path, changes: str = "") -> Path:
    path = folder / "task.py"
    path.write_text(f"{TASK}{changes}\ntask = Task(**values)\n")
    return path


def check(folder: Path, changes: str = "", *, client: str | None = None) -> dict[str, CheckFinding]:
    clients = None if client is None else [client]
    checked = check_call(write(folder, changes), clients=clients)
    return {f.step: f for f in checked.findings if f.fault is None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_task_passes_every_step(tmp_path: Path, kind: str) -> None:
    task, run = new_task(tmp_path / "x", kind=kind)
    checked = check_call(None, run) if kind == "regression" else check_call(task)
    findings = checked.findings
    assert checked.ok
    noted = [finding.detail for finding in findings if finding.fault]
    only = "int8_dynamic: refused: none of its layers can be quantised"  # convolutions alone
    assert noted == ([only] if kind == "segmentation" else [])
    assert [finding.step for finding in findings if not finding.fault] == STEPS
    assert all(finding.ok or finding.fault for finding in findings), findings
    assert all(finding.seconds >= 0 for finding in findings)


def test_findings_tell_what_was_seen(tmp_path: Path) -> None:
    found = check(tmp_path, client="ben")
    assert found["clients"].detail == "2 clients"
    assert found["client data"].detail == (
        "30 examples, 30 a client; inputs torch.float32 (4,), targets torch.int64 (); looked at "
        "every row of 1 client; 1 not read; --clients all looks at every row"
    )
    assert found["model"].detail == (
        "67 parameters, 0.00 MB an update; outputs (3,) for inputs torch.float32 (4,)"
    )
    assert found["test data"].detail == "30 examples"
    assert "by DDP in 2 processes" in found["distributed"].detail
    assert "int8_static, int8_dynamic, pruned, pruned_int8 can be built" in found["export"].detail


@pytest.mark.parametrize(
    ("changes", "step", "said"),
    [
        ("values['clients'] = lambda folder: []", "clients", "clients() returned 0 clients"),
        ("values['clients'] = lambda folder: 1 / 0", "clients", "ZeroDivisionError"),
        (
            "values['clients'] = lambda folder: ['anna', 'ben', 'anna']",
            "clients",
            "3 clients, 2 of them different ('anna' more than once)",
        ),
        (
            "values['client_data'] = lambda c, f: open(c + '.csv')",
            "client data",
            "data of client 'ben': reading it failed: FileNotFoundError",
        ),
        (
            "values['client_data'] = lambda c, f: Subset(data, [] if c == 'ben' else [0, 1])",
            "client data",
            "data of client 'ben': got no examples",
        ),
        (
            "values['model'] = lambda: 1 / 0",
            "model",
            "building the model failed: ZeroDivisionError",
        ),
        ("import sys\nvalues['model'] = lambda: sys.exit(2)", "model", "failed: SystemExit: 2"),
        (
            "import sys\n"
            "class Exits(nn.Linear):\n"
            "    def forward(self, x):\n"
            "        sys.exit('no GPU')\n"
            "values['model'] = lambda: Exits(4, 3)",
            "model",
            "the model fails on 2 inputs like example_input, which is torch.float32 (4,): "
            "SystemExit: no GPU",
        ),
        (
            "import sys\nvalues['loss'] = lambda o, t: sys.exit('no loss')",
            "loss",
            "client 'ben': SystemExit: no loss",
        ),
        ("values['preprocess'] = lambda: nn.Linear(4, 4)", "model", "preprocess has parameters"),
        ("values['example_input'] = torch.zeros(5)", "model", "mat1 and mat2"),
        ("values['model'] = lambda: nn.Linear(7, 3)", "model", "mat1 and mat2"),
        (
            "values['example_input'] = torch.zeros(2, 4)\n"
            "values['model'] = lambda: nn.Sequential(nn.Flatten(), nn.Linear(8, 3))",
            "client data",
            "client 'ben', row 0, and 29 other rows: inputs are (4,), expected (2, 4)",
        ),
        (
            "inputs[3, 1] = float('nan')",
            "client data",
            "client 'ben', row 3: column 1 is nan, expected a finite number",
        ),
        (
            "targets[0] = 3",
            "client data",
            "client 'ben', row 0: the target is 3, expected a whole number from 0 to 2",
        ),
        ("targets[0] = -1", "cloud data", "cloud data, row 0: the target is -1, expected"),
        ("values['labels'] = ('a', 'b')", "model", "2 labels for 3 outputs"),
        ("values['kind'] = 'regression'", "client data", "expected as many numbers as outputs"),
        ("values['loss'] = lambda o, t: o.sum(1)", "loss", "expected one finite number"),
        ("values['loss'] = lambda o, t: o.sum() / 0", "loss", "client 'ben': the loss is"),
        (
            "values['loss'] = lambda o, t: o.detach().mean()",
            "training",
            "does not require grad",
        ),
        (
            "values['loss'] = lambda o, t: (1e4 * o).square().mean()",
            "training",
            "client 'ben': training diverges: the mean loss was",
        ),
        (
            "from fedcore.task.metrics import Metric\n"
            "values['metrics'] = (Metric('m', lambda o, t: o[99], higher_is_better=True),)",
            "metrics",
            "client 'anna': metric 'm' failed: IndexError",
        ),
        (
            "class Sorts(nn.Module):\n"
            "    def forward(self, x):\n"
            "        return torch.tensor([sorted(row) for row in x.tolist()]) + x * 0\n"
            "values['model'] = lambda: nn.Sequential(nn.Linear(4, 3), Sorts())",
            "export",
            "layer 'model.1' (Sorts) cannot be exported to ONNX",
        ),
        ("values['test_data'] = lambda f: Subset(data, [])", "test data", "test data: got no"),
        (
            "values['cloud_data'] = lambda f: TensorDataset(torch.zeros(5, 9), torch.zeros(5))",
            "cloud data",
            "cloud data, row 0, and 4 other rows: inputs are (9,), expected (4,)",
        ),
    ],
)
def test_what_would_fail_later_is_found_at_its_step(
    tmp_path: Path, changes: str, step: str, said: str
) -> None:
    checked = check_call(write(tmp_path, changes))
    assert not checked.ok
    failed = [finding for finding in checked.findings if finding.required and not finding.ok]
    assert said in " ".join(finding.detail for finding in failed if finding.step == step), checked
    data = STEPS[:5]
    last = checked.findings[-1].step
    assert last == ("test data" if step in data[2:] else step)


def test_clients_take_an_epoch_with_the_first_rounds_settings(tmp_path: Path) -> None:
    """Whatever their number of steps, which would take hours here."""
    schedule = {"learning_rate": [1e6, 0.1]}
    for client, said in (
        ({"steps": 10**6}, ""),
        ({"epochs": 10**4, "schedule": {"epochs": [10**4, 1]}}, ""),
        ({"learning_rate": 0.1, "schedule": schedule}, "lower client.learning_rate (1e+06)"),
    ):
        run = RunConfig.model_validate({"name": "x", "task": "task.py", "client": client})
        task = load_task(write(tmp_path))
        state = CheckState(run, task, "simulation", None, None, print)
        for step in (name_clients, make_model, look_at_client_data, compute_loss):
            step(state)
        found = " ".join(fault.found.text for fault in train_clients(state).faults)
        assert said in found if said else not found


def test_clients_that_judge_are_told_and_not_rehearsed_in_training(tmp_path: Path) -> None:
    """Of client-0 to client-7, by their names, 3, 6 and 7 judge."""
    names = "values['clients'] = lambda folder: [f'client-{n}' for n in range(8)]"
    federation = {"holdout": 0.45, "holdout_by": "clients", "evaluate_cohort": 8}
    values = {"name": "x", "task": "task.py", "federation": federation}
    task, run = load_task(write(tmp_path, names)), RunConfig.model_validate(values)
    state = CheckState(run, task, "simulation", "all", None, print)
    assert name_clients(state).text == "8 clients, of whom 3 judge and never train"
    make_model(state)
    look_at_client_data(state)
    assert set(state.trained_on) == {f"client-{n}" for n in (0, 1, 2, 4, 5)}
    for step in (compute_loss, train_clients, try_strategy):
        assert not step(state).faults
    device = CheckState(run, task, "device", ["client-3"], None, print)
    assert "'client-3', which evaluates models and never trains" in name_clients(device).text
    few = RunConfig.model_validate(values | {"federation": federation | {"holdout": 0.1}})
    with pytest.raises(ConfigError, match="1 of 8 clients hold back all of their data"):
        name_clients(CheckState(few, task, "simulation", None, None, print))


def test_batch_norm_is_a_note_without_privacy_and_a_failure_with_it(tmp_path: Path) -> None:
    changes = "values['model'] = lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))"
    found = check(tmp_path, changes)
    assert not found["privacy"].ok
    assert not found["privacy"].required
    assert "BatchNorm1d" in found["privacy"].detail
    assert found["export"].ok
    run = tmp_path / "run.toml"
    run.write_text('name = "x"\ntask = "task.py"\n[privacy]\nunit = "example"\n')
    last = check_call(None, run).findings[-1]
    assert (last.step, last.ok, last.required) == ("privacy", False, True)


def test_a_client_may_have_no_test_data_of_its_own(tmp_path: Path) -> None:
    """Others may have some; a run leaves it out of the final test."""
    own = "values['client_test'] = lambda c, f: Subset(data, [0, 1] if c == 'anna' else [])"
    found = check(tmp_path, own, client="anna")
    assert found["test data"].detail == "30 examples; 2 examples of client 'anna'"
    found = check(tmp_path, own, client="ben")
    assert found["test data"].ok
    assert found["test data"].detail == "30 examples; no examples of client 'ben'"


def test_what_cannot_be_released_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a repository can do without; one with a repository would fail at its end."""
    monkeypatch.setattr("server.release.draft.MAX_GOLDEN_BYTES", 10)
    task = write(tmp_path, "del values['cloud_data']")
    found = check_call(task).findings[-1]
    assert (found.step, found.ok, found.required) == ("release", False, False)
    assert "its golden file has" in found.detail
    release = {"repository": "releases", "keys": "keys"}
    found = check_call(task, release=release).findings[-1]
    assert (found.ok, found.required) == (False, True)


def test_a_client_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = check(tmp_path, client="carl")
    assert found["clients"].detail == "client 'carl': not among the 2 clients."


def test_a_task_without_cloud_data_is_told_what_is_left_out(tmp_path: Path) -> None:
    found = check(tmp_path, "del values['cloud_data']")
    assert found["cloud data"].ok
    assert "fine-tuning, its gate and every candidate except fp32 are skipped" in (
        found["cloud data"].detail
    )


def test_a_task_that_cannot_be_loaded_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"importing this task failed: ZeroDivisionError"):
        check_call(write(tmp_path, "1 / 0"))
    with pytest.raises(ConfigError, match=r"run\.toml: this file does not exist"):
        check_call(None, tmp_path / "run.toml")


def test_findings_are_a_line_each() -> None:
    findings = [
        CheckFinding("clients", True, True, "2 clients", 0.1),
        CheckFinding("privacy", False, False, "no", 0.2),
    ]
    checked = TaskCheck(tuple(findings))
    assert checked.ok
    assert str(checked).splitlines() == [
        "ok   clients      2 clients [0.10 s]",
        "note privacy      no [0.20 s]",
        "This task is ready, with 1 note.",
    ]
    failed = TaskCheck((*findings, CheckFinding("export", False, True, "bad", 0.3)))
    assert not failed.ok
    assert str(failed).splitlines()[-2:] == [
        "FAIL export       bad [0.30 s]",
        "This task would fail.",
    ]


def test_findings_are_told_as_soon_as_there_are_any_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told: list[CheckFinding] = []
    checked = check_call(write(tmp_path), on_finding=told.append, progress=False)
    assert tuple(told) == checked.findings
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.arguments(parser)
    return command.run(parser.parse_args(arguments))


def test_the_command_prints_a_line_a_step_or_one_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path))
    assert run_command(path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[:-1]] == ["ok  "] * len(STEPS)
    assert lines[-1] == "This task is ready."
    write(tmp_path, "values['loss'] = lambda o, t: o.sum() / 0")
    assert run_command(path, "--json") == TaskError.exit_code
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [one["step"] for one in told["findings"]] == [*STEPS[:6], "loss", "loss"]
    assert [one["client"] for one in told["findings"]][-2:] == ["anna", "ben"]
    assert set(told["findings"][0]) == {
        *("step", "ok", "required", "detail", "seconds"),
        *("client", "row", "column", "fault"),
    }
