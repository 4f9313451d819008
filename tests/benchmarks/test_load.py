"""The client that every server is measured with: it must count what happened and wait for whole answers."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from load import Target, closed_loop, multipart, open_loop, raw, target_of, triton

from tests.conftest import ROOT

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    return await reader.readexactly(length)


def serve_and(handler: Handler, use: Callable[[int], Awaitable[None]]) -> None:
    """`use` a server by its port, while `handler` answers; a connection ends with its handler or its client."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
            await writer.wait_closed()

    async def run() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        async with server:
            await use(server.sockets[0].getsockname()[1])
            await asyncio.sleep(0.05)  # the handlers see that their clients left

    asyncio.run(run())


def target(port: int) -> Target:
    return Target("127.0.0.1", port, [b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc"])


def answering(body: bytes, *, delay: float = 0.0, pieces: int = 1) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await read_request(reader) == b"abc":
            await asyncio.sleep(delay)
            for part in np.array_split(np.frombuffer(body, dtype=np.uint8), pieces):
                writer.write(part.tobytes())
                await writer.drain()
                await asyncio.sleep(0)

    return handler


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize("answer", [WHOLE, CHUNKED], ids=["length", "chunked"])
def test_an_answer_in_pieces_is_one_answer(answer: bytes) -> None:
    async def use(port: int) -> None:
        load = await closed_loop(target(port), clients=2, seconds=0.2)
        assert load.statuses["200"] == len(load.latencies) > 2
        assert load.summary()["failed"] == 0

    serve_and(answering(answer, delay=0.01, pieces=4), use)


def test_latency_is_at_least_what_the_server_took() -> None:
    async def use(port: int) -> None:
        load = await closed_loop(target(port), clients=1, seconds=0.3)
        assert min(load.latencies) >= 0.05
        assert len(load.latencies) <= 6

    serve_and(answering(WHOLE, delay=0.05), use)


def test_refusals_and_broken_connections_are_failures_and_have_no_latency() -> None:
    turn = 0

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal turn
        while await read_request(reader):
            turn += 1
            if turn % 3 == 0:
                return
            status = b"503 Busy" if turn % 3 == 1 else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n")

    async def use(port: int) -> None:
        load = await closed_loop(target(port), clients=1, seconds=0.2)
        assert set(load.statuses) == {"200", "503", "connection"}
        assert len(load.latencies) == load.statuses["200"]
        assert load.summary()["failed"] == load.statuses["503"] + load.statuses["connection"]

    serve_and(handler, use)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    async def use(port: int) -> None:
        load = await open_loop(target(port), rate=100, seconds=0.5)
        assert 25 <= load.statuses["200"] <= 80  # one client at a time would manage two
        assert min(load.latencies) >= 0.25

    serve_and(answering(WHOLE, delay=0.25), use)


def test_each_form_carries_the_image_whole() -> None:
    image = b"\xff\xd8 not really \xff\xd9"
    for form in (raw, multipart, triton):
        headers, body = form(image)
        assert image in body
        assert headers["content-type"]
    headers, body = triton(image)
    assert body[int(headers["inference-header-content-length"]) :][4:] == image


def test_a_request_goes_to_the_path_that_was_asked_for() -> None:
    path = ROOT / "docs" / "images" / "drawn.png"
    (request,) = target_of("http://127.0.0.1:8123/explain?style=heatmap", [path], "raw").requests
    assert request.startswith(b"POST /explain?style=heatmap HTTP/1.1\r\n")
    assert request.endswith(path.read_bytes())
