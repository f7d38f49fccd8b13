"""The routes of the HTTP server: the Open Inference Protocol, metrics, and the page to try models.

Without TLS the server is for programs of this machine alone: requests that name another host, or
come from another site's page, are refused, so that no web page can use a model behind its
visitor's back.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_client.serving import rest
from edge_client.serving.http_parts import HttpAnswer, HttpRequest, Reply
from edge_client.serving.metrics import exposition
from edge_client.serving.page import Page
from edge_client.serving.protocol import InferAnswer
from edge_client.serving.service import (
    EXTENSIONS,
    HTTP_STATUS,
    SERVER_NAME,
    SERVER_VERSION,
    Outcome,
    Service,
    as_refused,
    demand_member,
    log_fault,
)
from fedcore.errors import FedcoreError, RequestRefused

_MODEL = re.compile(
    r"/v2/models/(?P<model>[^/]{1,256})(?:/versions/(?P<version>[^/]{1,256}))?"
    r"(?P<rest>/ready|/infer|)"
)
_REPOSITORY = re.compile(r"/v2/repository/models/(?P<model>[^/]{1,256})/(?P<verb>load|unload)")
_RETRY_S = "1"


@dataclass(frozen=True)
class HttpService:
    """Answers requests; `handle` is a `edge_client.serving.http_parts.HttpHandler`."""

    service: Service
    page: Page
    role_of: Callable[[bytes], str]
    """Returns the role of a caller by its certificate in DER; empty for nobody."""
    plain: bool
    """Whether the server is without TLS, and so for this machine alone."""

    def handle(self, request: HttpRequest, reply: Reply) -> None:
        """Answers a request. Never raises: a fault of ours is answered with status 500."""
        try:
            if self.plain:
                _check_origin(request)
            demand_member(self.role_of(request.certificate))
            self._handle(request, reply)
        except FedcoreError as error:
            reply(_error(error))
        except Exception as error:  # the loop answers everyone: one request must not end it
            log_fault("a request", error)
            reply(HttpAnswer(500, b'{"error":"internal error; see the server\'s log"}'))

    def _handle(self, request: HttpRequest, reply: Reply) -> None:
        found = _MODEL.fullmatch(request.path)
        if found is not None and found["rest"] == "/infer":
            _demand(request, "POST")
            self._infer(request, found["model"], found["version"] or "", reply)
            return
        if found is not None:
            _demand(request, "GET")
            name, version = found["model"], found["version"] or ""
            if found["rest"] == "/ready":
                reply(_state(self.service.model_ready(name, version), "ready"))
            else:
                reply(_json(rest.model_metadata(self.service.models.describe(name, version))))
            return
        reply(self._route(request))

    def _route(self, request: HttpRequest) -> HttpAnswer:
        path, service = request.path, self.service
        if path == "/v2/repository/index":
            _demand(request, "POST")
            asked = rest.parse_json(request.body) if request.body else {}
            role = self.role_of(request.certificate)
            return _json(rest.index(service.index(role, ready=asked.get("ready") is True)))
        if (repository := _REPOSITORY.fullmatch(path)) is not None:
            _demand(request, "POST")
            return self._change(request, repository["model"], repository["verb"])
        _demand(request, "GET")
        if path in ("/v2", "/v2/"):
            return _json(
                {"name": SERVER_NAME, "version": SERVER_VERSION, "extensions": list(EXTENSIONS)}
            )
        if path == "/v2/health/live":
            return _state(True, "live")
        if path == "/v2/health/ready":
            return _state(service.ready(), "ready")
        if path == "/metrics":
            return HttpAnswer(200, self._metrics(), "text/plain; version=0.0.4; charset=utf-8")
        if (answer := self.page.answer(path)) is not None:
            return answer
        raise RequestRefused("no such path. Nothing was answered; v2 lists what is.", "unknown")

    def _change(self, request: HttpRequest, name: str, verb: str) -> HttpAnswer:
        role = self.role_of(request.certificate)
        asked = rest.parse_json(request.body) if request.body else {}
        parameters = asked.get("parameters") or {}
        if not isinstance(parameters, dict) or set(parameters) - {"unload_dependents"}:
            raise RequestRefused(
                f"{verb}: parameters are not offered: what is served comes from the signed "
                "release alone. Nothing was changed.",
                "unsupported",
            )
        (self.service.load if verb == "load" else self.service.unload)(role, name)
        return _json({})

    def _infer(self, request: HttpRequest, model: str, version: str, reply: Reply) -> None:
        length = request.headers.get(rest.HEADER_LENGTH)
        if length is not None and not (length.isdecimal() and len(length) < 19):
            raise RequestRefused(f"{rest.HEADER_LENGTH}: expected a number. Nothing was answered.")
        asked, wanted = rest.read_infer_request(
            model, version, request.body, None if length is None else int(length)
        )

        def done(outcome: Outcome) -> None:
            try:
                if isinstance(outcome, InferAnswer):
                    reply(_inferred(outcome, wanted))
                else:
                    reply(_error(outcome))
            except FedcoreError as error:
                reply(_error(error))
            except Exception as error:  # this thread has other requests to answer
                log_fault("an answer", error)
                reply(HttpAnswer(500, b'{"error":"internal error; see the server\'s log"}'))

        self.service.infer(asked, done)

    def _metrics(self) -> bytes:
        every = []
        for served in self.service.models.served():
            version = None if served.current is None else served.current.version
            waiting = 0 if served.batcher is None else len(served.batcher)
            every.append(served.metrics.samples(served.name, version, waiting, served.psi()))
        return exposition(every).encode()


def _inferred(answer: InferAnswer, wanted: rest.Wanted) -> HttpAnswer:
    body, length = rest.write_infer_answer(answer, wanted)
    if length is None:
        return HttpAnswer(200, body)
    headers = ((rest.HEADER_LENGTH, str(length)),)
    return HttpAnswer(200, body, "application/octet-stream", headers)


def _error(error: FedcoreError) -> HttpAnswer:
    refused = as_refused(error)
    status = HTTP_STATUS[refused.reason]
    headers = (("retry-after", _RETRY_S),) if status == 503 else ()
    return HttpAnswer(status, json.dumps({"error": str(refused)}).encode(), headers=headers)


def _json(value: Any) -> HttpAnswer:
    return HttpAnswer(200, json.dumps(value).encode())


def _state(holds: bool, name: str) -> HttpAnswer:
    return HttpAnswer(200 if holds else 503, json.dumps({name: holds}).encode())


def _demand(request: HttpRequest, method: str) -> None:
    if request.method != method:
        raise RequestRefused(f"expected method {method}. Nothing was answered.")


def _check_origin(request: HttpRequest) -> None:
    """Raises `RequestRefused` for what a web page of another site could have sent."""
    host = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if not is_loopback(host):
        raise RequestRefused(
            "without TLS this server is for its own machine: use localhost or 127.0.0.1 as the "
            "host. Nothing was answered.",
            "forbidden",
        )
    if origin is not None and origin != f"http://{host}":
        raise RequestRefused(
            "the request comes from the page of another site. Nothing was answered.", "forbidden"
        )


def is_loopback(host: str) -> bool:
    """Returns whether a host with an optional port names this machine."""
    name = re.sub(r":\d{1,5}$", "", host) if not host.endswith("]") else host
    name = name.removeprefix("[").removesuffix("]")
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
