"""The HTTP server: limits, what web pages may do, metrics and the page to try models."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import tracemalloc
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import pytest

from edge_client.serving.batching import QueueLimits
from edge_client.serving.http_parts import MAX_HEAD_BYTES
from edge_client.serving.http_service import is_loopback
from edge_client.serving.rest import read_infer_request
from fedcore.errors import RequestRefused
from tests.serving import WIDTH, Product, Running, local, running, store_of

ROW = {"name": "input", "datatype": "FP32", "shape": [1, WIDTH], "data": [1] * WIDTH}
INFER = "/v2/models/product/infer"
_NEXT = b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n"
SECOND = [_NEXT, _NEXT[: len(_NEXT) * 7 // 10], _NEXT[: len(_NEXT) // 10], b"\0 garbage\r\n\r\n"]


def ask(
    server: Running, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(server.http, timeout=30)
    raw = json.dumps(body) if isinstance(body, dict | list) else body
    connection.request(method, path, raw, {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    found = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(found) if is_json else found.decode(), response.headers


def sent(server: Running, raw: bytes) -> bytes:
    """What comes back for bytes, until the server closes the connection."""
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        found = b""
        while piece := connection.recv(65536):
            found += piece
    return found


def test_infer_with_plain_json(first_server: Running) -> None:
    status, answer, _ = ask(first_server, "POST", INFER, {"inputs": [ROW]})
    assert status == 200
    assert answer["model_version"] == "1"
    x = np.ones((1, WIDTH), np.float32)
    assert answer["outputs"][0]["data"] == local(x).ravel().tolist()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("", "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{" * 5000, "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ({}, "expected inputs input, each once, got none"),
        ({"inputs": [ROW, ROW]}, "each once"),
        ({"inputs": [{**ROW, "name": "other"}]}, "got other"),
        ({"inputs": [{**ROW, "datatype": "BYTES"}]}, "expected datatype FP32"),
        ({"inputs": [{**ROW, "shape": [2**36]}]}, "expected shape"),
        ({"inputs": [{**ROW, "shape": [-1, WIDTH]}]}, "expected shape"),
        ({"inputs": [{**ROW, "shape": [1.0, WIDTH]}]}, "whole numbers"),
        ({"inputs": [{**ROW, "shape": [10**30, WIDTH]}]}, "whole numbers"),
        ({"inputs": [{**ROW, "data": [1, [2]]}]}, "equal lengths"),
        ({"inputs": [{**ROW, "data": ["1"] * WIDTH}]}, "expected numbers"),
        ({"inputs": [{**ROW, "data": [1, 2]}]}, "takes 6 elements, got 2"),
        ({"inputs": [{**ROW, "data": [None] * WIDTH}]}, "not finite"),
        ({"inputs": [{**ROW, "data": [10**400] * WIDTH}]}, "expected numbers"),
        ({"inputs": [{**ROW, "data": [1e300] * WIDTH}]}, "not finite"),
        ({"inputs": [{**ROW, "parameters": {"binary_data_size": 24}}]}, "at most the 0 bytes"),
        ({"inputs": [ROW], "outputs": [{"name": "none"}]}, "no output 'none'"),
        ({"inputs": [ROW], "outputs": ["output"]}, "list of at most"),
        ({"inputs": [ROW], "parameters": {"timeout": -1}}, "microseconds"),
    ],
)
def test_bodies_that_cannot_be_answered(first_server: Running, body: Any, why: str) -> None:
    status, answer, _ = ask(first_server, "POST", INFER, body)
    assert status == 400
    assert why in answer["error"]


def test_a_text_among_numbers_costs_no_more_than_its_own_length() -> None:
    # NumPy gives each element the room of the longest: 400 GB for these 4 MB.
    data = ["a" * 2_000_000, *[""] * 50_000]
    row = {"name": "input", "datatype": "FP32", "shape": [1, WIDTH], "data": data}
    for listed in (data, [data], [[1.0, *data]]):
        body = json.dumps({"inputs": [{**row, "data": listed}]}).encode()
        tracemalloc.start()
        with pytest.raises(RequestRefused, match="expected numbers"):
            read_infer_request("product", "", body, None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20


def test_paths_and_methods(first_server: Running) -> None:
    assert ask(first_server, "GET", "/nowhere")[0] == 404
    assert ask(first_server, "GET", "/v2/models/absent")[0] == 404
    assert ask(first_server, "GET", INFER)[0] == 400
    assert ask(first_server, "POST", "/v2/models/product/versions/9/infer", {})[0] == 404
    assert ask(first_server, "POST", "/v2/repository/index")[0] == 403
    assert ask(first_server, "POST", "/v2/repository/models/product/unload")[0] == 403


def test_an_announced_body_that_is_too_long_is_refused_before_it_is_sent(
    first_server: Running,
) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {1 << 40}\r\n\r\n"
    assert sent(first_server, head.encode()).startswith(b"HTTP/1.1 413 ")


def test_a_body_in_pieces_is_limited_too(first_server: Running) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with suppress(ConnectionError):  # closed while the rest was on its way
        assert sent(first_server, head.encode() + 20 * piece).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\nx: " + b"a" * (2 * MAX_HEAD_BYTES),
        b"GET / HTTP/1.1\r\n" + b"x: a\r\n" * MAX_HEAD_BYTES,
        b"GET /" + b"a" * (2 * MAX_HEAD_BYTES),
    ],
)
def test_long_heads_are_refused(first_server: Running, raw: bytes) -> None:
    try:
        found = sent(first_server, raw)
    except ConnectionError:
        return
    assert found.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_what_follows_a_body_changes_no_header(first_server: Running) -> None:
    head = "GET /v2 HTTP/1.1\r\nhost: example.org\r\ntransfer-encoding: chunked\r\n\r\n"
    found = sent(first_server, head.encode() + b"0\r\nhost: localhost\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 403 ")


@pytest.mark.parametrize(("body", "status"), [(b"", 200), (b"{}", 501)])
def test_another_protocol_is_not_offered(first_server: Running, body: bytes, status: int) -> None:
    """A client that asks for one gets one answer, in the protocol that there is."""
    length = b"content-length: %d\r\n" % len(body) if body else b""
    asked = b"connection: upgrade\r\nupgrade: h2c\r\n" + length
    found = sent(first_server, b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n" + asked + b"\r\n" + body)
    assert found.startswith(b"HTTP/1.1 %d " % status)
    assert found.count(b"HTTP/1.1 ") == 1


def test_connections_that_send_nothing_keep_nobody_out(tmp_path: Any) -> None:
    with running(store_of(tmp_path, {"product": 1}), max_calls=4) as server, ExitStack() as held:
        host, port = server.http.split(":")
        for _ in range(12):
            held.enter_context(socket.create_connection((host, int(port)), timeout=30))
        assert ask(server, "POST", INFER, {"inputs": [ROW]})[0] == 200


def test_garbage_gets_a_response(first_server: Running) -> None:
    assert sent(first_server, b"\x16\x03\x01\x02\x00 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_compressed_bodies_are_not_unfolded(first_server: Running) -> None:
    found = ask(first_server, "POST", INFER, {"inputs": [ROW]}, content_encoding="gzip")
    assert found[0] == 415


def test_web_pages_of_other_sites_get_nothing(first_server: Running) -> None:
    body = {"inputs": [ROW]}
    assert ask(first_server, "POST", INFER, body, host="models.example.org")[0] == 403
    assert ask(first_server, "POST", INFER, body, origin="https://example.org")[0] == 403
    own = {"host": "localhost:8000", "origin": "http://localhost:8000"}
    assert ask(first_server, "POST", INFER, body, **own)[0] == 200


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True),
        ("LOCALHOST:80", True),
        ("127.0.0.1:8000", True),
        ("127.8.9.1", True),
        ("[::1]:8000", True),
        ("[::1]", True),
        ("", False),
        ("localhost.example.org", False),
        ("127.0.0.1.nip.io:8000", False),
        ("10.0.0.5:8000", False),
        ("0.0.0.0", False),
    ],
)
def test_hosts_of_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_requests_on_one_connection(first_server: Running) -> None:
    """Also a second one that is sent before the first is answered."""
    body = json.dumps({"inputs": [ROW]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    host, port = first_server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for _ in range(3):
            connection.sendall(head.encode() + body)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            assert json.loads(response.read())["model_name"] == "product"


@pytest.mark.parametrize("second", SECOND)
def test_a_second_request_in_the_same_data_never_answers_for_the_first(
    first_server: Running, second: bytes
) -> None:
    body = json.dumps({"id": "first", "inputs": [ROW]}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    found = sent(first_server, head.encode() + body + second)
    assert found.startswith(b"HTTP/1.1 200 ")
    assert b'"id":"first"' in found
    assert found.count(b"HTTP/1.1") == 1
    assert b"connection: close" in found


def test_requests_that_are_answered_at_once_may_follow_each_other(first_server: Running) -> None:
    one = b"GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
    host, port = first_server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(one + one[:20])
        found = b""
        while b"true}" not in found:  # then the rest comes by itself
            found += connection.recv(65536)
        connection.sendall(one[20:] + one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        while piece := connection.recv(65536):
            found += piece
    assert found.count(b"HTTP/1.1 200 OK") == 3


def test_metrics(first_server: Running) -> None:
    ask(first_server, "POST", INFER, {"inputs": [ROW]})
    ask(first_server, "POST", INFER, {"inputs": []})
    status, text, _ = ask(first_server, "GET", "/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values['fedcore_requests_total{model="product"}']) >= 1
    assert float(values['fedcore_refused_total{model="product",reason="invalid"}']) >= 1
    assert values['fedcore_model_version{model="product"}'] == "1"
    count = values['fedcore_latency_seconds_count{model="product"}']
    assert values['fedcore_latency_seconds_bucket{model="product",le="+Inf"}'] == count
    assert text.count("# TYPE fedcore_latency_seconds histogram") == 1


def test_the_page_has_a_strict_policy_and_names_nothing_elsewhere(first_server: Running) -> None:
    for path, content in (("/", "text/html"), ("/page.js", "text/javascript")):
        status, text, headers = ask(first_server, "GET", path)
        assert status == 200
        assert headers.get_content_type() == content
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "http://" not in text
        assert "https://" not in text
        assert "innerHTML" not in text


def test_a_queue_that_is_full_says_when_to_come_back(tmp_path: Any) -> None:
    gate, made = threading.Event(), []

    def opener(store: Any, name: str) -> Product:
        made.append(Product(quick=False, gate=gate))
        return made[-1]

    store = store_of(tmp_path, {"product": 1})
    with running(store, opener=opener, limits=QueueLimits(max_queue=1)) as server:
        results: list[int] = []
        body = {"inputs": [ROW]}

        def call() -> None:
            results.append(ask(server, "POST", INFER, body)[0])

        first = threading.Thread(target=call)
        first.start()
        assert made[0].entered.acquire(timeout=30)
        second = threading.Thread(target=call)
        second.start()
        while True:
            text = ask(server, "GET", "/metrics")[1]
            if 'fedcore_queue_requests{model="product"} 1' in text:
                break
        status, answer, headers = ask(server, "POST", INFER, body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "the queue is full" in answer["error"]
        assert ask(server, "GET", "/v2/health/live")[0] == 200  # while the model runs
        gate.set()
        first.join(30)
        second.join(30)
        assert results == [200, 200]
