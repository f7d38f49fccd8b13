from __future__ import annotations

import base64
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_client.delivery.store import Installed, Record
from edge_client.inference import decoder as decoders
from edge_client.inference.decode_graph import NoDecodeGraph, decode_onnx
from edge_client.inference.generate import Sampling, generated, generated_in_steps
from edge_client.inference.process import ModelLimits
from edge_client.inference.responses import Interface, TensorInfo
from edge_client.inference.token_cache import chunks, decode_form
from edge_client.model import EdgeModel
from fedcore.artifacts.decode import CACHE, DECODE_KEY, MAX_CACHE_BYTES, NEXT, POSITIONS
from fedcore.artifacts.golden import golden_bytes
from fedcore.artifacts.manifest import Manifest
from fedcore.errors import DataError, DeviceError
from fedcore.files import sha256_hex
from server.compression.decode.attach import with_decode_graph
from tests.decodable import TOKENS, WINDOW, attention, golden


@pytest.fixture(scope="module")
def released() -> tuple[bytes, bytes]:
    """A model's file with its decode graph, and its golden file."""
    raw = attention()
    inputs, outputs = golden(raw)
    return with_decode_graph(raw, inputs, outputs, allowed=1e-4), golden_bytes(inputs, outputs)


def installed(manifest: Manifest, folder: Path, onnx_file: bytes, kept: bytes) -> EdgeModel:
    path = folder / "model.onnx"
    path.write_bytes(onnx_file)
    entry = manifest.onnx.model_copy(
        update={"sha256": sha256_hex(onnx_file), "length": len(onnx_file)}
    )
    values = {"kind": "next_token", "labels": tuple("abcde"), "input_shape": (WINDOW,)}
    values |= {"input_dtype": "int64", "onnx": entry, "golden_tolerance": 1e-3}
    record = Record(version=1, manifest_sha256="a" * 64)
    return EdgeModel(
        Installed(manifest.model_copy(update=values), record, path, kept),
        limits=ModelLimits(seconds=5.0),
    )


@pytest.fixture
def model(manifest: Manifest, tmp_path: Path, released: tuple[bytes, bytes]) -> EdgeModel:
    return installed(manifest, tmp_path, *released)


def whole(model: EdgeModel, prompt: str, **how: Any) -> Any:
    """Tokens by one run of the whole window for each."""
    first = [model.labels.index(one) for one in prompt]
    return generated(model.predict, first, Sampling(**how), window=WINDOW, dtype="int64")


@pytest.mark.parametrize("prompt", ["a", "be", "dad", "edbca", "abcdeabc"])
def test_the_tokens_are_those_of_the_whole_window_until_it_is_full(
    model: EdgeModel, prompt: str
) -> None:
    count = WINDOW - len(prompt) + 1
    for how in ({"temperature": 0.0}, {"seed": 3}, {"seed": 4, "top_k": 2, "temperature": 0.5}):
        found = list(model.generate(prompt, tokens=count, **how))  # type: ignore[arg-type]
        assert found == list(islice(whole(model, prompt, **how), count))
    assert model.decoder.why_not == ""


def test_a_full_window_goes_on_from_its_last_half(model: EdgeModel) -> None:
    found = list(model.generate("ab", tokens=30, temperature=0.0))
    tokens = [0, 1, *found]
    at = WINDOW
    while at + WINDOW // 2 < len(tokens):
        begun = "".join(model.labels[each] for each in tokens[at + 1 - WINDOW // 2 : at + 1])
        theirs = list(islice(whole(model, begun, temperature=0.0), WINDOW // 2 + 1))
        assert tokens[at + 1 : at + 1 + len(theirs)] == theirs[: len(tokens) - at - 1]
        at += WINDOW // 2 + 1


def test_of_a_prompt_longer_than_the_window_the_last_tokens_are_seen(model: EdgeModel) -> None:
    long = list(model.generate("ccccc" + "abcdeabc", tokens=4, temperature=0.0))
    assert long == list(model.generate("abcdeabc", tokens=4, temperature=0.0))


def test_two_sequences_at_once_do_not_disturb_each_other(model: EdgeModel) -> None:
    alone = [list(model.generate(prompt, tokens=9, seed=1)) for prompt in ("a", "ed")]
    both = zip(*(model.generate(prompt, tokens=9, seed=1) for prompt in ("a", "ed")), strict=True)
    assert [list(each) for each in zip(*both, strict=True)] == alone


def test_tokens_that_the_model_does_not_know_are_refused(model: EdgeModel) -> None:
    for token, error in ((TOKENS, DeviceError), (2**70, DataError)):
        cache = model.decoder.start()
        assert cache is not None
        with pytest.raises(error, match=r"^model '.*' version"):
            list(islice(generated_in_steps(cache, [token], Sampling(), window=WINDOW), 1))


def test_a_prompt_runs_in_shapes_that_were_tried() -> None:
    assert chunks(7, 8) == [4, 2, 1]
    assert chunks(13, 4) == [4, 4, 4, 1]
    assert chunks(6, 6) == [4, 2]


def graph_of(onnx_file: bytes) -> onnx.GraphProto:
    model = onnx.load_model_from_string(onnx_file)
    (entry,) = model.metadata_props
    return onnx.GraphProto.FromString(base64.b64decode(entry.value))


def with_graph(onnx_file: bytes, *values: str) -> bytes:
    model = onnx.load_model_from_string(onnx_file)
    del model.metadata_props[:]
    for value in values:
        model.metadata_props.add(key=DECODE_KEY, value=value)
    return bytes(model.SerializeToString())


def changed(onnx_file: bytes, **by: Any) -> bytes:
    """The file with another decode graph: ``nodes`` before its first, ``inputs`` after its last."""
    graph = graph_of(onnx_file)
    nodes = [*by.get("nodes", ()), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(by.get("weights", ()))
    for each in graph.node:
        each.op_type = by.get("renamed", {}).get(each.op_type, each.op_type)
    return with_graph(onnx_file, base64.b64encode(graph.SerializeToString()).decode())


def why_not(
    manifest: Manifest, folder: Path, onnx_file: bytes, kept: bytes, prompt: str = "ab"
) -> str:
    """Why a decode graph is not used; the model generates all the same."""
    model = installed(manifest, folder, onnx_file, kept)
    expected = list(islice(whole(model, prompt, temperature=0.0), 3))
    assert list(model.generate(prompt, tokens=3, temperature=0.0)) == expected
    return model.decoder.why_not


def test_a_file_without_a_decode_graph_generates_as_before(
    manifest: Manifest, tmp_path: Path, released: tuple[bytes, bytes]
) -> None:
    onnx_file, kept = released
    assert "without a decode graph" in why_not(manifest, tmp_path, attention(), kept)
    two = with_graph(onnx_file, "", "")
    assert "it has 2 decode graphs" in why_not(manifest, tmp_path, two, kept)
    assert "not base64" in why_not(manifest, tmp_path, with_graph(onnx_file, "?"), kept)
    assert "no golden inputs" in why_not(manifest, tmp_path, onnx_file, b"")
    for end in (b"\x00", b"\x3a\xff\xff\xff\xff\x0f"):
        with pytest.raises(NoDecodeGraph, match="not those of an ONNX file"):
            decode_onnx(onnx_file + end)


def test_a_decode_graph_that_answers_otherwise_is_not_used(
    manifest: Manifest, tmp_path: Path, released: tuple[bytes, bytes]
) -> None:
    onnx_file, kept = released
    other = changed(onnx_file, renamed={"Softmax": "LogSoftmax"})
    assert "differs from the golden outputs" in why_not(manifest, tmp_path, other, kept)


def test_a_decode_graph_whose_work_is_not_fixed_is_not_run(
    manifest: Manifest,
    tmp_path: Path,
    released: tuple[bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx_file, kept = released
    many = helper.make_node("ConstantOfShape", ["input"], ["decode/many"])
    found = helper.make_node("NonZero", ["input"], ["decode/found"])
    monkeypatch.setattr(decoders, "ModelProcess", None)
    monkeypatch.setattr(decoders, "open_session", None)
    for nodes in ([many], [found]):
        raw = changed(onnx_file, nodes=nodes)
        assert "is not run" in why_not(manifest, tmp_path, raw, kept)


def test_a_decode_graph_of_constant_work_without_end_meets_the_limits(
    manifest: Manifest, tmp_path: Path, released: tuple[bytes, bytes]
) -> None:
    onnx_file, kept = released
    node = helper.make_node
    huge = [
        node("Expand", ["decode/one", "decode/size"], ["decode/huge"]),
        node("Cast", ["input"], ["decode/float"], to=TensorProto.FLOAT),
        node("ReduceSum", ["decode/float"], ["decode/sum"], keepdims=0),
        node("Add", ["decode/huge", "decode/sum"], ["decode/added"]),
    ]
    weights = [
        numpy_helper.from_array(np.ones(1, np.float32), "decode/one"),
        numpy_helper.from_array(np.array([1 << 40]), "decode/size"),
    ]
    graph = graph_of(changed(onnx_file, nodes=huge, weights=weights))
    graph.node.append(node("Add", ["output", "decode/added"], ["decode/last"]))
    graph.output[0].name = "decode/last"
    raw = with_graph(onnx_file, base64.b64encode(graph.SerializeToString()).decode())
    assert why_not(manifest, tmp_path, raw, kept)


def interface(**by: Any) -> Interface:
    cache = TensorInfo(f"{CACHE}0", "float32", by.get("cache", (1, 4)))
    inputs = [TensorInfo("input", "int64", (1, -1)), TensorInfo(POSITIONS, "int64", (-1,)), cache]
    logits = TensorInfo("output", by.get("logits", "float32"), (1, -1, 5))
    after = TensorInfo(cache.name + by.get("next", NEXT), "float32", cache.shape)
    return Interface(tuple(inputs[: by.get("count", 3)]), (logits, after))


def test_what_a_decode_graph_takes_is_checked_before_anything_is_allocated() -> None:
    form = decode_form(interface(), window=8, dtype="int64", of="model")
    assert (form.cache_bytes, form.logits.shape[2]) == (16, 5)
    for by in (
        {"cache": (1, -1)},
        {"cache": (1, 0)},
        {"logits": "float16"},
        {"next": ".other"},
        {"count": 2},
    ):
        with pytest.raises(DeviceError, match="other inputs and outputs"):
            decode_form(interface(**by), window=8, dtype="int64", of="model")
    with pytest.raises(DeviceError, match="other inputs and outputs"):
        decode_form(interface(), window=8, dtype="int32", of="model")
    large = interface(cache=(1 << 30, MAX_CACHE_BYTES))
    with pytest.raises(DeviceError, match="caches take"):
        decode_form(large, window=8, dtype="int64", of="model")
