"""kserve, whole stack: ``python -m benchmarks.peers.serving_kserve MODEL.onnx GRPC HTTP``."""

from __future__ import annotations

import sys
from typing import Any

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class Onnx(Model):
    """One model by onnxruntime."""

    def __init__(self, path: str) -> None:
        super().__init__("digits")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options)
        self.ready = True

    def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None):
        (y,) = self._session.run(None, {payload.inputs[0].name: payload.inputs[0].as_numpy()})
        output = InferOutput("output", list(y.shape), "FP32")
        output.set_data_from_numpy(y)
        return InferResponse(payload.id or "", "digits", [output])


if __name__ == "__main__":
    model, grpc_port, http_port = sys.argv[1:]
    ModelServer(
        http_port=int(http_port), grpc_port=int(grpc_port), workers=1, enable_latency_logging=False
    ).start([Onnx(model)])
