"""A device's side of the Fleet API, over Flower's own client and the device's certificate."""

from __future__ import annotations

import json
import logging
import random
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedcore.crypto.certificates import SKEW
from fedcore.crypto.kit import Kit, client_context, load_kit
from fedcore.errors import (
    CertificateRefused,
    DataError,
    DeviceError,
    FedcoreError,
    InvalidUpdate,
    TrustError,
)
from fedcore.rpc.hello import WAKE_PORT, again_in

log = logging.getLogger("fedcore.device")

HEARTBEAT_S = 1800
"""What a node announces to Flower: the most that it allows. Whether a node is there is seen
elsewhere, and sooner."""
_TIMEOUT_S = 90.0
_PUSHES = 3
"""How often a reply is begun anew when the server has dropped what had come of it."""
_REFUSED: dict[int, type[FedcoreError]] = {
    400: DataError,
    403: TrustError,
    404: DeviceError,
    409: InvalidUpdate,
    412: DeviceError,
    413: DeviceError,
}
_CERTIFICATE_ALERT = re.compile("ALERT_(UNKNOWN_CA|.*CERTIFICATE|ACCESS_DENIED)")
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Unreachable(ConnectionError):
    """The server cannot be reached, or is not itself; it may be again."""


class Unproven(Unreachable):
    """What answers is not shown to be the project's server; the server may be back there later."""


class NotActivated(ConnectionError):
    """The server does not know this process: it was restarted, or another one took its place."""


class FleetLink:
    """Calls the Fleet API as one node. Safe to use from several threads.

    A server that is busy says when to come again, and is asked again then. When it cannot be
    reached, the kit is read again: one that was renewed meanwhile is used from then on.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        headers: Mapping[str, str],
        stop: threading.Event,
        let_in_before: bool = False,
        passed: Callable[[int], None] | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            kit: The device's identity, and where the server is.
            headers: Go with every call.
            stop: Ends waiting for a busy server when it is set.
            let_in_before: Whether the server ever let this device in: the kit fits it then, and
                whoever does not prove to be that server merely stands in its place.
            passed: Hears how many bytes each call has moved, and may wait.
        """
        self.kit = kit
        """The identity as it is used now."""
        self._let_in = let_in_before
        self._headers = dict(headers)
        self._stop = stop
        self._passed = passed
        self._client = self._connect(kit)
        self._before: list[FleetHttpClient] = []
        """Those of kits before: another thread may be in a call of theirs."""
        self._renewing = threading.Lock()
        self._unusable = ""
        self._node = Node()
        self.wake_port = 0
        """Where the server wakes devices; known once `activate` has returned."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Adds the headers to a call, and reads those of its answer."""
        context.request.headers.update(self._headers)
        response = call_next(context)
        self.wake_port = int(response.headers.get(WAKE_PORT, self.wake_port))
        if self._passed is not None:
            came = int(response.headers.get("content-length", 0))
            self._passed(len(context.request.content) + came)
        return response

    @property
    def node_id(self) -> int:
        """The node that this device is; 0 before it was activated."""
        return self._node.node_id

    def activate(self) -> None:
        """Tells the server that this process is there."""
        request = ActivateNodeRequest(public_key=self.kit.public, heartbeat_interval=HEARTBEAT_S)
        self._node = Node(node_id=self._call(FleetHttpClient.ActivateNode, request).node_id)
        self._let_in = True

    def deactivate(self) -> None:
        """Says goodbye."""
        self._call(FleetHttpClient.DeactivateNode, DeactivateNodeRequest(node_id=self.node_id))

    def beat(self, again_s: float) -> None:
        """Tells the server that this process is there, and calls again within ``again_s`` seconds.

        Other calls repeat that, until the next beat.
        """
        self._headers |= again_in(again_s)
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        self._call(FleetHttpClient.SendNodeHeartbeat, request)

    def settings(self, run_id: int) -> dict[str, str]:
        """What the server tells devices of a run."""
        answer = self._call(FleetHttpClient.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        return {
            key: str(value) for key, value in run_from_proto(answer.run).override_config.items()
        }

    def receive(self) -> Message | None:
        """The next message for this node, in full; None when there is none."""
        answer = self._call(FleetHttpClient.PullMessages, PullMessagesRequest(node=self._node))
        if not answer.messages_list:
            return None
        bare, tree = message_from_proto(answer.messages_list[0]), answer.message_object_trees[0]
        contents = {
            node.object_id: self._pull(bare.metadata.run_id, node.object_id)
            for node in iterate_object_tree(tree)
        }
        message = inflate_object_from_contents(tree.object_id, contents)
        assert isinstance(message, Message)
        return make_message(metadata=bare.metadata, content=message.content)

    def answer(self, reply: Message) -> None:
        """Sends a reply, object by object, until the server has all of it.

        Raises:
            InvalidUpdate: the server does not take it: it is late, or was refused.
        """
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
        begin = PushMessagesRequest(
            node=self._node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        for left in reversed(range(_PUSHES)):
            asked = self._call(FleetHttpClient.PushMessages, begin)
            wanted = set(asked.objects_to_push)
            try:
                for object_id in objects:
                    if object_id in wanted:
                        self._push(reply, asked.session_id, object_id, objects[object_id].deflate())
            except InvalidUpdate:
                if not left:
                    raise
                continue  # dropped meanwhile, or late: beginning anew tells which
            return

    def close(self) -> None:
        """Closes the connections."""
        for client in (self._client, *self._before):
            client.close()

    def renew(self) -> bool:
        """Reads the kit again, and uses it from now on if it is another; says whether it is.

        One that cannot be used is told of, and the one in use stays as long as it is in force.

        Raises:
            CertificateRefused: the certificate has expired, and none in force lies on disk.
        """
        with self._renewing:
            try:
                kit = load_kit(self.kit.folder)
                if (kit.public, kit.role) != (self.kit.public, self.kit.role):
                    raise CertificateRefused(
                        f"{kit.folder}: the kit there is another identity's now, of the {kit.role} "
                        f"{kit.name!r}. This process goes on with its own; restart it to change."
                    )
            except FedcoreError as error:
                self._keep(error)
                return False
            if kit == self.kit:
                return False
            client = self._connect(kit)
            self._before.append(self._client)
            self._client, self.kit, self._unusable = client, kit, ""
        log.info("renewed: the certificate in use is valid until %s UTC", _minute(kit.not_after))
        return True

    def _keep(self, error: FedcoreError) -> None:
        """Stays with the kit in use, where it may be used still."""
        if datetime.now(UTC) > self.kit.not_after + SKEW:
            raise CertificateRefused(
                f"{self.kit.folder}: this device's certificate expired on "
                f"{_minute(self.kit.not_after)} UTC, and none in force was installed since "
                f"({error}). It takes no part; have it renewed with `fedcore provision renew`, "
                "install what comes back with `fedcore client install`, and start it again."
            ) from None
        if str(error) != self._unusable:
            self._unusable = str(error)
            log.warning("the kit on disk is not used: %s", error)

    def _connect(self, kit: Kit) -> FleetHttpClient:
        return FleetHttpClient(
            kit.servers[0],
            interceptors=[self],
            verify=client_context(kit),
            timeout=_TIMEOUT_S,
        )

    def _pull(self, run_id: int, object_id: str) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        answer = self._call(FleetHttpClient.PullObject, request)
        if not answer.object_available:
            raise InvalidUpdate("pull: the server no longer has what it sent. It was left out.")
        return bytes(answer.object_content)

    def _push(self, reply: Message, session: str, object_id: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node,
            run_id=reply.metadata.run_id,
            object_id=object_id,
            object_content=content,
            session_id=session,
        )
        if not self._call(FleetHttpClient.PushObject, request).stored:
            raise InvalidUpdate("push: the server did not take an object of the reply.")

    def _call(
        self, send: Callable[[FleetHttpClient, _Request], _Response], request: _Request
    ) -> _Response:
        while True:
            try:
                with _refusals():
                    return send(self._client, request)
            except httpx.TransportError as error:
                self.renew()
                raise self._not_reached(error) from None
            except _Busy as busy:
                # Jitter upwards alone: nobody comes back before the time that was named.
                if self._stop.wait(busy.retry_after_s * random.uniform(1.0, 1.5)):
                    raise Unreachable("the server is busy, and this process ends") from None

    def _not_reached(self, error: httpx.TransportError) -> Exception:
        if not _is_distrust(error):
            return Unreachable(f"{type(error).__name__}: {error}")
        if self._let_in:
            return Unproven(
                f"{self.kit.servers[0]}: what answers there does not prove to be this project's "
                f"server, or refuses this device without proof ({error}). It was let in before, so "
                "it keeps trying; if this lasts, the operator sees to the server's certificate and "
                "address."
            )
        return TrustError(
            f"connection: the two sides do not trust each other's certificates ({error}). This "
            "device takes no part; a kit belongs to one project, and is renewed with "
            "`fedcore provision renew`."
        )


class _Busy(Exception):
    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what HTTP says into the errors of this project."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        status, detail = error.response.status_code, _detail(error.response)
        if status in (429, 503):
            raise _Busy(_retry_after_s(error.response)) from None
        if status == 401:
            raise NotActivated(detail) from None
        kind = _REFUSED.get(status)
        if kind is None:
            raise Unreachable(f"HTTP {status}: {detail}") from None
        raise kind(detail) from None
    except ValueError as error:  # an answer that is no protobuf: a proxy's page, say
        raise Unreachable(str(error)) from None


def _is_distrust(error: BaseException | None) -> bool:
    """Whether TLS failed over a certificate, and not over the network."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        if isinstance(error, ssl.SSLError) and _CERTIFICATE_ALERT.search(str(error.reason)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _detail(response: httpx.Response) -> str:
    try:
        return str(json.loads(response.text)["detail"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered HTTP {response.status_code}"


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", "1")), 0.05), 60.0)
    except ValueError:
        return 1.0
