"""A device's training session: pulls messages, runs the installed app, sends signed replies."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from flwr.app import Error, Message, MessageType

from edge_client.agent.ended import WAITING, Activity, reason_of
from edge_client.agent.run import DeviceSetup, OpenRun, open_run
from edge_client.agent.wake import Signals, TokenBucket, keep_stream_open
from fedcore.client_app import error_of
from fedcore.crypto.keys import load_key
from fedcore.errors import ConfigError, FedcoreError, InvalidUpdate
from fedcore.files import sha256_hex
from fedcore.flower.fleet_client import FleetLink
from fedcore.flower.fleet_errors import DeviceRejected, NotActivated, Unreachable
from fedcore.flower.fleet_pull import AnnouncedMessage
from fedcore.observability.foreign import foreign
from fedcore.privacy.accounting import noise_searches
from fedcore.rpc.hello import hello_of
from fedcore.rpc.jitter import spread_s
from fedcore.updates.messages import REFUSED
from fedcore.updates.seal import sign_reply

log = logging.getLogger("fedcore.device")

_FIRST_PAUSE_S, _LAST_PAUSE_S, _REFUSED_PAUSE_S = 0.2, 30.0, 600.0
"""Pauses between two attempts: the first, the longest while the server is unreachable, and the
longest while the server refuses this device."""
_LAST_S = 1.0
"""Timeout at shutdown: for the stream's thread to end, and for each step of the last request."""
_LOOK_S = 60.0
"""Longest time between two pulls: the delay if the stream loses a wake-up call."""
MESSAGE_S, MESSAGE_BURST = 0.02, 1000
"""Rate limit on answers to messages: seconds per message in the long run, and burst size."""
IDLE_MESSAGES = 50
"""How many messages one without work counts as: declined, failed or answered before. A server
could make a device decline messages in a tight loop, which no limit on training bounds."""
SEARCH_S, SEARCH_BURST = 300.0, 64
"""Rate limit on searches for noise: seconds per search in the long run, and burst size."""


@dataclass
class SearchLimit:
    """Rate limit on searches for the noise of ``auto``, which take up to ten seconds of CPU.

    A server could ask for another noise in each message, and have the device decline all of them.
    """

    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(SEARCH_S, SEARCH_BURST))
    counted: int = field(default_factory=noise_searches)

    def wait_s(self) -> float:
        """Takes the searches since the last call; returns the seconds to wait before a message."""
        before, self.counted = self.counted, noise_searches()
        return self.bucket.wait_s(self.counted - before)


def run_device(device: DeviceSetup, signals: Signals) -> None:
    """Answers the server's messages until ``signals.stop`` is set.

    Retries forever while the server is unreachable, with pauses that grow to 30 s. Once the server
    has admitted this device, the same applies if the server can no longer prove its identity; if
    it refuses the device, the pauses grow to 10 minutes.

    Raises:
        TrustError: the server has never admitted this device, or the certificate has expired.
        DeviceError: the server rejects the device's version of protocol, app or task; the message
            states what to install. Or the folder belongs to another identity.
    """
    instance = device.instance
    link = FleetLink(
        device.kit,
        headers=hello_of(device.task.name, device.task_path).headers(instance),
        stop=signals.stop,
        was_admitted=device.folder.was_admitted(device.kit.public),
        passed=device.passed,
        ended=device.ended,
    )
    watcher = threading.Thread(
        target=keep_stream_open,
        args=(instance, link, signals, device.passed),
        name="wake",
        daemon=True,
    )
    runs: dict[int, OpenRun] = {}
    messages = TokenBucket(MESSAGE_S, MESSAGE_BURST)
    searches, reason = SearchLimit(), ""
    try:
        _retry(lambda: _activate(link, signals), signals)
        device.folder.record_admission(device.kit.public)
        watcher.start()
        while not signals.stop.is_set():
            _retry(
                lambda: _answer_messages(device, link, signals, runs, messages, searches), signals
            )
    except BaseException as error:
        reason = reason_of(error)
        raise
    finally:
        signals.stop.set()
        signals.work.set()
        signals.reconnect.set()
        if watcher.is_alive():
            watcher.join(timeout=_LAST_S)
        _deactivate(link, reason)
        link.close()


def warm_up() -> None:
    """Runs a tiny training step: torch imports modules lazily, and no round should wait for it."""
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.sum().backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD([weight]).step()


def _retry(work: Callable[[], None], signals: Signals) -> None:
    """Calls ``work`` until it succeeds in reaching the server, or ``signals.stop`` is set."""
    failures, logged = Counter[float](), set[type[Exception]]()
    while not signals.stop.is_set():
        last_s = _LAST_PAUSE_S
        try:
            return work()
        except NotActivated:
            signals.activate.set()
        except (Unreachable, InvalidUpdate) as error:
            refused = isinstance(error, DeviceRejected | InvalidUpdate)
            if type(error) not in logged:
                what = "retrying" if refused else "the server cannot be reached"
                log.warning("%s: %s", what, error)
            logged.add(type(error))
            if refused:
                last_s = _REFUSED_PAUSE_S
            signals.work.set()  # pull the unfinished message again
        failures[last_s] += 1  # counted apart: a refusal after a long outage retries soon
        longest = min(last_s, _FIRST_PAUSE_S * 1.25 ** min(failures[last_s], 100))
        signals.stop.wait(spread_s(longest, 0.5, 1.0))
    return None


def _activate(link: FleetLink, signals: Signals) -> None:
    signals.activate.clear()
    link.activate()
    log.info("activated as node %d", link.node_id)
    signals.reconnect.set()
    signals.work.set()


def _answer_messages(
    device: DeviceSetup,
    link: FleetLink,
    signals: Signals,
    runs: dict[int, OpenRun],
    messages: TokenBucket,
    searches: SearchLimit,
) -> None:
    """Waits for a wake-up call, then answers all messages.

    Answers at most at the rate of ``messages``, and searches for noise at that of ``searches``.
    """
    signals.work.wait(_LOOK_S)
    if signals.stop.is_set():
        return
    if signals.activate.is_set():
        _activate(link, signals)
    activity = Activity(device.folder.path)
    signals.work.clear()
    try:
        while not signals.stop.wait(searches.wait_s()) and (found := link.announced()) is not None:
            signals.last_message, signals.busy = time.monotonic(), True
            kind = foreign(found.message.metadata.message_type, 20)
            activity.begin(f"it answered a message to {kind}")
            try:
                worked = _answer_or_reject(device, link, signals, runs, found)
            finally:
                activity.begin(WAITING)
                signals.last_message, signals.busy = time.monotonic(), False
            signals.stop.wait(messages.wait_s(1 if worked else IDLE_MESSAGES))
        if device.between_rounds is not None and runs:
            runs.clear()
            device.between_rounds()
    except InvalidUpdate as error:  # its round has ended: no retry can help
        log.info("update rejected by server: %s", error)
        signals.stop.wait(max(_FIRST_PAUSE_S, messages.wait_s(IDLE_MESSAGES)))
        signals.work.set()


def _answer_or_reject(
    device: DeviceSetup,
    link: FleetLink,
    signals: Signals,
    runs: dict[int, OpenRun],
    found: AnnouncedMessage,
) -> bool:
    """Answers a message; if the server rejects the reply, sends an error in its place.

    Without an answer, the next pull would return the message again.

    Returns:
        Whether the app ran and succeeded, and the server accepted the reply.
    """
    try:
        return _answer(device, link, signals, runs, found)
    except InvalidUpdate as error:
        reason = f"client {device.kit.name!r}: the server rejected its reply: {error}"
        link.answer(Message(Error(REFUSED + error.exit_code, reason), reply_to=found.message))
        log.warning("update rejected by server: %s", error)
        return False


def _answer(
    device: DeviceSetup,
    link: FleetLink,
    signals: Signals,
    runs: dict[int, OpenRun],
    found: AnnouncedMessage,
) -> bool:
    """Runs the app on a message, or finds the stored reply; signs the reply and sends it.

    Guarantee:
        Privacy charges, then the reply with the new state, are on disk before a reply is sent.

    Returns:
        Whether the app ran and succeeded.
    """
    kind, started = found.message.metadata.message_type, time.monotonic()
    run_id = found.message.metadata.run_id
    try:
        run = runs.get(run_id) or open_run(device, link, signals, run_id)
        if run.ledger is not None and run.ledger.scan_data():  # new files: more charges may count
            run = open_run(device, link, signals, run_id)
        kept = device.folder.kept(run.name).get
        message = link.fetch(found, limit_bytes=run.max_bytes, kept=kept)
        device.folder.keep_frozen(run.name, message.content)
    except FedcoreError as error:
        if isinstance(error, InvalidUpdate):
            raise
        log.warning("run %d: does not take part: %s", run_id, error)
        # Only errors about the server's own settings go to it in full. Others may quote file names
        # (which may name people), the privacy spent or the owner's policy.
        hide = not isinstance(error, ConfigError)
        reply = Message(Error(*error_of(device.kit.name, error, hide=hide)), reply_to=found.message)
        link.answer(reply)
        return False
    runs.clear()
    runs[run_id] = run
    key = sha256_hex(f"{run.digest} {kind} {message.content.object_id}".encode())
    content, again = device.folder.reply(key, run.context.state), True
    if content is None:
        reply, again = _app_reply(device, run, message), False
        _store_reply(device, run, key, reply)
        if run.ledger is not None and run.ledger.scan_data():  # files were added during training
            runs.clear()
    else:
        reply = Message(content, reply_to=message)
    if reply.has_error():  # logged before it is sent: sending may fail
        log.info("%s %s: declined or failed: %s", run.name, kind, reply.error.reason)
    else:
        sign_reply(
            reply.content,
            message.content,
            purpose=kind,
            run_id=run.digest,
            node_id=link.node_id,
            key=load_key(device.kit.key_path),
            now_s=time.time(),
        )
    link.answer(reply)
    outcome = "error sent" if reply.has_error() else "sent again" if again else "done"
    log.info("%s %s: %s in %.2f s", run.name, kind, outcome, time.monotonic() - started)
    _log_remaining_rounds(run, kind)
    return not again and not reply.has_error()


def _app_reply(device: DeviceSetup, run: OpenRun, message: Message) -> Message:
    """Returns the app's reply to a message, or an error reply if the app raises.

    The app itself handles failures of the task. A strategy's mods around it do not check a server's
    numbers, so they may raise anything. Charges made until then remain in the state.
    """
    try:
        reply = run.app(message, run.context)
        if isinstance(reply, Message):
            return reply
        raise TypeError(f"its reply was a {type(reply).__name__}")
    except (Exception, SystemExit) as error:
        kind = message.metadata.message_type
        refused = InvalidUpdate(
            f"{kind}: this strategy's client mods failed on the server's message: "
            f"{type(error).__name__}: {error}. Nothing was sent, and the privacy spent stays "
            "charged; check the options of federation.strategy on the server."
        )
        hide = run.ledger is not None
        return Message(Error(*error_of(device.kit.name, refused, hide=hide)), reply_to=message)


def _log_remaining_rounds(run: OpenRun, kind: str) -> None:
    """Logs how many more training rounds fit in the privacy budget; does nothing without one."""
    if run.ledger is None or run.durable is None or kind != MessageType.TRAIN:
        return
    try:
        room = run.ledger.remaining_rounds(run.context.state, run.durable.others)
    except (FedcoreError, ArithmeticError, ValueError) as error:  # informative only
        log.warning("%s: cannot compute how many more rounds fit the budget: %s", run.name, error)
        return
    if room is not None:
        log.info("%s: the budget allows %s like the latest", run.name, room)


def _store_reply(device: DeviceSetup, run: OpenRun, key: str, reply: Message) -> None:
    """Writes a reply to disk before it is sent. Its charge was written before training started."""
    state = run.context.state
    if not reply.has_error():
        device.folder.store_reply(run.name, state, key, reply.content)
    elif run.ledger is not None:  # raises if the charge still cannot be written
        run.ledger.commit(state)


def _deactivate(link: FleetLink, reason: str) -> None:
    try:
        if link.node_id:
            link.deactivate(_LAST_S, reason)
    except (FedcoreError, ConnectionError) as error:
        log.debug("cannot tell the server that this device ends: %s", error)
