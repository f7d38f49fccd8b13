"""Layers that stay on clients, with the bits of a plain loop, wherever the clients run."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.config.owner import OPEN_POLICY
from fedcore.config.run import RunConfig
from fedcore.errors import ConfigError, ReleaseError, TaskError
from fedcore.seeds import torch_rng
from fedcore.task.definition import Task
from fedcore.task.model import build_model
from fedcore.updates.local import local_names
from server.preflight import prepare
from server.simulation.checkpoint import read_checkpoint
from tests.unit.server.simulation.plain import (
    BATCH,
    CLASSES,
    FEATURES,
    State,
    assert_equal,
    federated,
    mean,
    plain_training,
    task_of,
)

SIZES = {"a": 64, "b": 33, "c": 90}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def run_of(*local: str, **sections: Any) -> RunConfig:
    values = {
        "name": "run",
        "task": "task.py",
        "seed": 1,
        "federation": {"rounds": 3},
        "client": {"batch_size": BATCH, "epochs": 2, "local": local},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}  # type: ignore[dict-item]
    return RunConfig.model_validate(values)


def plain_personal_rounds(task: Task, run: RunConfig, kinds: tuple[str, ...]) -> State:
    """Federated averaging of what no pattern matches; each client goes on with its own rest."""
    model = build_model(task, run).model
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = {name for name in initial if any(fnmatchcase(name, kind) for kind in kinds)}
    kept = {client: {name: initial[name] for name in own} for client in SIZES}
    state = dict(initial)
    for number in range(1, run.federation.rounds + 1):
        trained, sizes = [], []
        for client in SIZES:
            model.load_state_dict({**state, **kept[client]})
            inputs, targets = task.client_data(client, None).tensors  # type: ignore[attr-defined]
            order = torch_rng(run.seed, "order", number, client)
            plain_training(model, inputs, targets, order, run)
            after = {name: one.clone() for name, one in model.state_dict().items()}
            kept[client] = {name: after[name] for name in own}
            trained.append(after)
            sizes.append(len(inputs))
        state |= {n: mean([one[n] for one in trained], sizes) for n in state if n not in own}
    return {**state, "body.1.num_batches_tracked": torch.tensor(0)}


HEAD, NORM = ("head.*",), ("body.1.*",)


@pytest.mark.parametrize(
    ("local", "kinds"), [(HEAD, HEAD), (("BatchNorm*",), NORM)], ids=["FedPer", "FedBN"]
)
def test_clients_keep_their_layers_and_average_the_rest(
    local: tuple[str, ...], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    task, run = task_of(Net, SIZES), run_of(*local, finetune={"epochs": 0})
    expected = plain_personal_rounds(task, run, kinds)
    found = federated(task, run)
    assert_equal(found.model.model, expected)
    many = fedcore.simulate(
        task, run, runs=tmp_path, simulation={"workers": 2}, compression={"candidates": ["fp32"]}
    )
    assert_equal(many.federated.model, expected)
    assert any("stay on each client" in note for note in many.record.notes)
    state = read_checkpoint(tmp_path / "run" / "checkpoint.safetensors").state
    assert set(state.locals) == set(SIZES)
    assert len({*state.locals.values()}) == len(SIZES)


def test_an_interrupted_run_goes_on_with_the_layers_that_clients_had(tmp_path: Path) -> None:
    task, run = task_of(Net, SIZES), run_of("head.*", finetune={"epochs": 0})
    settings: dict[str, Any] = {"compression": {"candidates": ["fp32"]}}

    def stop(event: Any) -> None:
        if getattr(event, "values", {}).get("round") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(task, run, runs=tmp_path, progress=stop, **settings)
    resumed = fedcore.simulate(task, run, runs=tmp_path, resume=True, **settings)
    assert_equal(resumed.federated.model, plain_personal_rounds(task, run, HEAD))


def test_vectorised_training_and_patterns_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    task = task_of(Net, SIZES)
    forced = {"training": "vectorised"}
    with pytest.raises(ConfigError, match=r"layers that stay on clients \(client.local\)"):
        fedcore.simulate(task, run_of("head.*", simulation=forced), runs=tmp_path)
    with pytest.raises(TaskError, match="matches no state of the model"):
        prepare(run_of("hed.*"), task, OPEN_POLICY, tmp_path)
    with pytest.raises(TaskError, match="so nothing is left to train together"):
        prepare(run_of("*"), task, OPEN_POLICY, tmp_path)
    patient = run_of("head.*", federation={"patience": 2})
    with pytest.raises(ConfigError, match="layers stay on clients"):
        prepare(patient, task, OPEN_POLICY, tmp_path)


def test_private_training_covers_local_layers_and_charges_as_ever() -> None:
    def dense() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    privacy = {"unit": "example", "target_delta": 1e-3, "noise_multiplier": 1.0, "max_epsilon": 1e4}
    task = task_of(dense, SIZES)
    runs = [run_of(*local, privacy=privacy) for local in ((), ("2.*",))]
    plain, own = (federated(task, run) for run in runs)
    spent = [[record.epsilon_max for record in one.federated.rounds] for one in (plain, own)]
    assert spent[0] == spent[1]
    model = own.model.model
    assert local_names(model) == {"2.weight", "2.bias"}
    assert torch.equal(model[2].weight, build_model(task, runs[1]).model[2].weight)  # type: ignore[index]
    one = [record.bytes_up for record in own.federated.rounds]
    assert max(one) < plain.federated.rounds[0].bytes_up


def permuted(client: str, count: int) -> Any:
    """Examples whose classes each client names in an order of its own."""
    rng = torch_rng(0, "data", client)
    inputs = torch.randn(count, FEATURES, generator=rng) * 2
    order = torch.randperm(CLASSES, generator=rng)
    return TensorDataset(inputs, order[inputs[:, :CLASSES].argmax(dim=1)])


def test_own_heads_answer_for_clients_whose_labels_differ() -> None:
    """Clients are measured with their own layers, on data that they hold back."""
    names = [f"client-{place}" for place in range(8)]
    task = Task(
        name="permuted",
        kind="classification",
        model=Net,
        clients=lambda folder: names,
        client_data=lambda client, folder: permuted(client, 120),
        test_data=lambda folder: permuted("test", 60),
        example_input=torch.zeros(FEATURES),
    )
    federation = {"rounds": 12, "evaluate_cohort": 8, "holdout": 0.3}
    accuracy = []
    for local in ((), ("head.*",)):
        found = federated(task, run_of(*local, federation=federation))
        accuracy.append(found.federated.rounds[-1].metrics["accuracy"])
    assert accuracy[1] > accuracy[0] + 0.2
    assert accuracy[1] > 0.7
    assert np.isfinite(accuracy).all()


def digits(alpha: float) -> dict[str, Any]:
    """The digits that scikit-learn ships, split over clients by label."""
    bunch = load_digits()
    images = torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1
    targets = torch.tensor(bunch.target)
    shares = fedcore.dirichlet(targets, 20, alpha=alpha, seed=0, min_examples=20)
    rows = [torch.tensor(share) for share in shares]
    return {f"c{place}": TensorDataset(images[row], targets[row]) for place, row in enumerate(rows)}


def test_final_tests_by_client_use_its_own_layers_and_untrained_ones_are_not_released(
    tmp_path: Path,
) -> None:
    names = [f"client-{place}" for place in range(4)]

    def part(client: str, rows: slice) -> Any:
        return TensorDataset(*(column[rows] for column in permuted(client, 180).tensors))

    task = Task(
        name="permuted",
        kind="classification",
        model=Net,
        clients=lambda folder: names,
        client_data=lambda client, folder: part(client, slice(120)),
        client_test=lambda client, folder: part(client, slice(120, None)),
        cloud_data=lambda folder: permuted("client-0", 90),
        example_input=torch.zeros(FEATURES),
    )
    fedcore.create_repository(tmp_path / "releases", tmp_path / "keys")
    release = {"repository": str(tmp_path / "releases"), "keys": str(tmp_path / "keys")}
    more: dict[str, Any] = {
        "federation": {"rounds": 10, "evaluate_cohort": 4, "holdout": 0.2},
        "compression": {"candidates": ("fp32",), "timing_runs": 100},
    }
    run = run_of("head.*", release=release, finetune={"epochs": 0}, **more)
    result = fedcore.simulate(task, run, runs=tmp_path)
    record = result.record
    gains = [one.federated - one.released for one in record.client_tests]
    assert np.mean(gains) > 0.15
    pooled = np.average([one.federated for one in record.client_tests])  # of equal sizes
    assert record.scores["accuracy"]["federated"] == pytest.approx(pooled)
    assert all(one.metric > 0.6 for one in record.clients)
    assert record.manifest is None
    assert "(client.local = [head.*]) have their initial values" in record.withheld
    assert record.untrained.startswith("WARNING: Layers of the model to release were never")
    assert result.summary["release"]["untrained"] == record.untrained
    assert "have their initial values" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(ReleaseError, match="have their initial values"):
        fedcore.publish(result.compressed, result)

    tuning = {"epochs": 30, "judge": "cloud"}
    generous = {**release, "max_test_drop": 1.0}
    tuned = fedcore.simulate(
        task, run_of("head.*", release=generous, finetune=tuning, **more), runs=None
    )
    assert (tuned.record.untrained, tuned.record.withheld) == ("", "")
    assert tuned.record.manifest is not None


@pytest.mark.slow
def test_own_heads_beat_the_global_model_on_skewed_digits_by_five_points() -> None:
    """With labels as skewed as Dirichlet(0.1), and each client measured on its own."""
    data = digits(0.1)
    task = Task(
        name="digits",
        kind="classification",
        model=lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        clients=lambda folder: list(data),
        client_data=lambda client, folder: data[client],
        test_data=lambda folder: data["c0"],
        example_input=torch.zeros(64),
    )
    federation = {"rounds": 15, "evaluate_cohort": 20, "holdout": 0.3}
    accuracy = []
    for local in ((), ("2.*",)):
        found = federated(task, run_of(*local, federation=federation))
        value = found.federated.rounds[-1].metrics["accuracy"]
        assert value is not None
        accuracy.append(value)
    assert accuracy[1] > accuracy[0] + 0.05
