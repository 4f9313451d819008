"""Clients that keep to no rule, over real sockets: each is told so or cut off, and the next one is served."""

import asyncio
import gzip
import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from app.main import create_app
from app.protocol import GuardedProtocol
from app.settings import Settings
from tests.conftest import running

SHORT_S = 0.3
LONG = 50_000_000  # more bytes than the buffers of two sockets
GOOD = b"GET /now HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = GOOD.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")


class Tiny(GuardedProtocol):
    """So that a test takes no time."""

    max_connections = 20
    max_head_bytes = 2_000
    max_headers = 10
    max_pipelined = 3
    max_unread_bytes = 1_000_000
    client_timeout_s = SHORT_S


class Patient(Tiny):
    """Where it is bytes that must end the connection, and not the time."""

    client_timeout_s = 50


class Spy:
    """An ASGI app: /now answers at once, /read after the body, /wait when the client leaves, /long much and late."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.left, self.done = threading.Event(), threading.Event()
        self.headers: list[list[tuple[bytes, bytes]]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        answer, path = b"ok", scope["path"]
        if path in ("/read", "/wait"):
            size, more = 0, True
            while more or path == "/wait":
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.left.set()
                    return
                size, more = size + len(message["body"]), message["more_body"]
            answer = str(size).encode()
        self.headers.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        if path == "/long":
            await send({"type": "http.response.body", "body": bytes(LONG), "more_body": True})
            await send({"type": "http.response.body", "more_body": True})  # waits until the client has taken most of it
            await asyncio.sleep(2 * SHORT_S)
        await send({"type": "http.response.body", "body": answer})
        self.done.set()


def talk(port: int, *pieces: bytes, end: bool = False) -> bytes:
    """All that the server says until it closes; `end` says that no more is coming."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        with suppress(ConnectionError):
            for piece in pieces:
                client.sendall(piece)
            if end:
                client.shutdown(socket.SHUT_WR)
        return rest(client)


def rest(client: socket.socket) -> bytes:
    said = bytearray()
    with suppress(ConnectionError):
        while chunk := client.recv(1_000_000):
            said += chunk
    return bytes(said)


def flood(port: int, head: bytes, piece: bytes, *, at_most: int = 60_000_000) -> bytes:
    """Send `piece` without end; the server must have hung up before `at_most` bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head)
        with suppress(ConnectionError):
            for _ in range(at_most // len(piece)):
                client.sendall(piece)
            raise AssertionError("the server reads on and on")
        return rest(client)


def trickle(port: int, head: bytes, piece: bytes, *, before: Callable[[socket.socket], object] = id) -> bytes:
    """Send `piece` now and then until the server says something or hangs up; all that it says."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(head)
        before(client)
        with suppress(ConnectionError):
            for _ in range(2_000):
                if select.select([client], [], [], SHORT_S / 20)[0]:
                    return rest(client)
                client.sendall(piece)
            raise AssertionError("the server waits on and on")
        return b""


def status(said: bytes) -> int:
    """Of the first answer."""
    return int(said.split(b" ", 2)[1])


def check_refusal(said: bytes, expected: int) -> None:
    """One problem, and the connection's last word."""
    head, _, body = said.partition(b"\r\n\r\n")
    headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    problem = json.loads(body)
    assert (status(said), problem["status"]) == (expected, expected)
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"connection"] == b"close"
    assert headers[b"x-request-id"].decode() == problem["request_id"]
    assert problem["type"] == f"urn:dermlens:problem:http-{expected}"
    assert problem["title"]
    assert problem["detail"]


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "uvloop":
        pytest.importorskip("uvloop")
    return str(request.param)


@pytest.fixture(scope="module")
def spy() -> Spy:
    return Spy()


@pytest.fixture(scope="module")
def tiny(spy: Spy, loop: str) -> Iterator[int]:
    with running(spy, http=Tiny, loop=loop) as port:
        yield port


@pytest.fixture(scope="module")
def patient(spy: Spy, loop: str) -> Iterator[int]:
    with running(spy, http=Patient, loop=loop) as port:
        yield port


@pytest.fixture
def port(spy: Spy, tiny: int) -> Iterator[int]:
    spy.forget()
    yield tiny
    assert status(talk(tiny, LAST)) == 200  # whatever happened, the next client is served


@pytest.fixture
def patient_port(spy: Spy, patient: int) -> Iterator[int]:
    spy.forget()
    yield patient
    assert status(talk(patient, LAST)) == 200


POST = b"POST /now HTTP/1.1\r\nhost: x\r\n"
READ = POST.replace(b"/now", b"/read")
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 3_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /" + b"a" * 3_000,
        b"GET /?" + b"a" * 300_000,
        GOOD[:-2] + b"a: " + b"b" * 3_000 + b"\r\n\r\n",
        GOOD[:-2] + b"a: " + b"b" * 3_000,
        GOOD[:-2] + b"a" * 3_000,
        GOOD[:-2] + b"a: b\r\n" * 10 + b"\r\n",
        GOOD[:-2] + b"a: b\r\n" * 10_000,
        READ + b"content-length: 5\r\na: " + b"b" * 2_000 + b"\r\n\r\nhello",
    ],
    ids=lambda head: f"{head[:30]!r} {len(head)}",
)
def test_a_head_of_too_many_bytes_or_lines_is_a_431(port: int, head: bytes) -> None:
    check_refusal(talk(port, head), 431)
    cut = len(head) // 2
    check_refusal(talk(port, head[:cut], head[cut:]), 431)


def test_a_head_within_the_limits_is_served(port: int) -> None:
    assert status(talk(port, LAST[:-2] + b"a: " + b"b" * 1_800 + b"\r\n\r\n")) == 200
    assert status(talk(port, LAST[:-2] + b"a: b\r\n" * 8 + b"\r\n")) == 200
    body = READ + b"connection: close\r\ncontent-length: 500000\r\n\r\n" + bytes(500_000)
    assert talk(port, body).endswith(b"500000\r\n0\r\n\r\n")


def test_a_client_still_sending_when_it_is_refused_is_not_reset(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /" + b"a" * 3_000)
        check_refusal(rest(client), 431)
        for _ in range(10):
            client.sendall(b"a" * 50_000)  # on a closed connection the second one is an error


@pytest.mark.parametrize("start", [GOOD[:-2], GOOD[:-2] + b"a: ", b"GET /"])
def test_a_head_without_end_is_cut_off(patient_port: int, start: bytes) -> None:
    assert flood(patient_port, start, b"a" * 65_536)[:12] in (b"", b"HTTP/1.1 431")


def test_a_client_that_says_nothing_is_cut_off(port: int) -> None:
    assert talk(port) == b""
    assert trickle(port, b"", b"\r\n") == b""


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\n", GOOD[:-2] + b"a: "])
def test_a_head_that_is_not_complete_in_time_is_a_408(port: int, start: bytes) -> None:
    check_refusal(talk(port, start), 408)
    check_refusal(trickle(port, start, b"a" if start != b"G" else b""), 408)


def test_the_second_request_of_a_connection_has_no_more_time_than_the_first(port: int) -> None:
    def ask(client: socket.socket) -> None:
        while not read_answer(client).endswith(b"ok\r\n0\r\n\r\n"):
            pass
        client.sendall(GOOD[:-2] + b"a: ")

    check_refusal(trickle(port, GOOD, b"a", before=ask), 408)


def read_answer(client: socket.socket) -> bytes:
    """One chunked answer."""
    said = b""
    while not said.endswith(b"0\r\n\r\n"):
        chunk = client.recv(65_536)
        assert chunk, said
        said += chunk
    return said


def test_a_body_may_take_longer_than_a_head(port: int) -> None:
    """Its time is the app's to measure."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(READ + b"content-length: 30\r\n\r\n")
        for _ in range(30):
            assert not select.select([client], [], [], SHORT_S / 15)[0]
            client.sendall(b"x")
        assert read_answer(client).endswith(b"30\r\n0\r\n\r\n")


def test_a_body_that_nobody_reads_may_end_and_the_connection_goes_on(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        for _ in range(3):
            client.sendall(POST + b"content-length: 300000\r\n\r\n")
            assert status(read_answer(client)) == 200
            client.sendall(bytes(300_000))


@pytest.mark.parametrize("framing", [b"content-length: 1000000000\r\n\r\n", CHUNKED + b"fffffff\r\n"])
def test_a_body_that_nobody_reads_holds_the_connection_for_a_short_time(port: int, framing: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(POST + framing)
        assert status(read_answer(client)) == 200
        with suppress(ConnectionError):
            for _ in range(2_000):
                client.sendall(b"x")
                if select.select([client], [], [], SHORT_S / 20)[0]:
                    assert client.recv(1) == b""
                    return
            raise AssertionError("the server waits on and on")


@pytest.mark.parametrize("framing", [b"content-length: 1000000000\r\n\r\n", CHUNKED + b"fffffff\r\n"])
def test_a_body_that_nobody_reads_has_few_bytes(patient_port: int, framing: bytes) -> None:
    flood(patient_port, POST + framing, bytes(65_536))


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (CHUNKED + b"5;", b"a" * 65_536),  # a chunk extension
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"a: b\r\n" * 10_000),  # trailers
        (CHUNKED + b"5\r\nhello\r\n0\r\na: ", b"b" * 65_536),
        (CHUNKED + b"5\r\nhello\r\n0\r\n", b"b" * 65_536),
    ],
)
def test_what_stands_around_the_chunks_of_a_body_is_bounded(
    patient_port: int, spy: Spy, start: bytes, piece: bytes
) -> None:
    said = flood(patient_port, READ + start, piece)
    assert said[:12] in (b"", b"HTTP/1.1 431")
    assert spy.left.wait(10)  # the app waits no longer for that body


def test_a_431_for_trailers_reaches_the_client(port: int) -> None:
    check_refusal(trickle(port, READ + CHUNKED + b"5\r\nhello\r\n0\r\na: ", b"b" * 1_500), 431)


def test_many_chunks_are_no_offence(port: int) -> None:
    body = b"1;a=b\r\nx\r\n" * 5_000 + b"0\r\n\r\n"
    assert talk(port, READ + b"connection: close\r\n" + CHUNKED + body).endswith(b"5000\r\n0\r\n\r\n")


def test_trailers_do_not_become_headers(port: int, spy: Spy) -> None:
    request = READ + b"connection: close\r\n" + CHUNKED + b"5\r\nhello\r\n0\r\nx-api-key: secret\r\n\r\n"
    assert status(talk(port, request)) == 200
    assert b"x-api-key" not in dict(spy.headers[0])


def test_requests_sent_ahead_are_answered_in_turn_up_to_a_limit(port: int) -> None:
    assert talk(port, GOOD * 2 + LAST).count(b"200 OK") == 3
    said = talk(port, GOOD * 5_000)
    assert 1 <= said.count(b"200 OK") <= 1 + Tiny.max_pipelined
    assert said.count(b"connection: close") == 1
    assert said.rindex(b"connection: close") > said.rindex(b"200 OK")  # on the last one, so that it can ask again


def test_requests_sent_ahead_of_a_long_answer_are_bounded(patient_port: int, spy: Spy) -> None:
    flood(patient_port, GOOD.replace(b"/now", b"/wait"), GOOD * 2_000)
    assert spy.left.wait(10)


def test_nonsense_behind_a_request_does_not_cost_its_answer(port: int) -> None:
    for behind in (b"\x00\x01\x02\r\n\r\n", GOOD[:-2] + b"a: b\r\n" * 20, b"GET /now\r\n\r\n"):
        said = talk(port, GOOD + behind)
        assert said.endswith(b"ok\r\n0\r\n\r\n")
        assert said.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in said


def test_nonsense_in_a_body_is_a_400_and_the_app_hears_that_the_client_left(port: int, spy: Spy) -> None:
    check_refusal(talk(port, READ + CHUNKED + b"5\r\nhello\r\nZZ\r\n"), 400)
    assert spy.left.wait(10)


def test_nonsense_in_a_body_after_the_answer_ends_the_connection_without_a_word(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(POST + CHUNKED)
        assert status(read_answer(client)) == 200
        client.sendall(b"ZZ\r\n")
        assert rest(client) == b""


def test_a_client_that_does_not_take_its_answer_is_cut_off(port: int, spy: Spy) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(LAST.replace(b"/now", b"/long"))
        assert spy.done.wait(10)
        assert len(rest(client)) < LONG


def test_a_client_that_takes_its_answer_may_wait_for_more_of_it(port: int) -> None:
    assert len(talk(port, LAST.replace(b"/now", b"/long"))) > LONG


def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(LAST.replace(b"/now", b"/long"))
        taken, started = 0, time.monotonic()
        while chunk := client.recv(1_000_000):
            taken += len(chunk)
            while taken > LONG / (3 * SHORT_S) * (time.monotonic() - started) and taken < LONG:
                time.sleep(SHORT_S / 100)  # as a slow line would
        assert taken > LONG


def test_a_client_that_leaves_in_the_middle_of_its_body_is_noticed(port: int, spy: Spy) -> None:
    assert talk(port, READ + b"content-length: 100\r\n\r\nhello", end=True) == b""
    assert spy.left.wait(10)


def test_connections_are_bounded(patient_port: int) -> None:
    held = [socket.create_connection(("127.0.0.1", patient_port), timeout=10) for _ in range(Tiny.max_connections)]
    for client in held:  # the server knows them all
        client.sendall(GOOD)
        assert status(read_answer(client)) == 200
    check_refusal(talk(patient_port), 503)
    for client in held:
        client.close()
    until_served(patient_port)


def until_served(port: int) -> None:
    for _ in range(500):
        if talk(port, LAST).startswith(b"HTTP/1.1 200"):
            return
    raise AssertionError("the server stays closed")


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c", b"nonsense"])
def test_an_upgrade_is_not_made_and_the_answer_is_the_last(port: int, upgrade: bytes) -> None:
    asked = GOOD[:-2] + b"connection: upgrade\r\nupgrade: " + upgrade + b"\r\nsec-websocket-key: YQ==\r\n\r\n"
    said = talk(port, asked + GOOD)
    assert said.startswith(b"HTTP/1.1 200")
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in said


@pytest.mark.parametrize(
    "request_",
    [
        READ + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        READ + b"content-length: 5\r\ncontent-length: 5\r\n\r\nhello",
        READ + b"content-length: 5, 6\r\n\r\nhello!",
        READ + b"content-length: 5\r\n" + CHUNKED + b"0\r\n\r\n",
        READ + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        READ + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        READ + b"transfer-encoding: gzip\r\n\r\nhello",
        READ + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        READ + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
        READ + b"content-length: -5\r\n\r\nhello",
        READ + b"content-length: +5\r\n\r\nhello",
        READ + b"content-length: 5 5\r\n\r\nhello",
        READ + b"content-length: 0x5\r\n\r\nhello",
        READ + b"content-length: " + b"9" * 40 + b"\r\n\r\nhello",
        READ + CHUNKED + b"-1\r\nhello\r\n",
        READ + CHUNKED + b"fffffffffffffffff\r\nhello",
        READ + CHUNKED + b"5\r\nhelloGET",
        GOOD[:-2] + b"a: b\0c\r\n\r\n",
        GOOD[:-2] + b"a: b\rc: d\r\n\r\n",
        GOOD[:-2] + b"a\x01: b\r\n\r\n",
        GOOD[:-2] + b" folded: b\r\n\r\n",
        GOOD[:-2] + b"no colon\r\n\r\n",
        GOOD[:-2] + b": no name\r\n\r\n",
        b"GET /now\r\n\r\n",  # HTTP/0.9
        b"GET /now HTTP/1.1 x\r\nhost: x\r\n\r\n",
        b"GET /now HTTP/3.7\r\nhost: x\r\n\r\n",
        b"GET /no w HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /n\xf6w HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET now HTTP/1.1\r\nhost: x\r\n\r\n",
        b"get /now HTTP/1.1\r\nhost: x\r\n\r\n",
        b"BREW /now HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # TLS
        b"\x00" * 1_000,
    ],
    ids=lambda request: repr(request[-60:]),
)
def test_what_is_not_http_is_a_400(port: int, request_: bytes) -> None:
    check_refusal(talk(port, request_), 400)


@pytest.fixture(scope="module")
def service(careful_store: Path) -> Iterator[int]:
    class Bounded(GuardedProtocol):
        client_timeout_s = 5

    settings = Settings(model_store=careful_store, max_batch=2, max_upload_bytes=1_000_000, max_batch_files=4)
    with running(create_app(settings), http=Bounded) as port:
        yield port


def ask(port: int, line: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    """One request on a connection of its own."""
    fields = [b"host: x", b"connection: close", b"content-length: %d" % len(body), *headers]
    return talk(port, line + b" HTTP/1.1\r\n" + b"\r\n".join(fields) + b"\r\n\r\n" + body)


def check_clean(said: bytes, *expected: int) -> None:
    """A problem as JSON; nothing that a client sent has become a header, or is taken for a page."""
    head, _, body = said.partition(b"\r\n\r\n")
    names = {line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:]}
    assert status(said) in expected, said
    assert b"application/problem+json" in head
    assert not names & {b"set-cookie", b"x-evil", b"location", b"refresh"}
    assert json.loads(body)["status"] == status(said)


@pytest.mark.parametrize(
    "line",
    [
        b"GET /../../etc/passwd",
        b"GET /..%2f..%2fetc/passwd",
        b"GET /%2e%2e/%2e%2e/etc/passwd",
        b"GET //etc/passwd",
        b"GET /livez%00",
        b"GET /%00",
        b"GET /%ff%fe",
        b"GET /%",
        b"GET /%0d%0aSet-Cookie:%20x=1",
        b"GET http://evil/nothing",
        b"GET /predict",
        b"TRACE /predict",
        b"PUT /predict",
        b"PROPFIND /predict",
        b"OPTIONS *",
        b"OPTIONS /predict",
    ],
)
def test_other_paths_and_methods_are_not_there(service: int, line: bytes) -> None:
    check_clean(ask(service, line), 404, 405)


def test_a_url_of_a_hundred_kilobytes_is_a_431(service: int) -> None:
    check_refusal(ask(service, b"GET /livez?" + b"a" * 100_000), 431)


def test_http_1_0_and_absolute_urls_are_served(service: int) -> None:
    assert status(talk(service, b"GET /livez HTTP/1.0\r\n\r\n")) == 200
    assert status(ask(service, b"GET http://x/livez")) == 200


CRLF = b"%0d%0aSet-Cookie:%20x=1%0d%0a%0d%0a<script>alert(1)</script>"


@pytest.mark.parametrize("parameter", [b"operating_point", b"coverage", b"target", b"style", b"method", b"alpha"])
def test_what_a_query_says_reaches_no_header_and_no_page(service: int, lesion: bytes, parameter: bytes) -> None:
    for value in (CRLF, b"%00", b"%ff", b"a" * 10_000, b"%ed%a0%80"):
        check_clean(ask(service, b"POST /explain?" + parameter + b"=" + value, body=lesion), 422)


@pytest.mark.parametrize("name", [b"x-timeout-ms", b"x-priority"])
@pytest.mark.parametrize("value", [b"\xff\xfe", b"-1", b"9" * 5_000, b"1e999", b"nan", b"<script>", b"%0d%0aX-Evil:1"])
def test_odd_values_of_our_headers_are_a_422(service: int, lesion: bytes, name: bytes, value: bytes) -> None:
    check_clean(ask(service, b"POST /predict", name + b": " + value, body=lesion), 422)


@pytest.mark.parametrize("value", [b"\xff\xfe", b"a b", b"a" * 65, b"%0d%0aX-Evil: 1", b"\ta\t<b>", b'"', b""])
def test_a_request_id_is_taken_only_if_it_is_plain(service: int, value: bytes) -> None:
    said = ask(service, b"GET /nothing", b"x-request-id: " + value)
    check_clean(said, 404)
    assert b"x-request-id: " + (value or b"\xff") not in said


def test_an_oversize_body_is_refused_before_it_is_sent(service: int, lesion: bytes) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\nexpect: 100-continue\r\n"
    said = talk(service, head + b"content-length: 100000000\r\n\r\n")
    check_clean(said, 413)
    assert b"100 Continue" not in said
    with socket.create_connection(("127.0.0.1", service), timeout=10) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(lesion))
        assert client.recv(1_000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(lesion)
        assert status(rest(client)) == 200


def test_a_client_sees_the_413_after_it_has_sent_its_whole_oversize_body(service: int) -> None:
    with socket.create_connection(("127.0.0.1", service), timeout=10) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 20000000\r\n\r\n" + bytes(20_000_000))
        client.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = rest(client)
    assert status(said) == 413
    assert b"HTTP/1.1 200 OK" in said


def test_a_body_of_unknown_length_is_read_no_further_than_the_limit(service: int) -> None:
    head = b"POST /predict HTTP/1.1\r\nhost: x\r\n" + CHUNKED
    said = flood(service, head, b"10000\r\n" + bytes(65_536) + b"\r\n", at_most=400_000_000)
    assert said == b"" or status(said) == 413


def test_a_compressed_body_is_not_an_image(service: int, lesion: bytes) -> None:
    for kind in (b"image/jpeg", b"application/gzip"):
        body = gzip.compress(lesion)
        headers = (b"content-encoding: gzip", b"content-type: " + kind)
        check_clean(ask(service, b"POST /predict", *headers, body=body), 400, 415)


@pytest.mark.parametrize("path", [b"/predict", b"/predict/batch", b"/explain"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"; boundary=cut", b"--cut\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n" * 5_000 + b"--cut--"),
        (b"; boundary=cut", b"--cut\r\n" + b"a: b\r\n" * 5_000 + b"\r\n1\r\n--cut--"),
        (
            b"; boundary=cut; charset=undefined",
            b"--cut\r\nContent-Disposition: form-data; name=file\r\n\r\n1\r\n--cut--",
        ),
        (b"; boundary=" + b"a" * 10_000, b"--" + b"a" * 10_000),
        (b"", b"--cut--"),
        (b"; boundary=cut", b"\xff" * 900_000),
    ],
    ids=["parts", "headers", "charset", "boundary", "no boundary", "noise"],
)
def test_a_form_that_makes_no_sense_is_a_4xx(service: int, path: bytes, kind: bytes, body: bytes) -> None:
    check_clean(ask(service, b"POST " + path, b"content-type: multipart/form-data" + kind, body=body), 400, 413, 415)


def test_after_all_this_the_service_still_answers(service: int, lesion: bytes) -> None:
    assert status(ask(service, b"POST /predict", b"content-type: image/jpeg", body=lesion)) == 200
