"""`dermlens serve` as a supervisor sees it: a real process and real signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from tests.conftest import JPEG, ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(store: Path, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A ready server and its address."""
    port = free_port()
    settings = (
        os.environ | {"DERMLENS_MODEL_STORE": str(store), "DERMLENS_PORT": str(port), "DERMLENS_MAX_BATCH": "1"} | more
    )
    command = [sys.executable, "-m", "app.cli", "serve"]
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx2.get(f"{url}/readyz").raise_for_status()
                break
            except httpx2.TransportError:
                time.sleep(0.05)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_was_accepted_and_ends_with_0(careful_store: Path, lesion: bytes, number: int) -> None:
    with serving(careful_store, DERMLENS_CPU_THREADS="1") as (process, url), ThreadPoolExecutor(1) as pool:
        # The first call for integrated gradients imports torch: seconds in which the signal comes
        slow = pool.submit(
            httpx2.post, f"{url}/explain?method=integrated-gradients", content=lesion, headers=JPEG, timeout=60
        )
        while "dermlens_in_flight_requests 2.0" not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.01)
        process.send_signal(number)
        assert slow.result().status_code == 200
        assert process.wait(10) == 0


def test_a_second_signal_ends_it_at_once(careful_store: Path, lesion: bytes) -> None:
    with serving(careful_store, DERMLENS_CPU_THREADS="1") as (process, url), ThreadPoolExecutor(1) as pool:
        slow = pool.submit(httpx2.post, f"{url}/explain?method=occlusion", content=lesion, headers=JPEG, timeout=60)
        while "dermlens_in_flight_requests 2.0" not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 1
        with suppress(httpx2.TransportError):
            assert slow.result().status_code == 500
