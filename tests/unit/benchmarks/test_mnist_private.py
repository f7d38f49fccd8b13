"""The privacy benchmark's figures: from summaries to rows and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.mnist_private import (
    EXAMPLE,
    FEATURES,
    WITHOUT_PRIVACY,
    checks_of,
    main,
    rows_of,
    trained_of,
)
from benchmarks.workloads import TASKS
from fedcore.task.definition import load_task

PIXELS_TASK = TASKS / "mnist_pixels.py"


def summary(**changed: Any) -> dict[str, Any]:
    flat = {"accuracy": 0.97, "epsilon": 2.99, "target_delta": 1e-5, "rounds": 8, **changed}
    return {
        "accuracy": {"federated": flat["accuracy"], "released": 0.1},
        "epsilon": {"max": flat["epsilon"]},
        "target_delta": flat["target_delta"],
        "rounds": flat["rounds"],
        "seconds": {"federate": 30.0, "total": 40.0},
    }


def holds(**changed: Any) -> list[bool]:
    return [check.holds for check in checks_of([trained_of(FEATURES, 1, summary(**changed))])]


def test_what_is_promised_holds_at_its_bounds() -> None:
    assert all(holds(accuracy=0.965, epsilon=3.0, rounds=30))


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({"accuracy": 0.939}, [0, 1]),
        ({"accuracy": 0.964}, [1]),
        ({"epsilon": 3.001}, [2]),
        ({"epsilon": None}, [2]),
        ({"target_delta": 1e-4}, [2]),
        ({"rounds": 31}, [3]),
    ],
)
def test_each_promise_can_break(changed: dict[str, Any], broken: list[int]) -> None:
    assert [place for place, one in enumerate(holds(**changed)) if not one] == broken


def test_one_seed_over_the_budget_breaks_it() -> None:
    runs = [
        trained_of(FEATURES, seed, summary(epsilon=2.9 + 0.2 * (seed == 3))) for seed in (1, 2, 3)
    ]
    assert [check.holds for check in checks_of(runs)] == [True, True, False, True]


def test_rows_are_medians_over_seeds_and_know_no_epsilon_without_privacy() -> None:
    runs = [trained_of(FEATURES, seed, summary(accuracy=0.9 + seed / 100)) for seed in (1, 2, 3)]
    runs.append(trained_of(WITHOUT_PRIVACY, 1, summary(epsilon=None, target_delta=None)))
    rows = {(each.system, each.metric): each for each in rows_of(runs)}
    first = rows["features", "accuracy"]
    assert (first.median, first.min, first.max, first.repeats) == (0.92, 0.91, 0.93, 3)
    assert ("features-no-privacy", "epsilon") not in rows
    assert ("features-no-privacy", "accuracy") in rows


def test_without_data_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FEDCORE_DATA", raising=False)
    assert main([]) != 0
    assert "FEDCORE_DATA is not set" in capsys.readouterr().err


def test_the_baseline_has_the_same_clients_and_test(data_folder: Path) -> None:
    task, pixels = (load_task(path) for path in (EXAMPLE.with_name("task.py"), PIXELS_TASK))
    assert list(pixels.clients(data_folder)) == list(task.clients(data_folder))
    for share in ("client_data", "test_data"):
        words = ("7",) if share == "client_data" else ()
        ours, theirs = (getattr(one, share)(*words, data_folder) for one in (task, pixels))
        assert all(map(torch.equal, ours.tensors, theirs.tensors))
    assert pixels.preprocess is not None
    assert pixels.model()(pixels.preprocess()(pixels.example_input[None])).shape == (1, 10)


def test_features_of_a_blank_image_are_zero_and_of_an_image_alone() -> None:
    task = load_task(EXAMPLE.with_name("task.py"))
    assert task.preprocess is not None
    features = task.preprocess()
    images = torch.randint(256, (4, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    images[0] = 0
    together = features(images.to(torch.uint8))
    alone = torch.cat([features(image[None].to(torch.uint8)) for image in images])
    assert not together[0].any()
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert not list(features.parameters())
