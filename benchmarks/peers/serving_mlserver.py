"""mlserver, whole stack: ``python -m benchmarks.peers.serving_mlserver MODEL.onnx GRPC HTTP``."""

from __future__ import annotations

import asyncio
import sys

import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    """One model by onnxruntime."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(sys.argv[1], options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        tensor = payload.inputs[0]
        (y,) = self._session.run(None, {tensor.name: NumpyCodec.decode_input(tensor)})
        output = NumpyCodec.encode_output("output", y)
        return InferenceResponse(model_name=self.name, model_version="1", outputs=[output])


async def main() -> None:
    """Serves until it is killed."""
    _, grpc_port, http_port = sys.argv[1:]
    settings = Settings(
        host="127.0.0.1",
        grpc_port=int(grpc_port),
        http_port=int(http_port),
        metrics_endpoint=None,
        parallel_workers=0,  # in its own process: quicker than its pool of workers
        debug=False,
    )
    server = MLServer(settings)
    await server.start([ModelSettings(name="digits", implementation=Onnx)])


if __name__ == "__main__":
    asyncio.run(main())
