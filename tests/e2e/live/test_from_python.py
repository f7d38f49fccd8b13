"""A server and a device that Python code starts, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedcore
from fedcore.errors import CertificateRefused, ConfigError, ResourceError, TaskError
from fedcore.observability.events import RoundFinished
from tests.e2e.live.conftest import TASK, free_port


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(fedcore.__file__).parents[1]))
    Path("task.py").write_text(TASK)
    Path("run.toml").write_text('name = "trial"\ntask = "task.py"\n[client]\nbatch_size = 8\n')
    authority = fedcore.create_authority("authority", "orchard")
    authority.add_server(["127.0.0.1"], port=free_port())
    authority.add_device("edge-0", fedcore.enrol("edge-0", "edge-0").request)
    fedcore.install_kit("edge-0", "edge-0.kit")
    authority.add_operator("anna", kit="anna")
    return tmp_path


@pytest.mark.slow
def test_a_run_from_its_first_key_to_its_model(here: Path) -> None:
    settings = {"federation": {"rounds": 2, "cohort": 1}}
    with (
        fedcore.start_server("run.toml", wake_port=0, **settings) as server,
        fedcore.start_client("edge-0", "task.py") as client,
    ):
        with pytest.raises(ResourceError, match="a server is running with this identity"):
            fedcore.start_server("run.toml")
        assert fedcore.ServerClient(kit="anna").status().project == "orchard"
        rounds = [one for one in server.events() if isinstance(one, RoundFinished)]
        assert [(one.values["round"], one.values["updates"]) for one in rounds] == [(1, 1), (2, 1)]
        assert server.wait(60.0)
        assert client.running
    assert not client.running
    assert "trial train: done" in client.log
    assert (server.folder / "global.safetensors").is_file()
    assert fedcore.verify_run(server.folder).clients == {"edge-0": 2}
    assert not fedcore.verify_ledger("edge-0").problems
    (run,) = fedcore.list_runs()
    assert (run.name, run.state) == ("trial", "complete")


def test_a_mistake_is_a_typed_error_and_starts_nothing(here: Path) -> None:
    with pytest.raises(CertificateRefused, match="expected a device's"):
        fedcore.start_client("anna", "task.py")
    with pytest.raises(TaskError, match=r"nosuch\.py: there is no such file"):
        fedcore.start_client("edge-0", "nosuch.py")
    with pytest.raises(ConfigError, match=r"^federation\.round=2: .*Did you mean"):
        fedcore.start_server("run.toml", federation={"round": 2})
    Path("task.py").write_text("task = 1 / 0\n")
    with pytest.raises(TaskError, match="ZeroDivisionError"):
        fedcore.start_server("run.toml", wake_port=0)
    assert not Path("runs").exists()
