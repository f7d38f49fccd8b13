"""A repository in a bucket of S3: pushed by s3fs to moto's server, read by a device over HTTPS."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_client.delivery.https import https_source
from fedcore.errors import ReleaseError, TrustError
from server.release.bucket import ConditionFailed, open_bucket
from server.release.push import TIMESTAMP, push
from tests.unit.fedcore.rpc.serving import contexts
from tests.unit.server.release.conftest import publisher

__all__ = ["publisher"]

TO = "s3://releases/fleet"
SECRET = "hunter2-secret-key"
PUBLIC = {
    "Version": "2012-10-17",
    "Statement": {
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:PutObject"],
        "Resource": "arn:aws:s3:::releases/fleet/*",
    },
}
"""Lets devices read without credentials, and the test write."""


@dataclass
class Store:
    """The server, which breaks off requests that ``breaks`` names."""

    port: int
    certificate: Path
    breaks: Callable[[str, str], bool] = field(default=lambda method, path: False)
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and cache header of each request."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def put(self, name: str, data: bytes = b"") -> None:
        answer = httpx.put(f"{self.url}/{name}", content=data, verify=str(self.certificate))
        assert answer.is_success

    def get(self, name: str) -> bytes:
        answer = httpx.get(f"{self.url}/{name}", verify=str(self.certificate))
        assert answer.status_code == 200
        return answer.content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    folder = tmp_path_factory.mktemp("tls")
    serving, _ = contexts(folder)
    moto = DomainDispatcherApplication(create_backend_app)
    store = Store(0, folder / "both.pem")

    def app(environment: dict[str, Any], start: Any) -> Any:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        store.seen.append((method, path, environment.get("HTTP_CACHE_CONTROL", "")))
        if store.breaks(method, path):
            raise ConnectionResetError("the test cuts this connection")
        return moto(environment, start)

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    listening = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=serving)
    store.port = listening.port
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    yield store
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "publisher",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL_S3": server.url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CA_BUNDLE": str(server.certificate),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "SSL_CERT_FILE": str(server.certificate),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    server.put("releases")
    server.put("releases?policy", json.dumps(PUBLIC).encode())
    yield server
    server.breaks = lambda method, path: False
    httpx.post(f"{server.url}/moto-api/reset", verify=str(server.certificate))
    server.seen.clear()


def test_a_device_follows_the_bucket_through_faults(world: Any, store: Store) -> None:
    source = https_source(f"{store.url}/releases/fleet")
    push(world.repository, world.keys, TO)
    cached = {path.rpartition("/")[2]: how for verb, path, how in store.seen if verb == "PUT"}
    assert cached["timestamp.json"] == "no-cache"
    assert cached["1.root.json"].endswith("immutable")
    store.seen.clear()
    assert push(world.repository, world.keys, TO).uploaded == ()
    read = [path for verb, path, _ in store.seen if verb == "GET" and path != "/releases"]
    assert read == [f"/releases/fleet/{TIMESTAMP}"]  # fingerprints tell the rest
    # The connection is lost between the files and the metadata that names them.
    world.publish(2.0)
    store.breaks = lambda method, path: method == "PUT" and path.endswith(".releases.json")
    with pytest.raises(ReleaseError, match="cannot write to this bucket"):
        push(world.repository, world.keys, TO)
    assert world.update(source).version == 1
    store.breaks = lambda method, path: False
    store.seen.clear()
    push(world.repository, world.keys, TO)
    assert not [path for verb, path, _ in store.seen if verb == "PUT" and "/targets/" in path]
    # An object is altered: the device refuses it, and a push repairs it.
    (path,) = (world.repository / "targets").rglob("2/*.model.onnx")
    name, raw = str(path.relative_to(world.repository)), path.read_bytes()
    store.put(f"releases/fleet/{name}", raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(TrustError):
        world.update(source)
    assert push(world.repository, world.keys, TO).repaired == (name,)
    assert world.update(source).version == 2
    assert world.answers() == 2.0


def test_a_timestamp_that_changed_meanwhile_is_not_replaced(store: Store) -> None:
    bucket = open_bucket(TO)
    bucket.replace(TIMESTAMP, b"ours", None)
    before = bucket.describe(TIMESTAMP)
    bucket.replace(TIMESTAMP, b"ours, too", before)
    store.put(f"releases/fleet/{TIMESTAMP}", b"another publisher's")
    for expected in (before, None):
        with pytest.raises(ConditionFailed):
            bucket.replace(TIMESTAMP, b"ours", expected)
    assert store.get(f"releases/fleet/{TIMESTAMP}") == b"another publisher's"


def test_what_is_wrong_is_named_without_secrets(
    publisher: Any,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ReleaseError, match="s3://none/fleet: there is no such bucket"):
        push(publisher.repository, publisher.keys, "s3://none/fleet")
    with monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL_S3", "https://127.0.0.1:9")
        with pytest.raises(ReleaseError, match="cannot list this bucket") as refused:
            push(publisher.repository, publisher.keys, TO)
    assert SECRET not in str(refused.value) + repr(open_bucket(TO)) + caplog.text
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ReleaseError, match=r"no credentials.*AWS_ACCESS_KEY_ID"):
        push(publisher.repository, publisher.keys, TO)
