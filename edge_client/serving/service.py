"""What both transports offer: who may do what, and how a request becomes an answer or an error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_client.serving.batching import Answer, QueuedRequest
from edge_client.serving.messages import ModelStatus
from edge_client.serving.models import Models
from edge_client.serving.protocol import InferAnswer, InferRequest, checked_inputs
from fedcore import __version__
from fedcore.errors import FedcoreError, RefusalReason, RequestRefused
from fedcore.observability.foreign import foreign

log = logging.getLogger("fedcore.serving")

SERVER_NAME = "fedcore"
SERVER_VERSION = __version__
EXTENSIONS = ("binary_tensor_data", "model_repository")
MAX_ROWS = 4096
"""Most rows of one request."""
Outcome = InferAnswer | FedcoreError

GRPC_STATUS: dict[RefusalReason, str] = {
    "invalid": "INVALID_ARGUMENT",
    "unknown": "NOT_FOUND",
    "unsupported": "UNIMPLEMENTED",
    "too_large": "RESOURCE_EXHAUSTED",
    "forbidden": "PERMISSION_DENIED",
    "overloaded": "RESOURCE_EXHAUSTED",
    "unavailable": "UNAVAILABLE",
    "late": "DEADLINE_EXCEEDED",
    "failed": "INTERNAL",
}
HTTP_STATUS: dict[RefusalReason, int] = {
    "invalid": 400,
    "unknown": 404,
    "unsupported": 501,
    "too_large": 413,
    "forbidden": 403,
    "overloaded": 503,
    "unavailable": 503,
    "late": 504,
    "failed": 500,
}


def as_refused(error: FedcoreError) -> RequestRefused:
    """Returns the error as one with a reason."""
    return error if isinstance(error, RequestRefused) else RequestRefused(str(error), "failed")


@dataclass
class Service:
    """The served models and whether they are being served."""

    models: Models
    clock: Callable[[], float] = time.monotonic
    draining: bool = field(default=False)
    """Whether the server is stopping: requests that came are answered, and no more are wanted."""

    def ready(self) -> bool:
        """Returns whether requests for every model are welcome."""
        return not self.draining and self.models.all_ready()

    def model_ready(self, name: str, version: str) -> bool:
        """Returns whether a model answers; False for an unknown one."""
        if self.draining:
            return False
        try:
            self.models.get(name, version)
        except RequestRefused:
            return False
        return True

    def infer(
        self,
        request: InferRequest,
        done: Callable[[Outcome], None],
        *,
        deadline_s: float | None = None,
    ) -> None:
        """Queues a request.

        Args:
            request: The request; its sender is not trusted.
            done: Called once, by any thread, unless this call raises.
            deadline_s: When the sender stops waiting, by the service's clock; None if it does not.

        Raises:
            RequestRefused: the request does not fit the model, or there is no room for it.
        """
        served = self.models.get(request.model, request.version)
        version = served.version()
        try:
            inputs = checked_inputs(request, version.inputs, max_rows=MAX_ROWS)
            unknown = set(request.outputs).difference(spec.name for spec in version.outputs)
            if unknown:
                names = ", ".join(spec.name for spec in version.outputs)
                raise RequestRefused(
                    f"model {request.model!r} has no output {foreign(min(unknown), 64)!r}, "
                    f"expected {names}. Nothing was answered.",
                )
            batcher = served.batcher
            if batcher is None:
                raise RequestRefused(
                    "the model is not loaded. Nothing was answered.", "unavailable"
                )
            if request.timeout_us:
                until_s = self.clock() + request.timeout_us / 1e6
                deadline_s = until_s if deadline_s is None else min(until_s, deadline_s)
            batcher.submit(
                QueuedRequest(
                    inputs,
                    len(next(iter(inputs.values()))),
                    lambda outcome: done(_answer(request, outcome)),
                    request.version,
                    deadline_s,
                    received_bytes=request.received_bytes,
                )
            )
        except RequestRefused as error:
            served.metrics.failed(error)
            raise

    def index(self, role: str, *, ready: bool) -> list[ModelStatus]:
        """Returns the repository's index, for an operator."""
        demand_operator(role)
        return self.models.index(ready=ready)

    def load(self, role: str, name: str) -> None:
        """Loads a model, for an operator."""
        demand_operator(role)
        self.models.load(name)

    def unload(self, role: str, name: str) -> None:
        """Takes a model out of service, for an operator."""
        demand_operator(role)
        self.models.unload(name)


def log_fault(what: str, error: Exception) -> None:
    """Logs an error that fedcore did not raise on purpose, while something was being answered."""
    log.error("serve: %s failed: %s: %s", what, type(error).__name__, foreign(error))


def demand_member(role: str) -> None:
    """Raises `RequestRefused` for a caller without a role."""
    if not role:
        raise RequestRefused(
            "the certificate is not that of a member of this project in force. Nothing was "
            "answered; ask the operator to enrol or renew it.",
            "forbidden",
        )


def demand_operator(role: str) -> None:
    """Raises `RequestRefused` for anyone but an operator of the project."""
    if role != "operator":
        raise RequestRefused(
            "the repository extension is for operators. Nothing was done; serve with --kit, and "
            "call with an operator's certificate.",
            "forbidden",
        )


def _answer(request: InferRequest, outcome: Answer | FedcoreError) -> Outcome:
    if isinstance(outcome, FedcoreError):
        return outcome
    version, outputs = outcome
    if request.outputs:
        outputs = {name: outputs[name] for name in request.outputs if name in outputs}
    return InferAnswer(request.model, version, request.id, outputs)
