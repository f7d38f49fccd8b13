"""Releases over the network: what a device takes from its project's server, and from a bad one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.delivery.network import DeliveryEndpoint, DeliveryLink, endpoint_of
from edge_client.delivery.source import folder_source
from fedcore.crypto.kit import load_kit
from fedcore.errors import (
    CertificateRefused,
    ConfigError,
    DataError,
    DeviceError,
    RepositoryUnreachable,
    RollbackRefused,
)
from fedcore.rpc.delivery import CHUNK_BYTES, method
from fedcore.rpc.delivery_pb2 import DeviceReport, MetadataRequest
from tests.cutting import cutting
from tests.delivering import HOST, Delivering


@pytest.fixture
def project(tmp_path: Path) -> Delivering:
    return Delivering(tmp_path / "project")


Linked = Callable[..., DeliveryLink]


@pytest.fixture
def linked(project: Delivering) -> Iterator[Linked]:
    """Opens links, and closes them at the end."""
    links = []

    def link(port: int, name: str = "edge-1", **more: Any) -> DeliveryLink:
        kit = project.folder / "kits" / name
        if not kit.exists():
            project.device(name, **more)
        links.append(DeliveryLink(kit, DeliveryEndpoint(HOST, port)))
        return links[-1]

    yield link
    for one in links:
        one.close()


def test_a_release_reaches_a_device_without_polling(
    world: Any, project: Delivering, linked: Linked
) -> None:
    with project.served(world.repository) as port:
        link = linked(port)
        calls = link.watch()
        first = next(calls)
        world.publish(2.0)
        assert next(calls).change != first.change
        calls.close()  # type: ignore[attr-defined]
        assert world.update(link.source).version == 2
        assert world.answers() == 2.0
        assert not world.update(link.source).changed


def test_a_large_model_over_a_connection_that_is_cut_goes_on_where_it_was(
    world: Any, project: Delivering, linked: Linked
) -> None:
    world.publish(2.0, padding=3_000_000)
    length = world.target("model.onnx").stat().st_size
    after = [120_000 + 250_000 * k for k in range(4)]
    with project.served(world.repository) as port, cutting(port, after) as line:
        link = linked(line.port)
        assert world.update(link.source).version == 2
        link.close()
    assert line.cuts == 4
    # Over a real network the bytes on their way are lost; here at most what the window holds.
    assert sum(line.passed_bytes) < length + line.cuts * (3 * CHUNK_BYTES + 150_000) + 100_000
    assert world.answers() == 2.0


def test_a_server_that_is_gone_is_told_and_nothing_changes(
    world: Any, project: Delivering, linked: Linked
) -> None:
    with project.served(world.repository) as port:
        pass
    with pytest.raises(RepositoryUnreachable, match="no releases from it"):
        world.update(linked(port).source)
    assert world.answers() == 1.0


@pytest.mark.parametrize("whom", ["stranger", "revoked", "operator"])
def test_only_devices_in_force_are_answered(
    world: Any, project: Delivering, linked: Linked, whom: str
) -> None:
    project.device("edge-1", listed=whom != "stranger", role="device")
    if whom == "revoked":
        project.revoke("edge-1")
    with project.served(world.repository) as port:
        if whom == "operator":
            with pytest.raises(CertificateRefused, match="expected a device"):
                world.update(linked(port, "olga", role="operator").source)
        else:
            with pytest.raises(CertificateRefused, match="refuses this device"):
                world.update(linked(port).source)
    assert world.answers() == 1.0


def test_a_device_that_is_revoked_loses_its_stream(
    world: Any, project: Delivering, linked: Linked
) -> None:
    with project.served(world.repository) as port:
        calls = linked(port).watch()
        next(calls)
        project.revoke("edge-1")
        with pytest.raises(RepositoryUnreachable):
            next(calls)


def test_a_kit_of_another_project_reaches_nobody(
    world: Any, project: Delivering, tmp_path: Path
) -> None:
    other = Delivering(tmp_path / "other").device("edge-1")
    with project.served(world.repository) as port:
        link = DeliveryLink(other, DeliveryEndpoint(HOST, port))
        with link, pytest.raises(RepositoryUnreachable):
            world.update(link.source)
    assert world.answers() == 1.0


def test_an_older_repository_is_refused_after_every_cache_was_wiped(
    world: Any, project: Delivering, linked: Linked
) -> None:
    shutil.copytree(world.repository, world.folder / "old")
    world.publish(2.0)
    assert world.update().version == 2
    for cache in ("models", "incoming", "trust/metadata"):
        shutil.rmtree(world.store / cache, ignore_errors=True)
    served = project.served(world.folder / "old")
    with served as port, pytest.raises(RollbackRefused, match="has seen version"):
        world.update(linked(port).source)
    assert world.update().version == 2
    assert world.answers() == 2.0


def test_two_agents_on_one_store_do_not_mix(
    world: Any, project: Delivering, linked: Linked
) -> None:
    world.publish(2.0, padding=2_000_000)
    held, goes_on = threading.Event(), threading.Event()
    with project.served(world.repository) as port:
        link = linked(port)

        def slowly(name: str, offset: int) -> Iterator[bytes]:
            for chunk in link.source(name, offset):
                if name.endswith("model.onnx"):
                    held.set()
                    assert goes_on.wait(30)
                yield chunk

        first = threading.Thread(target=lambda: world.update(slowly))
        first.start()
        assert held.wait(30)
        with pytest.raises(DeviceError, match="another update of this store is in progress"):
            world.update()
        assert world.answers() == 1.0
        goes_on.set()
        first.join(30)
    assert world.answers() == 2.0


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, bytes], Any]]:
    """Sends any bytes to a call; returns the status code and the number of answers."""
    folder = tmp_path_factory.mktemp("asking")
    (folder / "repository" / "metadata").mkdir(parents=True)
    (folder / "repository" / "metadata" / "timestamp.json").write_bytes(b"{}")
    (folder / "repository" / "secret.json").write_bytes(b"{}")
    project = Delivering(folder)
    kit = load_kit(project.device("edge-1"))
    with project.served(folder / "repository") as port:
        credentials = grpc.ssl_channel_credentials(
            kit.authority_pem, kit.key_pem(), kit.certificate_pem
        )
        with grpc.secure_channel(f"{HOST}:{port}", credentials) as channel:

            def ask(call: str, raw: bytes) -> tuple[grpc.StatusCode, list[bytes]]:
                found: list[bytes] = []
                answers = channel.unary_stream(method(call))(raw, timeout=20)
                try:
                    found.extend(answers)
                except grpc.RpcError as error:
                    return error.code(), found
                return grpc.StatusCode.OK, found

            yield ask


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
}


def test_whatever_bytes_are_sent_the_answer_is_a_status(
    asking: Callable[[str, bytes], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.delivery.service._REFUSED_S", 0.0)

    @given(st.sampled_from(["GetMetadata", "Fetch", "Report", "Nothing"]), st.binary(max_size=200))
    def sent(call: str, raw: bytes) -> None:
        code, answers = asking(call, raw)
        assert code in EXPECTED
        assert not answers or call == "Report"

    sent()


@pytest.mark.parametrize(
    "name",
    [
        *("", "../secret.json", "timestamp.json/", "0.root.json", "1.root.json\0", "keys.json"),
        *("1.root.json/../../secret.json", "9" * 4000, "timestamp.json\n"),
    ],
)
def test_no_other_file_is_named(asking: Callable[[str, bytes], Any], name: str) -> None:
    code, answers = asking("GetMetadata", MetadataRequest(name=name).SerializeToString())
    assert code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert answers == []


@pytest.mark.parametrize(
    "server", ["", "host:0", "host:99999", "http://host", "a b", "host:1:2", "[::1", "host:x"]
)
def test_an_address_of_another_form_is_refused(project: Delivering, server: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST or HOST:PORT"):
        endpoint_of(project.device("edge-1"), server)


def test_the_port_follows_from_the_kit(project: Delivering) -> None:
    kit = project.device("edge-1")
    assert str(endpoint_of(kit, "fl.example.org")) == "fl.example.org:9094"
    assert str(endpoint_of(kit, "[::1]:7")) == "[::1]:7"


def test_reports_reach_the_server_and_wrong_ones_do_not(
    world: Any, project: Delivering, linked: Linked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.delivery.service._REFUSED_S", 0.0)
    came: list[Any] = []
    with project.served(world.repository, lambda *what: came.append(what)) as port:
        link = linked(port)
        link.report(
            DeviceReport(model="digits", version=1, outcome=DeviceReport.ACTIVATED, p50_us=12.5)
        )
        for wrong in (
            DeviceReport(model="digits", version=1),
            DeviceReport(model="", version=1, outcome=DeviceReport.REFUSED),
            DeviceReport(model="digits", outcome=DeviceReport.REFUSED),
            DeviceReport(model="digits", version=1, outcome=DeviceReport.REFUSED, reason="x" * 501),
            DeviceReport(
                model="digits", version=1, outcome=DeviceReport.REFUSED, p50_us=float("nan")
            ),
        ):
            with pytest.raises(RepositoryUnreachable):
                link.report(wrong)
    ((member, report),) = came
    assert (member.name, report.version, report.p50_us) == ("edge-1", 1, 12.5)


def test_a_folder_and_a_link_give_the_same_bytes(
    world: Any, project: Delivering, linked: Linked
) -> None:
    world.publish(2.0, padding=100_000)
    names = [
        os.fspath(path.relative_to(world.repository))
        for path in world.repository.rglob("*")
        if path.is_file() and path.name != ".lock"
    ]
    here = folder_source(world.repository)
    with project.served(world.repository) as port:
        there = linked(port).source
        for name in names:
            for offset in (0, 7, 10**12) if name.startswith("targets") else (0,):
                assert b"".join(there(name, offset)) == b"".join(here(name, offset))
        with pytest.raises(FileNotFoundError):
            list(there("metadata/77.root.json", 0))
        with pytest.raises(FileNotFoundError):
            list(there(f"targets/{'0' * 64}.model.onnx", 0))
    assert len(names) > 8
    with pytest.raises(DataError):
        list(there("metadata/1.root.json", 0))
