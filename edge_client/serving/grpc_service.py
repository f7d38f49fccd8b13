"""The methods of the gRPC service ``inference.GRPCInferenceService``, and gRPC's health check."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from edge_client.serving import messages
from edge_client.serving.grpc_parts import Call, code
from edge_client.serving.protocol import InferAnswer
from edge_client.serving.service import (
    EXTENSIONS,
    GRPC_STATUS,
    SERVER_NAME,
    SERVER_VERSION,
    Outcome,
    Service,
    as_refused,
    demand_member,
    log_fault,
)
from fedcore.errors import FedcoreError

_SERVICE = "/inference.GRPCInferenceService/"
_HEALTH = "/grpc.health.v1.Health/Check"
_INFER, _STREAM = _SERVICE + "ModelInfer", _SERVICE + "ModelStreamInfer"
STREAMING = frozenset({_STREAM})
_CODES = {reason: code(grpc.StatusCode[name]) for reason, name in GRPC_STATUS.items()}
_INTERNAL, _UNIMPLEMENTED = code(grpc.StatusCode.INTERNAL), code(grpc.StatusCode.UNIMPLEMENTED)
_MODEL = {1: "name", 2: "version"}


@dataclass(frozen=True)
class GrpcService:
    """Answers calls; `handle` is a `edge_client.serving.grpc_parts.Handler`."""

    service: Service
    role_of: Callable[[bytes], str]
    """Returns the role of a caller by its certificate in PEM; empty for nobody."""
    tls: bool

    def handle(self, call: Call, message: bytes) -> None:
        """Answers a message of a call. Never raises: a fault of ours ends the call as INTERNAL."""
        try:
            self._handle(call, message)
        except FedcoreError as error:
            self._fail(call, error)
        except Exception as error:
            # The loop answers everyone: a fault in one call must not end it.
            log_fault("a call", error)
            call.fail(_INTERNAL, "internal error; see the server's log")

    def _handle(self, call: Call, message: bytes) -> None:
        role = self.role_of(call.peer_certificate() if self.tls else b"")
        demand_member(role)
        if call.method == _INFER or call.method == _STREAM:
            self._infer(call, message)
        elif (method := _METHODS.get(call.method)) is not None:
            call.answer(method(self.service, role, message))
        else:
            call.fail(_UNIMPLEMENTED, "the method is not offered")

    def _infer(self, call: Call, message: bytes) -> None:
        deadline_s = None
        if call.deadline_s is not None:
            deadline_s = self.service.clock() + call.deadline_s - time.time()

        def done(outcome: Outcome) -> None:
            try:
                if isinstance(outcome, InferAnswer):
                    raw = messages.write_infer_answer(outcome)
                    if call.streaming:
                        call.send(messages.write_stream_answer(raw))
                    else:
                        call.answer(raw)
                else:
                    self._fail(call, outcome)
            except Exception as error:  # this thread has other requests to answer
                log_fault("an answer", error)
                call.fail(_INTERNAL, "internal error; see the server's log")

        request = messages.read_infer_request(message)
        self.service.infer(request, done, deadline_s=deadline_s)

    def _fail(self, call: Call, error: FedcoreError) -> None:
        refused = as_refused(error)
        if call.streaming:
            call.send(messages.write_stream_answer(b"", str(refused)))
        else:
            call.fail(_CODES[refused.reason], str(refused))


def _server_live(service: Service, role: str, message: bytes) -> bytes:
    return messages.write_ready(True)


def _server_ready(service: Service, role: str, message: bytes) -> bytes:
    return messages.write_ready(service.ready())


def _health(service: Service, role: str, message: bytes) -> bytes:
    return messages.write_health(service.ready())


def _model_ready(service: Service, role: str, message: bytes) -> bytes:
    asked = messages.read_texts(message, _MODEL)
    return messages.write_ready(service.model_ready(asked["name"], asked["version"]))


def _server_metadata(service: Service, role: str, message: bytes) -> bytes:
    return messages.write_server_metadata(SERVER_NAME, SERVER_VERSION, EXTENSIONS)


def _model_metadata(service: Service, role: str, message: bytes) -> bytes:
    asked = messages.read_texts(message, _MODEL)
    model = service.models.describe(asked["name"], asked["version"])
    return messages.write_model_metadata(model)


def _index(service: Service, role: str, message: bytes) -> bytes:
    return messages.write_index(service.index(role, ready=messages.read_index_request(message)))


def _load(service: Service, role: str, message: bytes) -> bytes:
    service.load(role, messages.read_load_request(message))
    return b""


def _unload(service: Service, role: str, message: bytes) -> bytes:
    service.unload(role, messages.read_load_request(message))
    return b""


_METHODS: Mapping[str, Callable[[Service, str, bytes], bytes]] = {
    _HEALTH: _health,
    **{
        _SERVICE + name: method
        for name, method in {
            "ServerLive": _server_live,
            "ServerReady": _server_ready,
            "ModelReady": _model_ready,
            "ServerMetadata": _server_metadata,
            "ModelMetadata": _model_metadata,
            "RepositoryIndex": _index,
            "RepositoryModelLoad": _load,
            "RepositoryModelUnload": _unload,
        }.items()
    },
}
