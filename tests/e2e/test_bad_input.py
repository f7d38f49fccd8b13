"""What goes wrong ends in one short paragraph and a documented exit code, and leaves no halves."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.task.templates import new_task

pytestmark = pytest.mark.xdist_group("bad_input")

Done = subprocess.CompletedProcess[str]
Fedcore = Callable[..., Done]
QUICK = [
    *("--set", "federation.rounds=1", "--set", "client.epochs=1", "--set", "finetune.epochs=0"),
    *("--set", 'compression.candidates=["fp32"]', "--set", "compression.timing_runs=100"),
]
LONGEST = 1000  # characters of a paragraph: one that lists every strategy is the longest


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A task and a run that work, in a folder of their own."""
    new_task(tmp_path / "work", kind="classification")
    return tmp_path / "work"


def check(done: Done, *, code: int, kind: str, said: str) -> None:
    """One paragraph of the documented kind on standard error, and nothing like a traceback."""
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{kind}: ")
    assert said in lines[0]
    assert len(lines[0]) <= LONGEST
    assert lines[0].rstrip().endswith((".", "'", ")", '"')), lines[0]
    assert "Traceback" not in done.stdout + done.stderr


def check_nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob("summary.json"))
    assert not list(folder.rglob("report.html"))
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def add(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("toml", "options", "said"),
    [
        ("[federation\n", [], "not valid TOML"),
        ("rounds = 5\n", [], "run.toml: unknown key 'rounds' (set to 5). Did you mean"),
        (
            "[federation]\nround = 5\n",
            [],
            "unknown key 'federation.round' (set to 5). Did you mean 'federation.rounds'?",
        ),
        ("[federation]\nrounds = '5'\n", [], "federation.rounds = '5': it should be a valid int"),
        ("[federation]\nrounds = 0\n", [], "federation.rounds = 0: it should be greater than"),
        ("[client]\nlearning_rate = nan\n", [], "client.learning_rate = nan: it should be a fini"),
        (
            "[federation]\nevaluate_cohort = 2\nholdout = 0.2\n[privacy]\nunit = 'both'\n",
            [],
            "federation.evaluate_cohort = 2 contradicts privacy.unit = 'both'",
        ),
        (
            "[release]\nkeys = 'keys'\n",
            [],
            "release.repository and release.keys must be set together",
        ),
        ("", ["--set", "federation.rouns=5"], "--set federation.rouns=5: unknown key"),
        ("", ["--set", "federation.rounds=many"], "federation.rounds = 'many': it should be"),
        ("", ["--set", "federation.rounds"], "expected section.key=value"),
        ("", ["--owner", "gone.toml"], "gone.toml: this file does not exist"),
        ("", ["--epochs", "5"], "unrecognized arguments: --epochs 5"),
    ],
)
def test_a_configuration_that_is_wrong_stops_before_anything_runs(
    toml: str, options: list[str], said: str, fedcore: Fedcore, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(f'name = "work"\ntask = "task.py"\n{toml}')
    done = fedcore("simulate", "run.toml", *options, cwd=tmp_path)
    check(done, code=2, kind="ConfigError", said=said)
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: VERB"),
        (["simulat"], "invalid choice: 'simulat'"),
        (["simulate"], "the following arguments are required: config"),
        (
            ["simulate", "gone.toml"],
            "gone.toml: this file does not exist. Nothing was run. `fedcor",
        ),
        (["simulate", "work/task.py"], "work/task.py: this is a Python file, such as a task's"),
        (["simulate", "."], "it is a folder or another kind of file"),
        (["device"], "the following arguments are required: VERB"),
        (["new", "Not A Name"], "is not a valid run name"),
    ],
)
def test_a_command_line_that_is_wrong_says_what_is(
    arguments: list[str], said: str, fedcore: Fedcore, tmp_path: Path
) -> None:
    check(fedcore(*arguments, cwd=tmp_path), code=2, kind="ConfigError", said=said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["federation.strategy=FedAvgg"], "Did you mean 'FedAvg'?"),
        (["federation.strategy=FedXgbBagging"], "it aggregates XGBoost trees"),
        (["federation.normalisation=cloud"], "the task has no cloud_data"),
        (["client.device=cuda"], "this machine has no such device"),
    ],
    ids=["strategy", "trees", "normalisation", "device"],
)
def test_a_choice_that_this_task_or_machine_cannot_follow_is_refused(
    options: list[str], said: str, fedcore: Fedcore, work: Path
) -> None:
    if "cloud_data" in said:
        replace(work / "task.py", '    cloud_data=lambda folder: parts()["cloud"],\n', "")
    changes = [part for option in options for part in ("--set", option)]
    done = fedcore(
        "simulate", "run.toml", *QUICK, *changes, cwd=work, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    check(done, code=2, kind="ConfigError", said=said)
    check_nothing_half_written(work)


TASKS = {
    "syntax": ("def", 3, "TaskError", "importing this task failed: SyntaxError"),
    "no task": ("del task", 3, "TaskError", "expected a variable `task` that is a fedcore.Task"),
    "no model": (
        "import dataclasses\ntask = dataclasses.replace(task, model=lambda: 1 / 0)",
        3,
        "TaskError",
        "building the model failed: ZeroDivisionError",
    ),
    "batch norm under privacy": (
        "import dataclasses\n"
        "network = lambda: nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 3))\n"
        "task = dataclasses.replace(task, model=network)",
        5,
        "UnsupportedLayer",
        "does not support 0 (BatchNorm1d)",
    ),
    "a missing file": (
        "import dataclasses\n"
        "task = dataclasses.replace(task, test_data=lambda folder: open('test.csv'))",
        4,
        "DataError",
        "test data: reading it failed: FileNotFoundError: [Errno 2] No such file or directory",
    ),
    "a corrupt file": (
        "import dataclasses, json\n"
        "def broken(folder): return json.loads('[[1, 2')\n"
        "task = dataclasses.replace(task, cloud_data=broken)",
        4,
        "DataError",
        "cloud data: reading it failed: JSONDecodeError",
    ),
    "clients without data": (
        "import dataclasses\n"
        "from torch.utils.data import Subset\n"
        "empty = lambda client, folder: Subset(parts()['test'], [])\n"
        "task = dataclasses.replace(task, client_data=empty)",
        4,
        "DataError",
        "data of client 'client-0': got no examples",
    ),
    "a loss that turns NaN": (
        "import dataclasses\n"
        "nan = lambda outputs, targets: outputs.sum() * float('nan')\n"
        "task = dataclasses.replace(task, loss=nan)",
        6,
        "TrainingError",
        "the loss was nan in local epoch 1",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "code", "kind", "said"), TASKS.values(), ids=TASKS.keys())
def test_a_task_that_is_wrong_ends_the_run(
    changes: str, code: int, kind: str, said: str, fedcore: Fedcore, work: Path
) -> None:
    add(work / "task.py", f"\n{changes}\n")
    private = ["--set", "privacy.unit=example"] if code == 5 else []
    done = fedcore("simulate", "run.toml", *QUICK, *private, cwd=work)
    check(done, code=code, kind=kind, said=said)
    check_nothing_half_written(work)
    assert not list(work.rglob("global.safetensors"))


@pytest.mark.slow
def test_one_client_without_data_is_told_of_and_the_others_train(
    fedcore: Fedcore, work: Path
) -> None:
    add(
        work / "task.py",
        "\nimport dataclasses\nfrom torch.utils.data import Subset\n"
        "def some(client, folder):\n"
        "    return Subset(parts()[client], []) if client == 'client-3' else parts()[client]\n"
        "task = dataclasses.replace(task, client_data=some)\n",
    )
    done = fedcore("simulate", "run.toml", *QUICK, cwd=work)
    assert done.returncode == 0, done.stderr
    assert (
        "note: round 1: 1 of 8 clients failed. First: client 'client-3': DataError" in done.stdout
    )
    assert "clients 7/8" in done.stdout
    assert (work / "runs" / "work" / "summary.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "code", "kind", "said"),
    [
        (
            ["--set", "privacy.unit=example", "--set", "privacy.noise_multiplier=0.1"],
            5,
            "BudgetExhausted",
            "round 1: all 8 clients declined. Nothing was trained",
        ),
        (
            ["--set", "federation.initial=start.safetensors"],
            4,
            "DataError",
            "start.safetensors: not a safetensors checkpoint",
        ),
        (["--owner", "owner.toml"], 7, "ResourceError", "the owner's limit is 10 bytes"),
        (
            ["--set", "release.repository=releases", "--set", "release.keys=keys"],
            9,
            "ReleaseError",
            "fedcore release init",
        ),
    ],
    ids=["budget", "checkpoint", "memory", "keys"],
)
def test_a_run_that_cannot_be_done_ends_with_the_reason(
    options: list[str], code: int, kind: str, said: str, fedcore: Fedcore, work: Path
) -> None:
    (work / "owner.toml").write_text("max_memory_bytes = 10\n")
    (work / "start.safetensors").write_bytes(b"\x00" * 100)
    done = fedcore("simulate", "run.toml", *QUICK, *options, cwd=work)
    check(done, code=code, kind=kind, said=said)
    check_nothing_half_written(work)


def test_a_data_folder_that_is_not_there_is_named(fedcore: Fedcore, work: Path) -> None:
    done = fedcore("simulate", "run.toml", cwd=work, env={"FEDCORE_DATA": "/nowhere/at/all"})
    check(done, code=4, kind="DataError", said="FEDCORE_DATA = /nowhere/at/all: this folder does n")


def test_a_folder_that_no_run_wrote_is_left_alone(fedcore: Fedcore, work: Path) -> None:
    (work / "runs" / "work").mkdir(parents=True)
    (work / "runs" / "work" / "thesis.tex").write_text("years of work")
    done = fedcore("simulate", "run.toml", cwd=work)
    check(done, code=2, kind="ConfigError", said="this folder was not written by a run")
    assert (work / "runs" / "work" / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.parametrize("room", [4_000, 30_000], ids=["candidates", "report"])
def test_a_full_disk_ends_the_run_and_leaves_no_half_of_a_file(
    room: int, fresh_fedcore: Fedcore, work: Path
) -> None:
    def no_file_grows_beyond() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))  # Python ignores SIGXFSZ

    done = fresh_fedcore("simulate", "run.toml", *QUICK, cwd=work, preexec_fn=no_file_grows_beyond)
    check(done, code=7, kind="DiskFull", said="the disk has no room for this file")
    check_nothing_half_written(work)
    for path in work.rglob("*.safetensors"):
        assert path.stat().st_size < room


@pytest.fixture(scope="module")
def released(fedcore: Fedcore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model, and a root that another repository is signed by."""
    folder = tmp_path_factory.mktemp("released") / "work"
    new_task(folder, kind="classification")
    for name in ("", "other-"):
        places = ["--keys", f"{name}keys", "--repository", f"{name}releases", "--model", "work"]
        assert fedcore("release", "init", *places, cwd=folder).returncode == 0
    publish = ["--set", "release.repository=releases", "--set", "release.keys=keys"]
    done = fedcore("simulate", "run.toml", *QUICK, *publish, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def update(fedcore: Fedcore, folder: Path, *, root: str) -> Done:
    places = ["--repository", "releases", "--root", root, "--model", "work", "--store", "store"]
    return fedcore("device", "update", *places, cwd=folder)


def check_nothing_installed(folder: Path, fedcore: Fedcore) -> None:
    (folder / "input.json").write_text(f"[{[20.0] * 12}]")
    asked = ["--store", "store", "--model", "work", "--input", "input.json"]
    done = fedcore("device", "infer", *asked, cwd=folder)
    check(done, code=11, kind="DeviceError", said="work")


@pytest.mark.slow
def test_a_repository_that_someone_else_signed_is_not_trusted(
    released: Path, fedcore: Fedcore, tmp_path: Path
) -> None:
    folder = shutil.copytree(released, tmp_path / "work")
    done = update(fedcore, folder, root="other-keys/root.json")
    check(done, code=10, kind="SignatureInvalid", said="")
    check_nothing_installed(folder, fedcore)


@pytest.mark.slow
def test_a_model_with_one_byte_changed_is_not_used(
    released: Path, fedcore: Fedcore, tmp_path: Path
) -> None:
    folder = shutil.copytree(released, tmp_path / "work")
    (onnx,) = (folder / "releases").rglob("*.onnx")
    raw = bytearray(onnx.read_bytes())
    raw[len(raw) // 2] ^= 1
    onnx.write_bytes(raw)
    done = update(fedcore, folder, root="keys/root.json")
    check(done, code=10, kind="DigestMismatch", said="sha256")
    check_nothing_installed(folder, fedcore)


@pytest.mark.slow
def test_the_same_repository_untouched_is_trusted(
    released: Path, fedcore: Fedcore, tmp_path: Path
) -> None:
    folder = shutil.copytree(released, tmp_path / "work")
    done = update(fedcore, folder, root="keys/root.json")
    assert done.returncode == 0, done.stderr
    assert "version 1 is active" in done.stdout
