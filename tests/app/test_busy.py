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
from app.settings import Settings
from tests.app.test_served import until
from tests.conftest import JPEG, running

HEAD = b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: 1000000\r\n\r\n"


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
    with running(app) as port:
        held.began.clear()
        try:
            yield f"http://127.0.0.1:{port}", port, held
        finally:
            held.gate.set()


def test_a_full_server_refuses_before_it_reads_the_body(busy: tuple[str, int, Held], lesion: bytes) -> None:
    url, port, held = busy
    held.gate.clear()
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", port)) as other:
        first = pool.submit(httpx2.post, f"{url}/predict", content=lesion, headers=JPEG, timeout=20)
        assert held.began.wait(10)
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
