from __future__ import annotations

import pytest
import torch

from fedcore.config.run import DeviceChoice
from fedcore.errors import ConfigError
from fedcore.training.device import available


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_that_is_there(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert available("auto") == torch.device(best)
    assert available("cpu") == torch.device("cpu")


@pytest.mark.parametrize("choice", ["cuda", "mps"])
def test_what_is_not_there_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch, choice: DeviceChoice
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=f"client.device = '{choice}': .*found: cpu"):
        available(choice)


@pytest.mark.gpu
def test_a_gpu_is_found() -> None:
    assert available("auto").type == "cuda"
