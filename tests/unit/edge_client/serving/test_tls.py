"""With a kit: who gets in, who may operate, and what becomes of a revoked member."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from edge_client.enrol import enrol, install_kit
from edge_client.serving.access import open_access
from fedcore.crypto.kit import Kit, client_context
from fedcore.errors import ConfigError
from server.provision.issue import Act, initialise, provision_member, provision_server, revoke
from tests.serving import WIDTH, Running, local, running, store_of

DAY = timedelta(days=1)
X = np.ones((1, WIDTH), np.float32)


@dataclass
class Site:
    """An authority, a server over TLS, and members."""

    act: Act
    server: Running
    kits: dict[str, Kit]


def member(act: Act, folder: Path, name: str, role: Any) -> Kit:
    request = enrol(folder, name).request.read_bytes()
    kit = provision_member(act, name, role, request, where=name, validity=DAY, num_examples=None)
    (folder / "sent.kit").write_bytes(kit.to_bytes())
    return install_kit(folder, folder / "sent.kit", now=act.now)


def authority(folder: Path, project: str) -> Act:
    act = Act(folder, "anna", datetime.now(UTC).replace(microsecond=0))
    initialise(act, project)
    provision_server(act, ["localhost", "127.0.0.1"], port=9092, validity=DAY, again=False)
    return act


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("site")
    act = authority(root / "authority", "shop")
    roles = {"edge-1": "device", "edge-2": "device", "anna": "operator", "vera": "viewer"}
    kits = {name: member(act, root / name, name, role) for name, role in roles.items()}
    foreign = authority(root / "foreign", "shop")
    kits["stranger"] = member(foreign, root / "stranger", "stranger", "operator")
    access = open_access("0.0.0.0", act.folder / "server")
    with running(store_of(root / "store", {"product": 1}), access=access) as server:
        yield Site(act, server, kits)


def over_grpc(site: Site, name: str) -> triton.InferenceServerClient:
    kit = site.kits[name]
    credentials = grpc.ssl_channel_credentials(
        site.kits["anna"].authority_pem, kit.key_pem(), kit.certificate_pem
    )
    return triton.InferenceServerClient(site.server.grpc, creds=credentials)


def over_http(site: Site, name: str, method: str, path: str, **more: Any) -> httpx.Response:
    address = f"https://{site.server.http}{path}"
    with httpx.Client(verify=client_context(site.kits[name])) as client:
        return client.request(method, address, **more)


def infer(client: triton.InferenceServerClient) -> np.ndarray:
    tensor = triton.InferInput("input", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X)
    return client.infer("product", [tensor]).as_numpy("output")


@pytest.mark.parametrize("name", ["edge-1", "vera", "anna"])
def test_members_get_answers(site: Site, name: str) -> None:
    with over_grpc(site, name) as client:
        np.testing.assert_array_equal(infer(client), local(X))
    assert over_http(site, name, "GET", "/v2/models/product").status_code == 200


def test_operators_operate_and_others_do_not(site: Site) -> None:
    with over_grpc(site, "edge-1") as client:
        for call in (
            client.get_model_repository_index,
            lambda: client.load_model("product"),
            lambda: client.unload_model("product"),
        ):
            with pytest.raises(InferenceServerException, match="for operators"):
                call()
    with over_grpc(site, "anna") as client:
        (row,) = client.get_model_repository_index(as_json=True)["models"]
        assert (row["name"], row["version"], row["state"]) == ("product", "1", "READY")
        client.unload_model("product")
        assert not client.is_model_ready("product")
        with pytest.raises(InferenceServerException, match="unloaded by an operator"):
            infer(client)
        (row,) = client.get_model_repository_index(as_json=True)["models"]
        assert row["state"] == "UNAVAILABLE"
        client.load_model("product")
        np.testing.assert_array_equal(infer(client), local(X))
        with pytest.raises(InferenceServerException, match="signed release alone"):
            client.load_model("product", config='{"max_batch_size": 9}')


def test_operators_operate_over_http(site: Site) -> None:
    index = over_http(site, "anna", "POST", "/v2/repository/index")
    assert [row["name"] for row in index.json()] == ["product"]
    for verb in ("unload", "load"):
        path = f"/v2/repository/models/product/{verb}"
        assert over_http(site, "vera", "POST", path).status_code == 403
        assert over_http(site, "anna", "POST", path, json={"parameters": {}}).status_code == 200


def test_another_authority_gets_no_connection(site: Site) -> None:
    with over_grpc(site, "stranger") as client, pytest.raises(InferenceServerException):
        infer(client)
    with grpc.insecure_channel(site.server.grpc) as channel:
        plain = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        with pytest.raises(grpc.RpcError):
            plain(b"", timeout=5)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{site.server.http}/v2/health/live")
    with pytest.raises(httpx.HTTPError):
        over_http(site, "stranger", "GET", "/v2/health/live")


def test_a_revoked_member_gets_nothing_on_a_connection_that_is_open(site: Site) -> None:
    with over_grpc(site, "edge-2") as client:
        infer(client)
        revoke(site.act, "edge-2")
        with pytest.raises(InferenceServerException, match="not that of a member"):
            infer(client)
        with pytest.raises(InferenceServerException, match="not that of a member"):
            client.is_server_live()
    assert over_http(site, "edge-2", "GET", "/v2").status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_other_addresses_than_loopback_need_a_kit(host: str) -> None:
    with pytest.raises(ConfigError, match="without a kit there is no TLS"):
        open_access(host, None)
    assert open_access("127.0.0.1", None).context() is None
