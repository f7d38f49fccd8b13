from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import Tensor, nn
from torch.nn import functional

from fedcore.artifacts.decode import DECODE_KEY
from server.compression import weights_only
from server.compression.decode.attach import with_decode_graph
from server.compression.decode.errors import NotDecodable
from server.compression.export import export_onnx
from server.compression.quantise import calibrate, int8_dynamic, int8_static
from server.compression.runtime import answer, open_session
from server.compression.weights_only import int4_weights, int8_weights
from tests.decodable import FUTURE, TOKENS, WINDOW, attention, golden

node = helper.make_node


def test_the_model_itself_is_unchanged() -> None:
    raw = attention()
    inputs, outputs = golden(raw)
    made = with_decode_graph(raw, inputs, outputs, allowed=1e-4)
    before, after = onnx.load_model_from_string(raw), onnx.load_model_from_string(made)
    assert [each.key for each in after.metadata_props] == [DECODE_KEY]
    assert before.graph.node == after.graph.node
    assert before.graph.initializer == after.graph.initializer
    assert len(made) < len(raw) + 8192  # no weight is there twice
    assert made == with_decode_graph(raw, inputs, outputs, allowed=1e-4)
    session = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"input": inputs[:1]})[0], outputs[:1])


REFUSED: dict[str, tuple[list[Any], str]] = {
    "mean": ([node("ReduceMean", ["h", "axis"], ["m"]), node("Add", ["h", "m"], ["hidden"])], "Re"),
    "softmax": ([node("Softmax", ["h"], ["hidden"], axis=1)], "Softmax mixes positions"),
    "last": ([node("Gather", ["h", "last"], ["hidden"], axis=1)], "takes some of the positions"),
    "slice": ([node("Slice", ["h", "one", "end", "axis"], ["hidden"])], "takes some of the pos"),
    "concat": ([node("Concat", ["h", "h"], ["hidden"], axis=1)], "puts positions beside others"),
    "conv": ([node("Conv", ["h", "kernel"], ["hidden"])], "Conv may mix positions"),
    "cumsum": ([node("CumSum", ["h", "one"], ["hidden"])], "CumSum mixes positions"),
    "flat": (
        [
            node("Transpose", ["h"], ["t"], perm=[0, 2, 1]),
            node("Reshape", ["t", "flat"], ["f"]),
            node("Shape", ["h"], ["s"]),
            node("Reshape", ["f", "s"], ["hidden"]),
        ],
        "merges positions",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_looks_at_all_positions_is_refused_with_the_reason(how: str) -> None:
    nodes, why = REFUSED[how]
    raw = attention(more=nodes)
    with pytest.raises(NotDecodable, match=why):
        with_decode_graph(raw, *golden(raw), allowed=1e-4)


@pytest.mark.parametrize("mask", [0 * np.ones_like(FUTURE), FUTURE.T.copy(), np.roll(FUTURE, 1, 1)])
def test_a_model_that_looks_ahead_is_refused(mask: Any) -> None:
    raw = attention(mask=np.where(np.isnan(mask), 0, mask))
    with pytest.raises(NotDecodable, match="blind to those after it"):
        with_decode_graph(raw, *golden(raw), allowed=1e-4)


def test_a_model_without_attention_keeps_nothing() -> None:
    raw = attention(more=[node("Identity", ["x"], ["hidden"])])
    with pytest.raises(NotDecodable, match="nothing to keep"):
        with_decode_graph(raw, *golden(raw), allowed=1e-4)


class Heads(nn.Module):
    """Attention as people write it, with scores that are computed and masked in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.places = how, nn.Parameter(torch.randn(WINDOW, 8))
        self.embed, self.look = nn.Embedding(TOKENS, 8), nn.Linear(8, 24)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, TOKENS)
        self.register_buffer("past", torch.tril(torch.ones(WINDOW, WINDOW)))
        angles = torch.outer(torch.arange(WINDOW), torch.tensor([1.0, 0.1]))
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin())))

    def turned(self, x: Tensor) -> Tensor:
        cos, sin = self.turns
        left, right = x.chunk(2, -1)
        return torch.cat((left * cos - right * sin, left * sin + right * cos), -1)

    def forward(self, tokens: Tensor) -> Tensor:
        b, t = tokens.shape
        x = self.embed(tokens) + self.places[torch.arange(t)]
        parts = self.look(self.norm(x)).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        query, key, value = parts
        if self.how == "fused":
            seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            query, key = self.turned(query), self.turned(key)
            scores = query @ key.transpose(-2, -1) / 2
            back = torch.arange(t)[:, None] - torch.arange(t)[None]
            scores = scores - 0.3 * back  # further back counts less
            scores = scores.masked_fill(self.past[:t, :t] == 0, float("-inf"))
            seen = scores.softmax(-1) @ value
        return self.head(x + seen.transpose(1, 2).reshape(b, t, 8))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS)
        self.gru, self.lstm = nn.GRU(8, 8, batch_first=True), nn.LSTM(8, 8, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.gru(self.embed(tokens))
        return self.head(self.lstm(x)[0])  # type: ignore[no-any-return]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fused": lambda: Heads("fused"),
    "rotary": lambda: Heads("rotary"),
    "recurrent": Recurrent,
}


@cache
def exported(name: str) -> bytes:
    torch.manual_seed(2)
    example = torch.zeros(2, WINDOW, dtype=torch.long)
    return export_onnx(MODELS[name]().eval(), example, labels=(), kind="next_token")


@pytest.mark.parametrize("name", MODELS)
def test_models_as_people_write_them_get_a_decode_graph(name: str) -> None:
    raw = exported(name)
    inputs, outputs = golden(raw)
    made = with_decode_graph(raw, inputs, outputs, allowed=1e-4)
    assert DECODE_KEY in {each.key for each in onnx.load_model_from_string(made).metadata_props}


def test_quantised_models_get_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_only, "_FEWEST", 16)  # the model is small
    raw = exported("fused")
    inputs, _ = golden(raw)
    static = int8_static(calibrate(raw, torch.from_numpy(inputs)), reduce_range=True)
    dynamic = int8_dynamic(raw, reduce_range=True)
    for each in (static, dynamic, int8_weights(raw), int4_weights(raw)):
        outputs = answer(open_session(each, threads=1), inputs)
        allowed = 0.05 * float(np.abs(outputs).max())
        assert len(with_decode_graph(each, inputs, outputs, allowed=allowed)) > len(each)
