"""Replacing the served version, and giving up on a device, as clients and supervisors see it."""

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from app.engines.base import DeviceLost, Output, context_lost
from app.engines.cuda_engine import CudaEngine
from app.main import create_app
from app.model import store
from app.served import Running
from app.settings import Settings
from tests.app.test_serve import free_port
from tests.conftest import JPEG, NAME, ROOT, Quick, make_manifest, make_rule


@pytest.fixture
def served(quick_store: Path) -> Iterator[Callable[[], tuple[TestClient, Path]]]:
    """A server that looks at its store all the time."""
    clients = []

    def open_client() -> tuple[TestClient, Path]:
        client = TestClient(create_app(Settings(model_store=quick_store, reload_ms=1, max_batch=1)))
        clients.append(client.__enter__())
        return client, quick_store

    yield open_client
    for client in clients:
        client.__exit__()


def version_of(client: TestClient, image: bytes) -> str:
    answer = client.post("/predict", content=image, headers=JPEG)
    assert answer.status_code == 200
    assert answer.headers["x-model-version"] == answer.json()["model"]["version"]
    return str(answer.json()["model"]["version"])


def until(condition: Callable[[], bool], what: str) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"never: {what}")


def series(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_what_is_promoted_in_the_store_is_served_without_a_restart(
    served: Callable[[], tuple[TestClient, Path]], lesion: bytes
) -> None:
    client, root = served()
    assert version_of(client, lesion) == "1"
    store.promote(root, NAME, "2")
    until(lambda: version_of(client, lesion) == "2", "version 2")
    assert 'version="2"' in client.get("/metrics").text
    assert [m["served"] for m in client.get("/models").json()["versions"]] == [False, True]


def test_two_hundred_promotions_under_load_fail_no_request_and_keep_no_old_version(
    served: Callable[[], tuple[TestClient, Path]], lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[weakref.ref[Running]] = []
    init = Running.__init__

    def remember(self: Running, *arguments: object, **named: object) -> None:
        init(self, *arguments, **named)  # type: ignore[arg-type]
        started.append(weakref.ref(self))

    monkeypatch.setattr(Running, "__init__", remember)
    client, root = served()
    stop, statuses = threading.Event(), list[int]()

    def load() -> None:
        while not stop.is_set():
            statuses.append(client.post("/predict", content=lesion, headers=JPEG).status_code)

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        for number in range(200):
            if number % 2:
                store.rollback(root, NAME)
            else:
                store.promote(root, NAME, "2")
            until(lambda number=number: len(started) == number + 2, f"change {number}")  # type: ignore[misc]
        stop.set()
        for task in loads:
            task.result()
    assert len(statuses) > 200
    assert set(statuses) == {200}
    until(lambda: gc.collect() >= 0 and sum(ref() is not None for ref in started) == 1, "old versions are freed")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / store.WEIGHTS).write_bytes(b"not these"), "SHA-256"),
        (lambda folder: (folder / store.WEIGHTS).unlink(), "missing"),
        (lambda folder: (folder / store.MANIFEST).write_text("{}"), "manifest.json"),
    ],
    ids=["corrupted", "missing", "wrong schema"],
)
def test_a_damaged_version_is_refused_once_and_the_old_one_serves_on(
    served: Callable[[], tuple[TestClient, Path]],
    lesion: bytes,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    reason: str,
) -> None:
    client, root = served()
    damage(root / NAME / "2")
    with caplog.at_level(logging.ERROR, "app.served"):
        (root / NAME / "new").write_text("2\n")  # as one does who does not use `promote`
        (root / NAME / "new").rename(root / NAME / "current")
        until(lambda: series(client, 'dermlens_reloads_total{outcome="refused"}') == 1, "refused")
        time.sleep(0.05)  # many looks at the store
    assert len(caplog.records) == 1
    assert reason in caplog.text
    assert version_of(client, lesion) == "1"
    assert client.get("/readyz").status_code == 200


def test_a_version_that_answers_no_finite_number_is_refused(
    served: Callable[[], tuple[TestClient, Path]], lesion: bytes
) -> None:
    client, root = served()
    weights = safetensors.numpy.save({"w": np.full(4, np.nan, dtype=np.float32)})
    store.publish(root, make_manifest("3"), {store.WEIGHTS: weights})
    store.promote(root, NAME, "3")
    until(lambda: series(client, 'dermlens_reloads_total{outcome="refused"}') == 1, "refused")
    assert version_of(client, lesion) == "1"
    store.promote(root, NAME, "2")
    until(lambda: version_of(client, lesion) == "2", "a good version after it")


def test_a_version_without_the_servers_defaults_is_refused(
    served: Callable[[], tuple[TestClient, Path]], lesion: bytes
) -> None:
    client, root = served()
    rules = {"0.90": make_rule(0, 0)}  # and the server's coverage is 0.95
    weights = safetensors.numpy.save({"w": np.ones(4, dtype=np.float32)})
    store.publish(root, make_manifest("3", abstention=rules), {store.WEIGHTS: weights})
    store.promote(root, NAME, "3")
    until(lambda: series(client, 'dermlens_reloads_total{outcome="refused"}') == 1, "refused")
    assert version_of(client, lesion) == "1"


SERVE_WITH_A_FAULT = """
import sys, threading
from app.cli import main
from app.engines.base import DeviceLost
from app.engines.openvino_engine import OpenVinoEngine
run = OpenVinoEngine.run
def broken(self, images):
    if images.any():  # warm-up runs on zeros
        {fault}
    return run(self, images)
OpenVinoEngine.run = broken
main(["serve"])
"""


@contextmanager
def faulty(root: Path, fault: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server whose forward passes do something else first."""
    port = free_port()
    settings = {"MODEL_STORE": str(root), "PORT": str(port), "STUCK_MS": "500", "MAX_BATCH": "1"}
    environment = os.environ | {f"DERMLENS_{name}": value for name, value in settings.items()}
    command = [sys.executable, "-c", SERVE_WITH_A_FAULT.format(fault=fault)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: answers(url), "the server answers")
        yield process, url
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("threading.Event().wait()", "a forward pass has taken more than 0.5 s"),
        ("raise DeviceLost('CUDA error: an illegal memory access was encountered')", "an illegal memory access"),
    ],
    ids=["stuck", "sticky CUDA error"],
)
def test_a_device_that_is_gone_turns_the_server_unready_and_ends_it(
    careful_store: Path, lesion: bytes, fault: str, reason: str
) -> None:
    with faulty(careful_store, fault) as (process, url), ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(httpx2.post, f"{url}/predict", content=lesion, headers=JPEG) for _ in range(2)]
        told = [answer.result() for answer in waiting]
        assert [answer.status_code for answer in told] == [503, 503]
        assert all(answer.headers["retry-after"] == "1" for answer in told)
        ready = httpx2.get(f"{url}/readyz")
        assert ready.status_code == 503
        assert reason in ready.json()["reason"]
        assert process.wait(10) == 70


def test_a_replaced_version_that_hangs_ends_the_server_and_keeps_it_from_nothing_else(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, goes_on, gone, run = threading.Event(), threading.Event(), list[str](), Quick.run

    def hang(self: Quick, images: NDArray[np.uint8]) -> Output:
        if self._value == 1 and images.any():  # warm-up runs on zeros
            hangs.set()
            goes_on.wait(60)
        return run(self, images)

    monkeypatch.setattr(Quick, "run", hang)
    settings = Settings(model_store=quick_store, reload_ms=1, max_batch=1, stuck_ms=1000)
    try:
        with ThreadPoolExecutor(1) as pool, TestClient(create_app(settings, on_failure=gone.append)) as client:
            waiting = pool.submit(client.post, "/predict", content=lesion, headers=JPEG)
            assert hangs.wait(10)
            store.promote(quick_store, NAME, "2")
            until(lambda: 'version="2"' in client.get("/metrics").text, "version 2")
            assert waiting.result().status_code == 503
            assert client.get("/readyz").status_code == 503
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 10
    finally:
        goes_on.set()
    assert gone == ["a forward pass has taken more than 1 s"]


def test_a_server_whose_device_is_gone_can_still_be_stopped(careful_store: Path, lesion: bytes) -> None:
    with faulty(careful_store, "threading.Event().wait()") as (process, url), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx2.post, f"{url}/predict", content=lesion, headers=JPEG)
        assert waiting.result().status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) in (0, 70)


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: invalid argument", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_errors_that_cuda_never_recovers_from_lose_the_device(message: str, lost: bool) -> None:
    class Slots:
        def take(self) -> None:
            raise RuntimeError(message)

    engine = CudaEngine.__new__(CudaEngine)
    engine._slots = Slots()  # type: ignore[assignment]
    with pytest.raises(RuntimeError) as error:
        engine.run(np.zeros((1, 3, 8, 8), dtype=np.uint8))
    assert isinstance(error.value, DeviceLost) == lost == context_lost(RuntimeError(message))
