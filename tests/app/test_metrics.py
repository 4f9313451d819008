"""What is counted, as a scrape finds it."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from app.engines.base import DeviceMemory
from app.main import create_app
from app.model import store
from app.settings import Settings
from tests.conftest import JPEG, NAME, Quick, running

Scrape = dict[tuple[str, ...], float]  # name and label values -> value


def read(text: str) -> Scrape:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


def scrape(client: TestClient) -> Scrape:
    return read(client.get("/metrics").text)


@pytest.fixture
def quick(quick_store: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(model_store=quick_store, reload_ms=0))) as client:
        yield client


def test_a_prediction_is_counted_with_its_probability_and_what_its_image_is_like(
    quick: TestClient, lesion: bytes
) -> None:
    answer = quick.post("/predict", content=lesion, headers=JPEG).json()
    found = scrape(quick)
    assert found["dermlens_predictions_total", answer["label"], "1"] == 1
    assert found["dermlens_positive_probability_count", "1"] == 1
    assert found["dermlens_positive_probability_sum", "1"] == pytest.approx(answer["probabilities"]["malignant"])
    assert found["dermlens_image_side_pixels_sum",] == 240
    assert 0.2 < found["dermlens_image_brightness_ratio_sum",] < 0.9
    assert 0 < found["dermlens_image_saturation_ratio_sum",] < 1
    assert found["dermlens_image_sharpness_sum",] > 1


def test_what_is_no_image_has_no_likeness(quick: TestClient) -> None:
    assert quick.post("/predict", content=b"no image", headers=JPEG).status_code == 400
    found = scrape(quick)
    assert found["dermlens_image_side_pixels_count",] == 0
    assert found["dermlens_rejected_total", "not-an-image"] == 1


def test_every_stage_of_a_request_has_its_duration(quick: TestClient, lesion: bytes) -> None:
    assert quick.post("/explain", content=lesion, headers=JPEG).status_code == 200
    found = scrape(quick)
    for stage in ("read", "decode", "queue", "batch", "forward", "render"):
        assert found["dermlens_stage_seconds_count", stage] == 1


def test_what_has_not_happened_yet_is_zero_and_not_missing(quick: TestClient) -> None:
    found = scrape(quick)
    for name, *labels in (
        ("dermlens_rejected_total", "queue-full"),
        ("dermlens_rejected_total", "internal-error"),
        ("dermlens_dropped_total", "deadline"),
        ("dermlens_reloads_total", "refused"),
        ("dermlens_predictions_total", "malignant", "1"),
        ("dermlens_referred_total", "1"),
        ("dermlens_refer_reasons_total", "quality", "1"),
        ("dermlens_positive_probability_count", "1"),
    ):
        assert found[(name, *labels)] == 0


def test_a_start_says_how_long_each_step_took(quick: TestClient) -> None:
    found = scrape(quick)
    assert all(found["dermlens_start_seconds", step] > 0 for step in ("load", "build", "warm_up"))


def test_requests_that_no_route_sees_are_counted(quick_store: Path) -> None:
    with running(create_app(Settings(model_store=quick_store))) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
        assert httpx2.get(f"http://127.0.0.1:{port}/nowhere").status_code == 404
        found = read(httpx2.get(f"http://127.0.0.1:{port}/metrics").text)
    for status in ("400", "404"):
        assert found["dermlens_requests_total", "unmatched", status] == 1
        assert found["dermlens_rejected_total", f"http-{status}"] == 1


class WithMemory(Quick):
    """As on a GPU."""

    def memory(self) -> DeviceMemory:
        return DeviceMemory(used_bytes=3_000, total_bytes=80_000)


def test_a_device_with_memory_of_its_own_says_how_much_is_used(
    quick_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"1": WithMemory, "2": Quick}
    monkeypatch.setattr("app.main.build_engine", lambda _, loaded, **__: kinds[loaded.manifest.version](loaded))
    with TestClient(create_app(Settings(model_store=quick_store, reload_ms=20))) as client:
        found = scrape(client)
        assert found["dermlens_device_memory_bytes", "used"] == 3_000
        assert found["dermlens_device_memory_bytes", "total"] == 80_000
        store.promote(quick_store, NAME, "2")
        while (found := scrape(client))["dermlens_reloads_total", "served"] < 2:
            time.sleep(0.02)
        assert not [key for key in found if key[0] == "dermlens_device_memory_bytes"]
