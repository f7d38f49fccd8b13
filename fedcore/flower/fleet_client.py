"""A device's client of the Fleet API, over Flower's HTTP client and the device's certificate."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedcore.crypto.certificates import SKEW
from fedcore.crypto.kit import Kit, client_context, load_kit
from fedcore.errors import CertificateRefused, FedcoreError, InvalidUpdate
from fedcore.flower.fleet_bundle import check_bundle, contents_of, packed_reply
from fedcore.flower.fleet_errors import (
    Busy,
    Unreachable,
    is_certificate_error,
    minute_text,
    not_reached,
    refusals,
    untrusted_text,
)
from fedcore.flower.fleet_pull import AnnouncedMessage, BoundedClient, announced_in, read_content
from fedcore.rpc.hello import BUNDLES, WAKE_PORT, next_request_header, reason_header
from fedcore.rpc.jitter import spread_s

log = logging.getLogger("fedcore.device")

HEARTBEAT_S = 1800
"""Heartbeat interval announced to Flower, its maximum. fedcore detects offline nodes elsewhere, and
sooner."""
_TIMEOUT_S = 90.0
_CONNECT_S = 10.0
"""Seconds that one address may take to connect, if the kit has others."""
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
_BUSY_S, _BUSY_GROWTH, _LAST_BUSY_S = 0.05, 1.1, 30.0
"""Least seconds before a busy server is asked again: initially, growth factor, maximum. A server
that is always busy would otherwise set the rate of requests."""
_BUSY_TOLD = 30
"""Number of busy responses after which the device logs a warning."""
_ACTIVATE = "/flwr.proto.Fleet/ActivateNode"
_PUSHES = 3
"""Most attempts at one reply, if the server drops its partial state."""
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class FleetLink:
    """Calls the Fleet API as one node. Safe for use from several threads.

    A busy server states when to retry, and the call waits. If the server cannot be reached, the
    link rereads the kit, and uses a renewed one from then on. It tries the kit's addresses in turn,
    and continues with the one that works.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        headers: Mapping[str, str],
        stop: threading.Event,
        was_admitted: bool = False,
        passed: Callable[[int], None] | None = None,
        ended: str = "",
    ) -> None:
        """Creates a link; opens no connection yet.

        Args:
            kit: The device's identity and the server's addresses.
            headers: Headers of every request.
            stop: When set, ends a wait for a busy server.
            was_admitted: Whether the server has ever admitted this device: the kit is right then,
                so a peer that cannot prove to be the server is a temporary failure.
            passed: Callback after each request with the bytes transferred; may block.
            ended: Why this device's process before ended; told when this one is activated.
        """
        self.kit = kit
        """The identity in use."""
        self._let_in = was_admitted
        self._headers = dict(headers)
        self._stop = stop
        self._passed = passed
        self._ended = ended
        self._server = kit.servers[0]
        self._clients = {self._server: self._connect(kit, self._server)}
        self._distrusted = set[str]()
        """Untrusted addresses that were logged since another address worked."""
        self._before: list[BoundedClient] = []
        """Clients of earlier kits, still open: another thread may be using one."""
        self._renewing = threading.Lock()
        self._unusable = ""
        self._last: httpx.Timeout | None = None
        """Timeout of the last call, once this process ends; nothing waits for retries then."""
        self._node = Node()
        self._bundles = False
        """Whether the server that activated this process takes and sends bundles."""
        self.wake_port = 0
        """Port of the server's wake stream; known once `activate` has returned."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Adds the headers to a request, and reads the server's offers from the response."""
        context.request.headers.update(self._headers)
        if context.rpc_method == _ACTIVATE:
            context.request.headers.update(reason_header(self._ended))
        if self._last is not None:
            context.request.extensions["timeout"] = self._last.as_dict()
        elif len(self.kit.servers) > 1:
            context.request.extensions["timeout"]["connect"] = _CONNECT_S
        response = call_next(context)
        if context.rpc_method == _ACTIVATE:
            self._bundles = response.headers.get(BUNDLES) == "1"
        port = response.headers.get(WAKE_PORT, "")
        if port.isdecimal() and len(port) <= 5 and int(port) < 2**16:
            self.wake_port = int(port)
        return response

    def _moved(self, count: int) -> None:
        if self._passed is not None and self._last is None:
            self._passed(count)

    @property
    def node_id(self) -> int:
        """The id of this device's node; 0 before `activate`."""
        return self._node.node_id

    def activate(self) -> None:
        """Tells the server that this process is online."""
        request = ActivateNodeRequest(public_key=self.kit.public, heartbeat_interval=HEARTBEAT_S)
        self._node = Node(node_id=self._call(FleetHttpClient.ActivateNode, request).node_id)
        self._let_in, self._ended = True, ""

    def deactivate(self, timeout_s: float, reason: str = "", *, node_id: int = 0) -> None:
        """Tells the server that this process ends; each network step may take ``timeout_s``.

        Args:
            timeout_s: Timeout of each network step.
            reason: Why it ends; empty if as usual.
            node_id: The node, if another link has activated it.
        """
        self._last = httpx.Timeout(timeout_s)
        self._headers |= reason_header(reason)
        request = DeactivateNodeRequest(node_id=node_id or self.node_id)
        self._call(FleetHttpClient.DeactivateNode, request)

    def heartbeat(self, again_s: float) -> None:
        """Tells the server that this process is online, and will call again in ``again_s`` seconds.

        Later requests repeat the promise, until the next heartbeat.
        """
        self._headers |= next_request_header(again_s)
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_S)
        self._call(FleetHttpClient.SendNodeHeartbeat, request)

    def settings(self, run_id: int) -> dict[str, str]:
        """Returns the settings of a run that the server sends to devices."""
        answer = self._call(FleetHttpClient.GetRun, GetRunRequest(node=self._node, run_id=run_id))
        with _readable():
            settings = run_from_proto(answer.run).override_config
        return {key: str(value) for key, value in settings.items()}

    def announced(self) -> AnnouncedMessage | None:
        """Returns the next message for this node, without its content; None if there is none."""
        request, contents = PullMessagesRequest(node=self._node), dict[str, bytes]()
        if self._bundles:
            bundle = self._call(BoundedClient.pull_bundle, request)
            with _readable():
                check_bundle(bundle)
                answer = PullMessagesResponse.FromString(bundle.call)
            contents = contents_of(bundle)
        else:
            answer = self._call(FleetHttpClient.PullMessages, request)
        with _readable():
            return announced_in(answer, contents)

    def fetch(
        self,
        announced: AnnouncedMessage,
        *,
        limit_bytes: int,
        kept: Callable[[str], bytes | None] = lambda object_id: None,
    ) -> Message:
        """Fetches a message with its content; objects that ``kept`` returns are not pulled.

        Raises:
            OwnerLimit: it takes more than ``limit_bytes``; nothing of that size was allocated.
            InvalidUpdate: it is no message of a fedcore server, or the server has deleted it.
        """
        metadata, came = announced.message.metadata, announced.contents

        def pull(object_id: str, max_bytes: int) -> bytes:
            found = came.get(object_id) or kept(object_id)
            return found or self._pull(metadata.run_id, object_id, max_bytes)

        content = read_content(announced, pull, limit_bytes=limit_bytes)
        return make_message(metadata=metadata, content=content)

    def answer(self, reply: Message) -> None:
        """Sends a reply until the server has all of it: small objects at once, others one by one.

        Raises:
            InvalidUpdate: the server rejects the reply, for example because it is late.
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
        small = packed_reply(begin, objects.values()) if self._bundles else None
        for left in reversed(range(_PUSHES)):
            if small is not None and small.objects:
                asked = self._call(BoundedClient.push_bundle, small)
            else:
                asked = self._call(FleetHttpClient.PushMessages, begin)
            wanted = set(asked.objects_to_push)
            try:
                for object_id in objects:
                    if object_id in wanted:
                        self._push(reply, asked.session_id, object_id, objects[object_id].deflate())
            except InvalidUpdate:
                if not left:
                    raise
                continue  # the server dropped it, or it is late: the next attempt tells which
            return

    def close(self) -> None:
        """Closes all connections."""
        for client in (*self._clients.values(), *self._before):
            client.close()

    def address(self, turn: int) -> str:
        """Returns the address that worked last; with a ``turn`` above 0, one of those after it."""
        servers, here = self.kit.servers, self._server
        return servers[((servers.index(here) if here in servers else 0) + turn) % len(servers)]

    def renew(self) -> bool:
        """Rereads the kit, and uses it from now on if it has changed; returns whether it has.

        An invalid kit is logged, and the current one stays in use until it expires.

        Raises:
            CertificateRefused: the current certificate has expired, and the kit on disk is invalid.
        """
        with self._renewing:
            try:
                kit = load_kit(self.kit.folder)
                if (kit.public, kit.role) != (self.kit.public, self.kit.role):
                    raise CertificateRefused(
                        f"{kit.folder}: the kit there now belongs to another identity, the "
                        f"{kit.role} {kit.name!r}. This process keeps its own identity; restart "
                        "it to switch."
                    )
            except FedcoreError as error:
                self._keep(error)
                return False
            if kit == self.kit:
                return False
            server = self._server if self._server in kit.servers else kit.servers[0]
            client = self._connect(kit, server)
            self._before += self._clients.values()
            self._clients, self._server, self.kit = {server: client}, server, kit
            self._unusable = ""
        log.info("certificate renewed: valid until %s UTC", minute_text(kit.not_after))
        return True

    def _keep(self, error: FedcoreError) -> None:
        """Keeps the current kit and logs why; raises if it has expired."""
        if datetime.now(UTC) > self.kit.not_after + SKEW:
            raise CertificateRefused(
                f"{self.kit.folder}: this device's certificate expired on "
                f"{minute_text(self.kit.not_after)} UTC, and no valid one was installed since "
                f"({error}). The device does not take part; have the operator run `fedcore "
                "provision renew`, install the new kit with `fedcore client install`, and start "
                "it again."
            ) from None
        if str(error) != self._unusable:
            self._unusable = str(error)
            log.warning("the kit on disk is not used: %s", error)

    def _connect(self, kit: Kit, server: str) -> BoundedClient:
        return BoundedClient(
            server,
            interceptor=self,
            verify=client_context(kit),
            timeout_s=_TIMEOUT_S,
            stopped=self._stop.is_set,
            moved=self._moved,
        )

    def _pull(self, run_id: int, object_id: str, max_bytes: int) -> bytes:
        request = PullObjectRequest(node=self._node, run_id=run_id, object_id=object_id)
        answer = self._call(lambda client, asked: client.pull_object(asked, max_bytes), request)
        if not answer.object_available:
            raise InvalidUpdate(
                "pull: the server no longer has the message that it announced. It was skipped."
            )
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
            raise InvalidUpdate("push: the server did not accept an object of the reply.")

    def _call(
        self, send: Callable[[BoundedClient, _Request], _Response], request: _Request
    ) -> _Response:
        failed: dict[str, httpx.TransportError] = {}
        times = 0
        while True:
            with self._renewing:
                server = self._server
                client = self._clients[server]
            try:
                with refusals(let_in=self._let_in):
                    return send(client, request)
            except httpx.TransportError as error:
                self.renew()
                failed[server] = error
                if not self._turn(failed, error):
                    raise not_reached(
                        failed, expires=self.kit.not_after, admitted=self._let_in
                    ) from None
            except Busy as busy:
                times += 1
                if times == _BUSY_TOLD:
                    log.warning("the server keeps answering that it is busy; retrying")
                least_s = min(_LAST_BUSY_S, _BUSY_S * _BUSY_GROWTH ** min(times, 100))
                # Jitter only upwards: never retry before the time that the server stated.
                if self._stop.wait(spread_s(max(busy.retry_after_s, least_s), 1.0, 1.5)):
                    raise Unreachable("the server is busy, and this process is stopping") from None

    def _turn(self, failed: Mapping[str, Exception], error: Exception) -> bool:
        """Switches to an address that has not failed; returns whether to repeat the call."""
        unsent = isinstance(error, _NOT_SENT) or is_certificate_error(error)
        if self._last is not None or not unsent:
            return False  # the server may have received the request: the caller must decide
        with self._renewing:
            left = [server for server in self.kit.servers if server not in failed]
            if not left:
                return False
            if self._server in failed:  # else another thread has already switched
                if left[0] not in self._clients:
                    self._clients[left[0]] = self._connect(self.kit, left[0])
                self._server = left[0]
            unproven = {
                server: why
                for server, why in failed.items()
                if server not in self._distrusted and is_certificate_error(why)
            }
            self._distrusted |= set(unproven)
        if unproven:
            log.warning("%s. Trying the kit's other addresses", untrusted_text(unproven))
        return True


@contextmanager
def _readable() -> Iterator[None]:
    """Turns exceptions of Flower's parsers on a malformed response into `Unreachable`."""
    try:
        yield
    except Exception as error:  # they fail in many ways on malicious bytes
        raise Unreachable(
            f"cannot read the server's response ({type(error).__name__}: {error})"
        ) from None
