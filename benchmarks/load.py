"""Load a server over HTTP/1.1 from one process, closed loop or open loop, and print what it answered as JSON.

.venv/bin/python benchmarks/load.py http://127.0.0.1:8000/predict FILE... --clients 16 --seconds 10
.venv/bin/python benchmarks/load.py http://127.0.0.1:8000/predict FILE... --rate 40 --seconds 30

Closed loop: each client sends its next request when the last is answered. Open loop: requests arrive at random
(Poisson) whether or not the server keeps up, and latency counts from the arrival.
"""

import argparse
import asyncio
import itertools
import json
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import numpy as np

BOUNDARY = "dermlens-benchmark"


class Broken(ConnectionError):
    """The server closed the connection before it had answered."""


def whole_head(received: bytes | bytearray) -> bytes | None:
    """The head of an answer, in lower case, once its body is there too."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower()
    if b"transfer-encoding: chunked" in head:
        return head if received.endswith(b"0\r\n\r\n") else None
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
    return head if len(received) - end - 4 >= int(length or 0) else None


def status_of(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time on it."""

    def __init__(self) -> None:
        self.head = b""  # of the last answer, in lower case
        self._answer: asyncio.Future[int] | None = None
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or Broken("closed before the answer"))

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def send(self, request: bytes) -> int:
        """The status of the answer, its body read."""
        if self._transport is None:
            raise Broken("closed")
        self._received.clear()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._answer is None or self._answer.done():
            return
        if (head := whole_head(self._received)) is not None:
            self.head = head
            self._answer.set_result(status_of(head))


@dataclass
class Load:
    """What a server made of a load."""

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # seconds, of 200s alone

    def summary(self) -> dict[str, object]:
        """Requests a second answered with 200, latencies in milliseconds, and how many answers had which status."""
        found: dict[str, object] = {"per_s": round(len(self.latencies) / self.seconds, 2)}
        if self.latencies:
            milliseconds = 1000 * np.array(self.latencies)
            found |= {f"p{q}_ms": round(float(np.percentile(milliseconds, q)), 2) for q in (50, 95, 99)}
        return found | {"failed": sum(self.statuses.values()) - self.statuses["200"], "statuses": dict(self.statuses)}


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    requests: Sequence[bytes]  # whole HTTP requests, sent in turn

    async def connect(self) -> Connection:
        _, protocol = await asyncio.get_running_loop().create_connection(Connection, self.host, self.port)
        return protocol


async def _one(target: Target, connection: Connection | None, request: bytes, load: Load, arrived: float) -> Connection:
    """Send on a live connection and record the outcome."""
    if connection is None or not connection.open:
        connection = await target.connect()
    try:
        status = str(await connection.send(request))
    except OSError:
        status = "connection"
    load.statuses[status] += 1
    if status == "200":
        load.latencies.append(time.perf_counter() - arrived)
    return connection


async def closed_loop(target: Target, *, clients: int, seconds: float) -> Load:
    """`clients` callers, each with a connection of its own, for `seconds`."""
    load, turn = Load(), itertools.cycle(target.requests)
    started = time.perf_counter()

    async def client() -> None:
        connection: Connection | None = None
        while (now := time.perf_counter()) - started < seconds:
            connection = await _one(target, connection, next(turn), load, now)
        if connection is not None:
            connection.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    load.seconds = time.perf_counter() - started
    return load


async def open_loop(target: Target, *, rate: float, seconds: float, seed: int = 0) -> Load:
    """Poisson arrivals of `rate` a second for `seconds`, each on an idle connection or a new one."""
    load, turn, idle = Load(), itertools.cycle(target.requests), list[Connection]()
    due, tasks = arrivals(rate, seconds, random.Random(seed)), set[asyncio.Task[None]]()  # noqa: S311
    started = time.perf_counter()

    async def request(arrived: float) -> None:
        connection = idle.pop() if idle else None
        idle.append(await _one(target, connection, next(turn), load, arrived))

    for at in due:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        task = asyncio.create_task(request(started + at))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - started
    for connection in idle:
        connection.close()
    return load


def arrivals(rate: float, seconds: float, source: random.Random) -> Iterator[float]:
    """Poisson: seconds from the start, `rate` of them a second on average."""
    at = source.expovariate(rate)
    while at < seconds:
        yield at
        at += source.expovariate(rate)


def raw(data: bytes) -> tuple[dict[str, str], bytes]:
    """The image as the body."""
    return {"content-type": "image/jpeg"}, data


def multipart(data: bytes, *, name: str = "file") -> tuple[dict[str, str], bytes]:
    """The image as a form field."""
    part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"; filename="x.jpg"\r\n'
    body = f"{part}Content-Type: image/jpeg\r\n\r\n".encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}, body


def triton(data: bytes) -> tuple[dict[str, str], bytes]:
    """The image as a BYTES tensor of the Open Inference Protocol's binary extension."""
    tensor = struct.pack("<I", len(data)) + data
    parameters = {"binary_data_size": len(tensor)}
    image = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": parameters}
    answer = {"name": "malignant", "parameters": {"binary_data": False}}
    head = json.dumps({"inputs": [image], "outputs": [answer]}).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    return headers, head + tensor


FORMATS: dict[str, Callable[[bytes], tuple[dict[str, str], bytes]]] = {
    "raw": raw,
    "multipart": multipart,
    "images": lambda data: multipart(data, name="images"),
    "triton": triton,
}


def http(method: str, path: str, *, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


def target_of(url: str, files: Sequence[Path], form: str) -> Target:
    """A request for each file, in the form that the server takes."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    forms = [FORMATS[form](file.read_bytes()) for file in files]
    requests = [http("POST", path, headers={"host": host} | headers, body=body) for headers, body in forms]
    return Target(host, port, requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="images, or folders of them")
    parser.add_argument("--clients", type=int, default=16, help="of the closed loop")
    parser.add_argument("--rate", type=float, help="requests a second: open loop instead")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--format", choices=FORMATS, default="raw")
    options = parser.parse_args()
    files = [f for path in options.files for f in (sorted(path.rglob("*.jpg"))[:64] if path.is_dir() else [path])]
    target = target_of(options.url, files, options.format)
    try:
        if options.rate:
            load = asyncio.run(open_loop(target, rate=options.rate, seconds=options.seconds))
        else:
            load = asyncio.run(closed_loop(target, clients=options.clients, seconds=options.seconds))
    except OSError as error:
        sys.exit(f"load: no server at {options.url}: {error}")
    print(json.dumps(load.summary()))


if __name__ == "__main__":
    main()
