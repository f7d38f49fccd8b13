"""Models whose outputs are an object, a dict or a tuple train, are exported and answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fedcore
from fedcore.task.answers import answer_of, new_model
from fedcore.task.model import build_model
from fedcore.training.per_example.trial import choose_method
from fedcore.updates.pack import pack
from tests.unit.server.simulation.plain import run_of, task_of


class Output(OrderedDict[str, Any]):
    """In the form of Hugging Face's `ModelOutput`: a dict whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Named(NamedTuple):
    out: Tensor
    aux: Tensor


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "object": lambda x: Output(loss=None, logits=x, hidden_states=(x[:1],)),
    "dict": lambda x: {"hidden": x[:1], "logits": x},
    "dict of one": lambda x: {"scores": x},
    "tuple": lambda x: (x, x[:1]),
    "named tuple": lambda x: Named(x, x[:1]),
}


class Wrapped(nn.Module):
    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.form(self.head(torch.tanh(self.body(x))))


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_is_the_tensor_that_a_loss_takes(form: str) -> None:
    x = torch.randn(4, 3)
    assert answer_of(FORMS[form](x)) is x
    task = task_of(lambda: Wrapped(FORMS[form]), {"anna": 30})
    model = new_model(task)
    assert isinstance(model(torch.zeros(2, 6)), Tensor)
    assert list(model.state_dict()) == ["body.weight", "body.bias", "head.weight", "head.bias"]
    assert task.outputs is not None
    assert task.outputs.shape == (3,)


def test_what_has_no_such_tensor_stays_and_is_refused() -> None:
    for outputs in ({"a": torch.zeros(1), "b": torch.zeros(1)}, (), "text", Output(a=1, b=2)):
        assert answer_of(outputs) is outputs
    plain = task_of(lambda: nn.Linear(6, 3), {"anna": 30})
    assert not new_model(plain)._forward_hooks  # hooks keep a model from compiled training


def test_a_run_with_such_a_model_goes_through() -> None:
    """One by one and side by side, with gradients by example, fine-tuning, and an exported file."""
    task = task_of(lambda: Wrapped(FORMS["object"]), {"anna": 30, "ben": 20})
    found = {}
    for training in ("loop", "vectorised"):
        result = fedcore.simulate(
            task,
            federation={"rounds": 2},
            client={"batch_size": 8},
            simulation={"training": training},
            finetune={"epochs": 1, "max_metric_drop": 1.0},
            compression={"candidates": ["fp32"], "timing_runs": 100},
            progress=False,
        )
        found[training] = torch.from_numpy(pack(result.federated.model))
        assert result.record.chosen == "fp32"
    assert torch.allclose(found["loop"], found["vectorised"], atol=1e-5)
    private = {"unit": "example", "noise_multiplier": 1.0, "target_delta": 1e-3}
    run = run_of().model_copy(update={"privacy": type(run_of().privacy)(**private)})
    method = choose_method(task, build_model(task, run))
    assert method.name == "vmap"
