from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset

import fedcore
from fedcore import cli
from fedcore.config.run import DEFAULT_CANDIDATES, RunConfig
from fedcore.config.section import Section
from fedcore.config.settings import load_run
from fedcore.errors import ConfigError, DiskFull
from fedcore.files import write_atomic
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples, Task, load_task, size_of
from fedcore.task.kinds.registry import KindName
from fedcore.task.templates import KINDS, new_task
from fedcore.training.evaluate import evaluate
from fedcore.training.local import train

ROOT = Path(__file__).parents[4]


def made(folder: Path, kind: str) -> tuple[Task, RunConfig]:
    task, run = new_task(folder / "my-work", kind=kind)
    return load_task(task), load_run(run)


def network(task: Task) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(task.preprocess() if task.preprocess else nn.Identity(), task.model())


def test_there_is_one_for_each_kind_of_task() -> None:
    assert set(KINDS) <= set(get_args(KindName))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_learns_something_at_once(tmp_path: Path, kind: str) -> None:
    task, run = made(tmp_path, kind)
    assert task.name == run.name == "my-work"
    assert task.kind == kind
    assert run.path(run.task) == (tmp_path / "my-work" / "task.py").resolve()
    everyone: Examples = ConcatDataset(
        [task.client_data(name, None) for name in task.clients(None)]
    )
    model = network(task)
    test = task.test_data(None)
    before = evaluate(model, test, task.metrics)[task.primary.name]
    train(
        model,
        everyone,
        task.loss_of,
        run.client,
        epochs=4,
        batch_size=run.client.batch_size,
        rng=torch_rng(0),
    )
    after = evaluate(model, test, task.metrics)[task.primary.name]
    gained = task.primary.worsening(after, before)
    assert gained > (0.3 if task.primary.higher_is_better else 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_fit_together_and_are_made_by_the_seed(tmp_path: Path, kind: str) -> None:
    task, _ = made(tmp_path / "one", kind)
    again, _ = made(tmp_path / "two", kind)
    assert task.cloud_data is not None
    assert again.cloud_data is not None
    names = list(task.clients(None))
    assert len(names) >= 8
    sizes = [size_of(task.client_data(name, None)) for name in names]
    assert min(sizes) >= 20
    assert size_of(task.cloud_data(None)) <= 0.2 * sum(sizes)
    for one, other in (
        (task.cloud_data(None), again.cloud_data(None)),
        (task.client_data(names[0], None), again.client_data(names[0], None)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))
    assert one[0][0].shape == task.example_input.shape
    assert one[0][0].dtype == task.example_input.dtype
    with torch.inference_mode():
        assert len(network(task)(task.example_input.unsqueeze(0))) == 1


def test_the_run_shows_every_section() -> None:
    text = (ROOT / "fedcore" / "templates" / "run.toml").read_text()
    sections = [
        name
        for name, field in RunConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    ]
    assert [line[1:-1] for line in text.splitlines() if line.startswith("[")] == sections


def test_the_commented_keys_of_the_run_are_right_too(tmp_path: Path) -> None:
    _, path = new_task(tmp_path / "x", kind="classification")
    lines = path.read_text().splitlines()
    opened = [line[2:] if line.startswith("# ") and " = " in line else line for line in lines]
    path.write_text("\n".join(opened))
    run = load_run(path)
    assert run.federation.cohort == 4
    assert run.compression.max_p50_us == 50.0
    assert run.release.keys == "runs/keys"
    assert run.compression.candidates == DEFAULT_CANDIDATES


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_tidy(tmp_path: Path, kind: str) -> None:
    task, _ = new_task(tmp_path / "x", kind=kind)
    assert len(task.read_text().splitlines()) <= 65
    for action in (["check", "--ignore", "D"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *action, "--no-cache", "--config",
             str(ROOT / "pyproject.toml"), str(task)],
            capture_output=True,
            text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("present", ["task.py", "run.toml"])
def test_nothing_is_overwritten_and_nothing_half_written(tmp_path: Path, present: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / present).write_text("mine")
    with pytest.raises(ConfigError, match=f"{present}: this file exists already and is never"):
        new_task(folder, kind="classification")
    assert (folder / present).read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == [present]


def test_a_folder_with_other_files_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "data.csv").write_text("1,2")
    new_task(tmp_path / "x", kind="regression")
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["data.csv", "run.toml", "task.py"]


@pytest.mark.parametrize("name", ["My work", "-x", "x" * 65, "Größe", "a.b", ".."])
def test_a_name_that_no_run_may_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid run name; expected 1 to 64 of a-z"):
        new_task(tmp_path / name, kind="classification")
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind 'vision': expected one of classification"):
        new_task(tmp_path / "x", kind="vision")
    assert list(tmp_path.iterdir()) == []


def test_the_call_gives_what_the_next_calls_take(tmp_path: Path) -> None:
    made = fedcore.new_task(str(tmp_path / "x"))
    assert made == (made.task, made.run) == (tmp_path / "x/task.py", tmp_path / "x/run.toml")
    assert fedcore.load_run(made.run).name == fedcore.load_task(made.task).name == "x"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="expected a new folder, but a file has that name"):
        new_task(tmp_path / "x", kind="classification")


def test_a_full_disk_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, data: bytes) -> None:
        if path.name == "run.toml":
            raise DiskFull(f"{path}: the disk has no room for this file.")
        write_atomic(path, data)

    monkeypatch.setattr("fedcore.task.templates.write_atomic", fails)
    with pytest.raises(DiskFull):
        new_task(tmp_path / "x", kind="classification")
    assert list((tmp_path / "x").iterdir()) == []


def test_the_command_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "turbines"
    assert cli.main(["new", str(folder), "--kind", "regression"]) == 0
    said = capsys.readouterr().out
    assert f"fedcore check {folder}/task.py" in said
    assert f"fedcore simulate {folder}/run.toml" in said
    assert load_task(folder / "task.py").kind == "regression"
    assert cli.main(["new", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["new", str(tmp_path / "y"), "--kind", "ranking"]) == 2


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from fedcore.task.templates import new_task\n"
        "new_task(Path(sys.argv[1]), kind='next_token')\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not {"torch", "flwr"} & set(json.loads(done.stdout))


def test_a_place_elsewhere_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["new", "../there/turbines"]) == 0
    outside = tmp_path / "there" / "turbines"
    assert capsys.readouterr().out.startswith(
        f"note: {outside.resolve()} is outside the current folder"
    )
    assert (outside / "run.toml").is_file()
    assert cli.main(["new", "turbines"]) == 0
    assert "outside" not in capsys.readouterr().out
    assert cli.main(["new", "../there/.."]) == 2
