from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedcore import Task
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError
from fedcore.seeds import torch_rng
from fedcore.task.definition import Examples
from server.preflight import Prepared
from server.rounds.cohort import select
from server.simulation.replay import replay
from server.simulation.virtual.nodes import FIRST_NODE_ID

NAMES = ("anna", "ben", "cleo", "a:b")


def data(name: str) -> Examples:
    inputs = torch.randn(8, 4, generator=torch_rng(0, name))
    return TensorDataset(inputs, inputs.argmax(1))  # type: ignore[return-value]


TASK = Task(
    name="tiny",
    kind="classification",
    model=lambda: nn.Sequential(nn.Linear(4, 4)),
    clients=lambda folder: NAMES,
    client_data=lambda name, folder: data(name),
    test_data=lambda folder: data("test"),
    example_input=torch.zeros(4),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text("")
    return tmp_path


def replayed(text: str, folder: Path, **federation: object) -> str:
    run = RunConfig.model_validate(
        {
            "name": "tiny",
            "task": "task.py",
            "base": folder,
            "federation": {"rounds": 3, **federation},
            "simulation": {"training": "loop", "workers": 1},
        }
    )
    prepared = Prepared(None, NAMES, None, data("test"))
    notes: list[str] = []
    found = replay(text, run, TASK, OPEN_POLICY, prepared, folder / "runs", on_note=notes.append)
    assert found.ok
    return "\n".join((*notes, found.line))


def test_without_a_run_it_is_simulated_from_the_beginning(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noted, said = replayed("3:a:b", folder).splitlines()
    assert noted == "Simulating rounds 1 to 2 again."
    assert said.startswith("round 3: client 'a:b' trained on 8 examples in ")
    assert "train_loss" in said
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in folder.iterdir()] == ["task.py"]


@pytest.mark.parametrize("strategy", ["DifferentialPrivacyClientSideFixedClipping", "FedProx"])
def test_a_client_is_told_what_its_strategy_tells_it(strategy: str, folder: Path) -> None:
    options = {
        "FedProx": {"proximal_mu": 0.5},
        "DifferentialPrivacyClientSideFixedClipping": {
            "noise_multiplier": 0.1,
            "clipping_norm": 1.0,
        },
    }
    said = replayed("2:ben", folder, strategy=strategy, strategy_options=options[strategy])
    assert "client 'ben' trained on 8 examples" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anna", "expected ROUND:CLIENT"),
        ("x:anna", "expected ROUND:CLIENT"),
        ("-1:anna", "expected ROUND:CLIENT"),
        ("0:anna", "rounds 1 to 3"),
        ("4:anna", "rounds 1 to 3"),
        ("1:ana", "Did you mean 'anna'"),
        ("1:", "no client ''"),
    ],
)
def test_what_there_is_not_is_refused(text: str, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        replayed(text, folder)


def test_who_was_not_asked_is_refused_and_who_was_is_named(folder: Path) -> None:
    run = RunConfig(name="tiny", task="task.py")
    nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + len(NAMES))
    (node,) = select(nodes, 1, seed=run.seed, words=("round", 1))
    asked = NAMES[node - FIRST_NODE_ID]
    assert "trained on 8 examples" in replayed(f"1:{asked}", folder, cohort=1)
    for name in set(NAMES) - {asked}:
        with pytest.raises(ConfigError, match=f"was not selected in round 1.* selected: {asked}"):
            replayed(f"1:{name}", folder, cohort=1)


def test_who_holds_back_all_of_its_data_is_never_replayed_and_others_are_drawn(
    folder: Path,
) -> None:
    """Of the four, by their names, all but ``ben`` judge."""
    apart = {"holdout": 0.45, "holdout_by": "clients", "evaluate_cohort": 3}
    assert "client 'ben' trained on 8 examples" in replayed("2:ben", folder, **apart)
    assert "client 'ben' trained on 8 examples" in replayed("3:ben", folder, cohort=1, **apart)
    with pytest.raises(ConfigError, match=r"'anna' holds back all .* trains in no round"):
        replayed("1:anna", folder, **apart)
