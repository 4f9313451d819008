"""A server that has all the work it can do, over real connections."""

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

from app.engines.base import Output
from app.engines.openvino_engine import OpenVinoEngine
from app.main import create_app
from app.protocol import GuardedProtocol
from app.settings import Settings
from tests.app.test_served import until
from tests.conftest import JPEG, running

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: 1000000\r\n\r\n"


class Hasty(GuardedProtocol):
    client_timeout_s = 2  # a machine under load takes its time to answer


class Held:
    """The device, which waits until the test lets it go."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Event()


@pytest.fixture
def busy(careful_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int, Held]]:
    """A server with one place, its port, and its device."""
    held, run = Held(), OpenVinoEngine.run

    def wait(self: OpenVinoEngine, images: NDArray[np.uint8]) -> Output:
        held.began.set()
        held.gate.wait(10)
        return run(self, images)

    monkeypatch.setattr(OpenVinoEngine, "run", wait)
    app = create_app(Settings(model_store=careful_store, max_queue=1, max_batch=1, precision="float32"))
    with running(app, http=Hasty) as port:
        held.began.clear()
        try:
            yield f"http://127.0.0.1:{port}", port, held
        finally:
            held.gate.set()


def test_a_full_server_refuses_before_it_reads_the_body(busy: tuple[str, int, Held], lesion: bytes) -> None:
    url, port, held = busy
    held.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx2.post, f"{url}/predict", content=lesion, headers=JPEG, timeout=20)
        assert held.began.wait(10)
        # Not before: the server ends a connection that says nothing for client_timeout_s
        with socket.create_connection(("127.0.0.1", port)) as other:
            other.settimeout(10)
            other.sendall(HEAD)  # and nothing of the body
            answer = other.recv(4000).decode().lower()
        assert answer.startswith("http/1.1 503")
        assert "retry-after: 1" in answer
        held.gate.set()
        assert first.result().status_code == 200
    assert httpx2.post(f"{url}/predict", content=lesion, headers=JPEG).status_code == 200


def test_a_body_that_comes_slowly_keeps_nobody_out(busy: tuple[str, int, Held], lesion: bytes) -> None:
    url, port, _ = busy
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(HEAD + b"\xff\xd8")
        until(lambda: "dermlens_in_flight_requests 2.0" in httpx2.get(f"{url}/metrics").text, "the slow one came")
        assert httpx2.post(f"{url}/predict", content=lesion, headers=JPEG).status_code == 200


def test_a_batch_that_has_no_room_is_refused_as_a_whole(busy: tuple[str, int, Held], lesion: bytes) -> None:
    url, _, _ = busy
    two = [("files", ("a", lesion)), ("files", ("b", lesion))]
    answer = httpx2.post(f"{url}/predict/batch", files=two)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert httpx2.post(f"{url}/predict/batch", files=two[:1]).status_code == 200


@pytest.fixture
def full(busy: tuple[str, int, Held], lesion: bytes) -> Iterator[tuple[str, int]]:
    """The server while its one place is taken."""
    url, port, held = busy
    held.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx2.post, f"{url}/predict", content=lesion, headers=JPEG, timeout=20)
        assert held.began.wait(10)
        yield url, port
        held.gate.set()
        assert first.result().status_code == 200


def counted(url: str, sample: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{sample} "))


def test_who_is_refused_before_the_app_hears_what_the_app_would_say(full: tuple[str, int], lesion: bytes) -> None:
    url, _ = full
    headers = JPEG | {"X-Request-ID": "mine-1"}
    early = httpx2.post(f"{url}/explain", content=lesion, headers=headers)
    # A page of elsewhere gets its answer from the app, through CORS
    late = httpx2.post(f"{url}/explain", content=lesion, headers=headers | {"Origin": "https://x.test"})
    assert early.json() == late.json()
    assert early.json()["request_id"] == "mine-1"
    assert (early.status_code, late.status_code) == (503, 503)
    differ = {"date", "content-length"}
    assert {k: v for k, v in early.headers.items() if k not in differ} == {
        k: v for k, v in late.headers.items() if k not in differ
    }
    assert counted(url, 'dermlens_requests_total{route="/explain",status="503"}') == 2
    assert counted(url, 'dermlens_rejected_total{reason="queue-full"}') == 2
    assert counted(url, 'dermlens_request_seconds_count{route="/explain"}') == 2


def test_a_mistake_is_still_named_by_a_full_server(full: tuple[str, int], lesion: bytes) -> None:
    url, _ = full
    assert httpx2.post(f"{url}/predict", content=lesion, headers=JPEG | {"X-Timeout-Ms": "soon"}).status_code == 422
    assert httpx2.get(f"{url}/predict").status_code == 405
    assert httpx2.get(f"{url}/livez").status_code == 200


def test_a_refused_connection_goes_on_to_its_next_request(full: tuple[str, int]) -> None:
    _, port = full
    post = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: 3\r\n\r\nabc"
    get = b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(10)
        sock.sendall(post + post + get)
        answers = b"".join(iter(lambda: sock.recv(65_536), b"")).decode()
    assert [part[:3] for part in answers.split("HTTP/1.1 ")[1:]] == ["503", "503", "200"]


def test_a_refused_request_that_ends_its_connection_ends_it(full: tuple[str, int]) -> None:
    _, port = full
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(10)
        sock.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(65_536), b"")).decode().lower()
    assert answer.startswith("http/1.1 503")
    assert "connection: close" in answer


def test_a_refused_client_that_never_ends_its_body_is_cut_off(full: tuple[str, int]) -> None:
    _, port = full
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.settimeout(10)
        sock.sendall(HEAD)
        assert sock.recv(65_536).startswith(b"HTTP/1.1 503")
        sock.sendall(bytes(1000))
        assert sock.recv(65_536) == b""
