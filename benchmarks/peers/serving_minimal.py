"""The least that answers the Open Inference Protocol over gRPC: grpcio, protobuf, onnxruntime.

Run as ``python -m benchmarks.peers.serving_minimal MODEL.onnx PORT``; with ``echo`` in place of
the file, it answers the same bytes to everyone: the limit of grpcio's own server.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

_SERVICE = "inference.GRPCInferenceService"


class Minimal(service_pb2_grpc.GRPCInferenceServiceServicer):
    """ModelInfer and ServerReady."""

    def __init__(self, onnx: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(onnx, options)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802 - the method's name
        return pb.ServerReadyResponse(ready=True)

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802 - the method's name
        tensor = request.inputs[0]
        x = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)
        (y,) = self._session.run(None, {tensor.name: x})
        answer = pb.ModelInferResponse(model_name=request.model_name, model_version="1")
        answer.outputs.add(name="output", datatype="FP32", shape=y.shape)
        answer.raw_output_contents.append(y.tobytes())
        return answer


def _echo() -> grpc.GenericRpcHandler:
    answer = pb.ModelInferResponse(model_name="digits", model_version="1")
    answer.outputs.add(name="output", datatype="FP32", shape=[1, 10])
    answer.raw_output_contents.append(bytes(40))
    raw, ready = answer.SerializeToString(), pb.ServerReadyResponse(ready=True).SerializeToString()
    return grpc.method_handlers_generic_handler(
        _SERVICE,
        {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(lambda request, context: raw),
            "ServerReady": grpc.unary_unary_rpc_method_handler(lambda request, context: ready),
        },
    )


def main() -> None:
    """Serves until it is killed."""
    model, port = sys.argv[1:]
    server = grpc.server(ThreadPoolExecutor(8))
    if model == "echo":
        server.add_generic_rpc_handlers((_echo(),))
    else:
        minimal = Minimal(Path(model).read_bytes())
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(minimal, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
