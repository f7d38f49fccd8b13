"""Every call of the Open Inference Protocol, as tritonclient makes it over gRPC and HTTP."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.serving import CLASSES, WIDTH, Running, local

X = np.linspace(-1, 1, 2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)


@pytest.fixture(scope="module", params=["grpc", "http"])
def transport(request: pytest.FixtureRequest, first_server: Running) -> Any:
    """The module of tritonclient, and a client."""
    module = {"grpc": triton_grpc, "http": triton_http}[request.param]
    client = module.InferenceServerClient(getattr(first_server, request.param))
    yield module, client
    client.close()


def as_json(transport: Any, method: str, *arguments: Any) -> Any:
    module, client = transport
    more = {"as_json": True} if module is triton_grpc else {}
    return getattr(client, method)(*arguments, **more)


def asked(transport: Any, x: np.ndarray, datatype: str = "FP32", **how: Any) -> Any:
    module, _ = transport
    tensor = module.InferInput("input", list(x.shape), datatype)
    if module is triton_http:
        tensor.set_data_from_numpy(x, **how)
    else:
        tensor.set_data_from_numpy(x)
    return tensor


def test_health(transport: Any) -> None:
    _, client = transport
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("product")
    assert client.is_model_ready("product", "1")
    assert not client.is_model_ready("product", "2")
    assert not client.is_model_ready("absent")


def test_metadata(transport: Any) -> None:
    server = as_json(transport, "get_server_metadata")
    assert server["name"] == "fedcore"
    assert set(server["extensions"]) == {"binary_tensor_data", "model_repository"}
    model = as_json(transport, "get_model_metadata", "product")
    assert (model["name"], model["versions"]) == ("product", ["1"])
    assert [(one["name"], one["datatype"]) for one in model["inputs"]] == [("input", "FP32")]
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, WIDTH]
    assert [int(size) for size in model["outputs"][0]["shape"]] == [-1, CLASSES]
    with pytest.raises(InferenceServerException, match="'absent' is not served here"):
        as_json(transport, "get_model_metadata", "absent")


def test_infer(transport: Any) -> None:
    _, client = transport
    result = client.infer("product", [asked(transport, X)], model_version="1", request_id="r-7")
    np.testing.assert_array_equal(result.as_numpy("output"), local(X))
    found = result.get_response()
    if isinstance(found, dict):
        assert (found["model_version"], found["id"]) == ("1", "r-7")
    else:
        assert (found.model_version, found.id) == ("1", "r-7")


def test_requested_outputs(transport: Any) -> None:
    module, client = transport
    outputs = [module.InferRequestedOutput("output")]
    result = client.infer("product", [asked(transport, X)], outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("output"), local(X))
    with pytest.raises(InferenceServerException, match="no output 'other'"):
        client.infer(
            "product", [asked(transport, X)], outputs=[module.InferRequestedOutput("other")]
        )


def test_json_tensors(transport: Any) -> None:
    module, client = transport
    if module is triton_grpc:
        pytest.skip("tritonclient sends raw contents over gRPC")
    outputs = [module.InferRequestedOutput("output", binary_data=False)]
    result = client.infer("product", [asked(transport, X, binary_data=False)], outputs=outputs)
    assert "data" in result.get_response()["outputs"][0]
    np.testing.assert_array_equal(result.as_numpy("output"), local(X))


def test_typed_contents(first_server: Running) -> None:
    request = service_pb2.ModelInferRequest(model_name="product")
    tensor = request.inputs.add(name="input", datatype="FP32", shape=X.shape)
    tensor.contents.fp32_contents.extend(X.ravel().tolist())
    with grpc.insecure_channel(first_server.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, CLASSES)
    np.testing.assert_array_equal(found, local(X))


def test_asynchronous_infer(transport: Any) -> None:
    module, client = transport
    if module is triton_http:
        result = client.async_infer("product", [asked(transport, X)]).get_result()
    else:
        box: Any = queue.Queue()
        client.async_infer(
            "product",
            [asked(transport, X)],
            callback=lambda result, error: box.put(error or result),
        )
        result = box.get(timeout=30)
    np.testing.assert_array_equal(result.as_numpy("output"), local(X))


def test_stream(first_server: Running) -> None:
    box: Any = queue.Queue()
    with triton_grpc.InferenceServerClient(first_server.grpc) as client:
        client.start_stream(callback=lambda result, error: box.put((result, error)))
        tensor = triton_grpc.InferInput("input", [1, WIDTH], "FP32")
        for row in X:
            tensor.set_data_from_numpy(row[None])
            client.async_stream_infer("product", [tensor])
        client.async_stream_infer("absent", [tensor])
        answers = [box.get(timeout=30) for _ in range(3)]
        client.stop_stream()
    for row, (result, error) in zip(X, answers, strict=False):
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("output"), local(row[None]))
    assert "'absent' is not served here" in str(answers[2][1])


@pytest.mark.parametrize(
    ("x", "datatype", "why"),
    [
        (np.zeros((1, WIDTH), np.float64), "FP64", "expected datatype FP32"),
        (np.zeros((1, WIDTH + 1), np.float32), "FP32", "expected shape"),
        (np.zeros(WIDTH, np.float32), "FP32", "expected shape"),
        (np.zeros((0, WIDTH), np.float32), "FP32", "expected shape"),
        (np.full((1, WIDTH), np.nan, np.float32), "FP32", "not finite"),
        (np.zeros((5000, WIDTH), np.float32), "FP32", "more than the 4096 allowed"),
    ],
)
def test_inputs_that_do_not_fit(transport: Any, x: np.ndarray, datatype: str, why: str) -> None:
    _, client = transport
    with pytest.raises(InferenceServerException, match=why):
        client.infer("product", [asked(transport, x, datatype)])


def test_an_unknown_version_is_not_answered_by_another(transport: Any) -> None:
    _, client = transport
    with pytest.raises(InferenceServerException, match="version 2 is not served"):
        client.infer("product", [asked(transport, X)], model_version="2")


def test_the_repository_is_for_operators(transport: Any) -> None:
    _, client = transport
    for call in (
        client.get_model_repository_index,
        lambda: client.load_model("product"),
        lambda: client.unload_model("product"),
    ):
        with pytest.raises(InferenceServerException, match="for operators"):
            call()
    assert client.is_model_ready("product")


def test_what_is_not_offered_says_so(transport: Any) -> None:
    _, client = transport
    with pytest.raises(InferenceServerException):
        client.get_inference_statistics("product")
    with pytest.raises(InferenceServerException, match=r"'sequence_[a-z]+' is not offered"):
        client.infer("product", [asked(transport, X)], sequence_id=3)
