"""Attacks below the calls: handshakes, TLS, HTTP/2 and connections, on every port of fedcore.

::

    python -m tests.campaign.network --seconds 6 --connections 3000

Each service runs in a process of its own, whose memory, processor time and open files are looked
at. While an attack goes on, from one address, a member at another one asks again and again; it must
be answered, the service must not grow without bound, and it must be as before in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedcore.crypto.kit import Kit, load_kit
from fedcore.rpc.delivery import method
from fedcore.rpc.delivery_pb2 import MetadataRequest
from tests.campaign.http2 import call, dial, key_updates, opening, stuffed
from tests.delivering import HOST, Delivering

ATTACKER, MEMBER = "127.0.0.2", "127.0.0.1"
MOST_GROWTH_BYTES = 192 << 20
LEAST_ANSWERED = 0.8
SETTLED_S = 45.0
"""So long after an attack its connections may take to be gone."""
_UNANSWERED = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
INFER = "/inference.GRPCInferenceService/"


@dataclass(frozen=True)
class Port:
    """A port under attack."""

    service: str
    number: int
    h2: bool
    paths: tuple[str, ...] = ()
    """Calls of gRPC that are attacked, the first of them harmless."""

    @property
    def name(self) -> str:
        return f"{self.service}:{'grpc' if self.h2 else 'http'}"


@dataclass
class Process:
    """A service in a process of its own."""

    ports: list[Port]
    pid: int

    def memory_bytes(self) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def files(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())


def serve_delivery(folder: Path) -> None:
    """The delivery service alone."""
    from fedcore.crypto.roster import load_server_identity
    from server.delivery.serve import DeliveryAddress, serve_until_stopped

    identity = load_server_identity(folder / "server")
    repository, address = folder / "repository", DeliveryAddress(HOST, 0)
    paths = (method("GetMetadata"), method("Watch"))

    def started(port: int) -> None:
        _say([("delivery", port, True, paths)])

    serve_until_stopped(identity, repository, address, on_report=None, started=started)


def serve_inference(folder: Path) -> None:
    """The server of inference, with a kit."""
    from edge_client.serving.access import open_access
    from edge_client.serving.run import Addresses, ServeSettings, serve
    from tests.serving import open_product, store_of

    access = open_access(HOST, folder / "server")
    store = store_of(folder / "store", {"product": 1})

    def started(addresses: Addresses) -> None:
        over_grpc, over_http = (
            int(each.rpartition(":")[2]) for each in (addresses.grpc, addresses.http)
        )
        paths = (INFER + "ServerMetadata", INFER + "ModelStreamInfer")
        _say([("serving", over_grpc, True, paths), ("serving", over_http, False, ())])

    settings = ServeSettings(store=store, grpc_port=0, http_port=0)
    asyncio.run(serve(settings, access, open_product, started=started))


def serve_rounds(folder: Path) -> None:
    """Both ports of a server of rounds, without any."""
    from fedcore.crypto.roster import load_server_identity
    from fedcore.rpc.hello import Hello
    from server.live.network.serve import Address, listen

    async def main() -> None:
        identity, hello = load_server_identity(folder / "server"), Hello("tiny", "0" * 64)
        async with listen(
            identity, hello, Address(HOST, 0, 0), settings={"run": "{}"}, spool=folder / "spool"
        ) as listening:
            bound = listening.address
            paths = ("/fedcore.wake.v1.Wake/Nothing", "/fedcore.wake.v1.Wake/Watch")
            _say([("rounds", bound.wake_port, True, paths), ("rounds", bound.port, False, ())])
            await asyncio.Event().wait()

    asyncio.run(main())


SERVICES: dict[str, Callable[[Path], None]] = {
    "delivery": serve_delivery,
    "inference": serve_inference,
    "rounds": serve_rounds,
}


def _say(ports: list[tuple[str, int, bool, tuple[str, ...]]]) -> None:
    sys.stdout.write(json.dumps(ports) + "\n")
    sys.stdout.flush()


@contextmanager
def started(kind: str, folder: Path) -> Iterator[Process]:
    """Runs a service until exit."""
    words = [sys.executable, "-m", "tests.campaign.network", "--serve", kind, str(folder)]
    # This module imports gRPC, which reads its ciphers then.
    environment = os.environ | {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES128-GCM-SHA256"}
    with (folder / f"{kind}.log").open("w") as log:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (folder / f"{kind}.log").read_text()
        yield Process(
            [Port(one, at, h2, tuple(paths)) for one, at, h2, paths in json.loads(line)],
            process.pid,
        )
    finally:
        process.terminate()
        process.wait(20)


def asked(kit: Kit, port: Port) -> float | None:
    """Seconds that a member's call takes, with its handshake; None if it fails."""
    began_s = time.monotonic()
    try:
        if port.h2:
            credentials = grpc.ssl_channel_credentials(
                kit.authority_pem, kit.key_pem(), kit.certificate_pem
            )
            options = (("grpc.use_local_subchannel_pool", 1),)
            with grpc.secure_channel(f"{HOST}:{port.number}", credentials, options) as channel:
                message = MetadataRequest(name="timestamp.json").SerializeToString()
                try:
                    for _ in channel.unary_stream(port.paths[0])(message, timeout=5.0):
                        break
                except grpc.RpcError as error:
                    if error.code() in _UNANSWERED:
                        return None
                return time.monotonic() - began_s
        with dial(kit, port.number, MEMBER, h2=False) as connection:
            connection.settimeout(5.0)
            connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n")
            return time.monotonic() - began_s if connection.recv(100) else None
    except OSError:
        return None


def _mute(kit: Kit, port: Port, folder: Path) -> socket.socket:
    return socket.create_connection((HOST, port.number), 5, source_address=(ATTACKER, 0))


def _half(kit: Kit, port: Port, folder: Path) -> socket.socket:
    one = _mute(kit, port, folder)
    one.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    return one


def _idle(kit: Kit, port: Port, folder: Path) -> socket.socket:
    one = dial(kit, port.number, ATTACKER, h2=port.h2)
    if port.h2:
        one.sendall(opening(0))
    return one


def _untaken(kit: Kit, port: Port, folder: Path) -> socket.socket:
    one = dial(kit, port.number, ATTACKER, h2=port.h2)
    if port.h2:
        message = MetadataRequest(name="timestamp.json").SerializeToString()
        calls = (call(2 * n + 1, port.paths[n % len(port.paths)], message) for n in range(4))
        one.sendall(opening(0) + b"".join(calls))
    else:
        one.sendall(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\n\r\n" * 6)
    return one


def _updating(kit: Kit, port: Port, folder: Path) -> socket.socket:
    one = dial(kit, port.number, ATTACKER, h2=port.h2)
    one.sendall(opening(0) if port.h2 else b"GET /v2 HTTP/1.1\r\n")
    one.setblocking(True)
    for number in range(2000):
        key_updates(one, 20)
        one.sendall(b"\0\0\0\x04\0\0\0\0\x07" if port.h2 else b"a%d: b\r\n" % (number % 10))
    return one


def _chained(kit: Kit, port: Port, folder: Path) -> socket.socket:
    context = stuffed(kit, folder, 90_000)
    return dial(kit, port.number, ATTACKER, h2=port.h2, context=context)


def _too_chained(kit: Kit, port: Port, folder: Path) -> socket.socket:
    context = stuffed(kit, folder, 2_000_000)
    one = dial(kit, port.number, ATTACKER, h2=port.h2, context=context)
    one.recv(1)  # TLS 1.3 tells a client of a refusal after its handshake
    return one


ATTACKS: dict[str, Callable[[Kit, Port, Path], socket.socket]] = {
    "mute": _mute,
    "half a hello": _half,
    "idle after the handshake": _idle,
    "answers not taken": _untaken,
    "key updates": _updating,
    "chains of 90 kB": _chained,
    "chains of 2 MB": _too_chained,
}


@dataclass
class Row:
    """What an attack did."""

    port: str
    attack: str
    made: int
    most_open: int
    grown_bytes: int
    cpu_share: float
    answered: float
    slowest_s: float
    settled_s: float

    @property
    def text(self) -> str:
        return (
            f"{self.port:<14} {self.attack:<25} {self.made:>6} made, {self.most_open:>5} open, "
            f"{self.grown_bytes / 2**20:>5.0f} MiB, {self.cpu_share:>5.0%} CPU, "
            f"{self.answered:>4.0%} answered, slowest {self.slowest_s:.2f} s, gone in "
            f"{self.settled_s:.1f} s {'; '.join(self.faults)}"
        )

    @property
    def faults(self) -> list[str]:
        found = []
        if self.grown_bytes > MOST_GROWTH_BYTES:
            found.append(f"grew by {self.grown_bytes >> 20} MiB")
        if self.answered < LEAST_ANSWERED:
            found.append(f"answered {self.answered:.0%} of a member's calls")
        if self.settled_s > SETTLED_S:
            found.append("its connections stayed open")
        return found


def attacked(
    process: Process,
    port: Port,
    attack: str,
    kits: list[Kit],
    folder: Path,
    *,
    seconds: float,
    most: int,
) -> Row:
    """Attacks a port for some seconds, with so many connections at a time."""
    files, memory, cpu_s = process.files(), process.memory_bytes(), process.cpu_s()
    over, made, tries = threading.Event(), [0] * 4, list[float | None]()
    began_s = time.monotonic()

    def attacking(worker: int) -> None:
        with ExitStack() as stack:
            held: list[socket.socket] = []
            while not over.is_set():
                with suppress(OSError):
                    one = ATTACKS[attack](kits[0], port, folder)
                    stack.callback(one.close)
                    held.append(one)
                    made[worker] += 1
                if len(held) > most // 4:
                    held.pop(0).close()

    threads = [threading.Thread(target=attacking, args=(one,)) for one in range(4)]
    for thread in threads:
        thread.start()
    open_files, grown = 0, 0
    while time.monotonic() - began_s < seconds:
        tries.append(asked(kits[1], port))
        open_files = max(open_files, process.files() - files)
        grown = max(grown, process.memory_bytes() - memory)
        time.sleep(0.2)
    lasted_s = time.monotonic() - began_s
    share = (process.cpu_s() - cpu_s) / lasted_s
    over.set()
    for thread in threads:
        thread.join()
    ended_s = time.monotonic()
    while process.files() > files + 8 and time.monotonic() - ended_s <= SETTLED_S:
        time.sleep(0.2)
    taken = [one for one in tries if one is not None]
    return Row(
        port.name,
        attack,
        sum(made),
        open_files,
        grown,
        share,
        len(taken) / len(tries),
        max(taken, default=float("nan")),
        time.monotonic() - ended_s,
    )


def main() -> int:
    """Runs all attacks on all ports, prints a table, and returns 1 if one did harm."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of an attack")
    parser.add_argument("--connections", type=int, default=3000, help="open at a time")
    parser.add_argument("--only", default="", help="attacks or services with this in their name")
    options = parser.parse_args()
    if options.serve:
        SERVICES[options.serve[0]](Path(options.serve[1]))
        return 0
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    harmed = 0
    with tempfile.TemporaryDirectory(prefix="fedcore-network-") as name:
        folder = Path(name)
        project = Delivering(folder)
        kits = [load_kit(project.device(each)) for each in ("edge-0", "edge-1")]
        (folder / "repository" / "metadata").mkdir(parents=True)
        (folder / "repository" / "metadata" / "timestamp.json").write_bytes(b"x" * 300_000)
        for kind in SERVICES:
            with started(kind, folder) as process:
                for port in process.ports:
                    for attack in ATTACKS:
                        if options.only not in f"{port.name} {attack}":
                            continue
                        row = attacked(
                            process,
                            port,
                            attack,
                            kits,
                            folder,
                            seconds=options.seconds,
                            most=options.connections,
                        )
                        harmed += bool(row.faults)
                        print(
                            row.text,
                            flush=True,
                        )
    return int(harmed > 0)


if __name__ == "__main__":
    sys.exit(main())
