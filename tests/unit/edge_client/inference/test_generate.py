from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client import commands
from edge_client.delivery.store import Installed, Record
from edge_client.inference.generate import Sampling, drawn, generated, prompt_tokens
from edge_client.model import EdgeModel
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest
from fedcore.cli import main
from fedcore.errors import DataError, DeviceError
from fedcore.files import sha256_hex

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(count: int = 4000, **how: Any) -> list[float]:
    """How often each of four tokens is drawn."""
    rng = np.random.default_rng(0)
    found = Counter(drawn(LOGITS, Sampling(**how), rng) for _ in range(count))
    return [found[token] / count for token in range(4)]


def test_tokens_are_drawn_by_their_probabilities() -> None:
    np.testing.assert_allclose(draws(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(draws(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365
    np.testing.assert_allclose(draws(temperature=0.5), squared, atol=0.03)
    np.testing.assert_allclose(draws(temperature=1e6), [0.25] * 4, atol=0.03)


def test_no_temperature_and_one_token_take_the_most_likely() -> None:
    for how in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-300}):
        assert draws(20, **how) == [1, 0, 0, 0]


def test_of_equal_logits_no_more_than_k_are_drawn() -> None:
    rng, equal = np.random.default_rng(0), np.zeros(9, np.float32)
    assert {drawn(equal, Sampling(top_k=3), rng) for _ in range(200)} == {0, 1, 2}
    assert len({drawn(equal, Sampling(top_k=99), rng) for _ in range(400)}) == 9


@pytest.mark.parametrize(
    "how", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}]
)
def test_other_sampling_is_refused(how: Any) -> None:
    with pytest.raises(DataError, match="expected temperature >= 0 and top_k >= 1"):
        Sampling(**how)


def test_logits_that_are_not_finite_draw_nothing() -> None:
    bad = np.array([0, np.nan], np.float32)
    with pytest.raises(DeviceError, match="not finite"):
        drawn(bad, Sampling(), np.random.default_rng(0))


class Counting:
    """A causal model of 10 tokens: after token t comes t + 1. Looks at what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, tokens: Any) -> Any:
        self.seen.append(tokens.tolist())
        logits = np.zeros((len(tokens), 10), np.float32)
        logits[np.arange(len(tokens)), (tokens + 1) % 10] = 50
        return logits


def generate(model: Any, prompt: list[int], count: int, **how: Any) -> list[int]:
    endless = generated(model, prompt, Sampling(**how), window=4, dtype="int64")
    return list(islice(endless, count))


def test_tokens_continue_the_prompt_within_the_window() -> None:
    model = Counting()
    assert generate(model, [7, 8], 5, seed=1) == [9, 0, 1, 2, 3]
    assert model.seen[:4] == [[7, 8, 0, 0], [7, 8, 9, 0], [7, 8, 9, 0], [8, 9, 0, 1]]
    assert generate(Counting(), [1, 2, 3, 4, 5, 6], 2, temperature=0.0) == [7, 8]


def test_equal_seeds_give_equal_tokens_and_others_do_not() -> None:
    def flat(tokens: Any) -> Any:
        return np.zeros((len(tokens), 1000), np.float32)

    first, again, other = (generate(flat, [1], 8, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert generate(flat, [1], 8) != generate(flat, [1], 8)


def test_a_model_without_logits_at_each_position_is_refused() -> None:
    with pytest.raises(DeviceError, match="logits at each position"):
        generate(lambda tokens: np.zeros((3, 10)), [1], 1)


def test_a_prompt_is_text_of_labels_or_numbers() -> None:
    assert prompt_tokens("cab", "abc") == [2, 0, 1]
    assert prompt_tokens([0, np.int64(2)], "abc") == [0, 2]
    assert prompt_tokens([70000], ()) == [70000]
    for prompt in ("", [], "abd", [3], [-1], [0.5], [True], ["a"], "\x1b"):
        with pytest.raises(DataError, match=r"^prompt: ") as caught:
            prompt_tokens(prompt, "abc")  # type: ignore[arg-type]
        assert str(caught.value).isprintable()
    with pytest.raises(DataError, match="expected a number"):
        prompt_tokens("text", ())


@pytest.fixture
def letters(manifest: Manifest, tmp_path: Path) -> EdgeModel:
    """A model of the letters a to e: after each comes the next one."""
    table = np.roll(np.eye(5, dtype=np.float32) * 50, 1, axis=1)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        "letters",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 5])],
        [numpy_helper.from_array(table, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw, inputs = model.SerializeToString(), np.array([[0, 1, 2, 3]])
    (tmp_path / "m").write_bytes(raw)
    entry = manifest.onnx.model_copy(update={"sha256": sha256_hex(raw), "length": len(raw)})
    values = {"kind": "next_token", "labels": tuple("abcde"), "input_shape": (4,)}
    values |= {"input_dtype": "int64", "onnx": entry}
    golden = golden_bytes(inputs, table[inputs])
    record = Record(version=1, manifest_sha256="a" * 64)
    return EdgeModel(Installed(manifest.model_copy(update=values), record, tmp_path / "m", golden))


def test_an_installed_model_continues_text(letters: EdgeModel) -> None:
    assert [letters.labels[t] for t in letters.generate("ab", tokens=7)] == list("cdeabcd")
    assert list(letters.generate([4], tokens=2, top_k=1)) == [0, 1]
    assert list(letters.generate("a", tokens=0)) == []
    assert letters.why_confined == ""
    stream = letters.generate("a", tokens=10**9)
    assert [next(stream), next(stream)] == [1, 2]  # as soon as each is drawn
    with pytest.raises(DataError, match=r"^prompt: 'f' is no token"):
        letters.generate("af")
    unlike = letters.installed.manifest.model_copy(update={"kind": "classification"})
    other = EdgeModel(replace(letters.installed, manifest=unlike))
    with pytest.raises(DeviceError, match="no next token"):
        other.generate("a")


def test_the_command_streams_text_or_gives_json(
    letters: EdgeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_serving", lambda store, name: letters.installed)
    at = ["generate", "--store", "store", "--model", "letters", "--seed", "1"]
    assert main(["device", *at, "--prompt", "ab", "--tokens", "4"]) == 0
    assert capsys.readouterr().out == "cdea\n"
    assert main(["device", *at, "--prompt", "a", "--tokens", "2", "--top-k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"tokens": [1, 2], "labels": ["b", "c"]}
    assert main(["device", *at, "--prompt", "no"]) == DataError.exit_code
    assert "'n' is no token" in capsys.readouterr().err
