"""A shadow version that disagrees, hangs, fails or is not there, as those see it who ask the served one."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from app.engines.base import Output
from app.main import create_app
from app.model import store
from app.model.labels import calibrate
from app.model.manifest import Preprocessing
from app.settings import Settings
from tests.app.test_served import series, until
from tests.conftest import JPEG, NAME, Quick, encode, framed, make_manifest
from training.drawn import draw_lesion

Fault = Callable[[], object]
SERVED, SHADOW = "1", "2"


class Opinion(Quick):
    """Version V answers logits of 0 and V, but for a fault of version 2 alone once it is warm."""

    fault: Fault | None = None

    def run(self, images: NDArray[np.uint8]) -> Output:
        if self._value == float(SHADOW) and images.any() and Opinion.fault:
            Opinion.fault()
        logits = np.zeros((len(images), 2), dtype=np.float32)
        logits[:, 1] = self._value if self._value < 2 else -self._value
        return Output(logits, np.zeros((len(images), 2, 4, 4), dtype=np.float32))


@pytest.fixture
def root(small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Version 1, which is current and says malignant; 2, which says benign; and 3, which agrees with 2."""
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Opinion(version))
    root = small_store(SERVED, SHADOW, "3")
    store.promote(root, NAME, SERVED)
    yield root
    Opinion.fault = None


@contextmanager
def server(root: Path, **settings: Any) -> Iterator[TestClient]:
    fields: dict[str, Any] = {"model_store": root, "reload_ms": 1, "max_batch": 2, "shadow_version": SHADOW}
    with TestClient(create_app(Settings(**fields | settings))) as client:
        yield client


def ask(client: TestClient, image: bytes) -> dict[str, Any]:
    answer = client.post("/predict", content=image, headers=JPEG)
    assert answer.status_code == 200
    fields: dict[str, Any] = answer.json()
    del fields["request_id"]
    return fields


def test_a_shadow_that_disagrees_is_counted_and_changes_no_answer(root: Path, lesion: bytes) -> None:
    with server(root, shadow_version=None) as client:
        alone = ask(client, lesion)
        assert series(client, "dermlens_shadow_") == 0
    with server(root) as client:
        assert 'dermlens_shadow_dropped_total{reason="failed"} 0.0' in client.get("/metrics").text
        for number in range(1, 4):
            assert ask(client, lesion) == alone
            until(lambda number=number: series(client, "dermlens_shadow_pairs_total") == number, "scored")  # type: ignore[misc]
        pair = f'shadow="{SHADOW}",version="{SERVED}"'
        assert series(client, f'dermlens_shadow_disagreements_total{{label="malignant",{pair}}}') == 3
        mine, other = (calibrate(np.array([0, v], dtype=np.float32), 1.5)[1] for v in (1, -2))
        apart = series(client, f"dermlens_shadow_probability_difference_sum{{{pair}}}")
        assert apart == pytest.approx(3 * (mine - other))
        assert series(client, "dermlens_predictions_total") == 3  # of the served version alone
        assert series(client, "dermlens_shadow_dropped_total") == 0


def fail() -> None:
    raise RuntimeError("no memory")


def test_a_shadow_that_fails_is_counted_and_changes_no_answer(root: Path, lesion: bytes) -> None:
    with server(root) as client:
        before = ask(client, lesion)
        until(lambda: series(client, "dermlens_shadow_pairs_total") == 1, "scored")
        Opinion.fault = fail
        assert ask(client, lesion) == before
        until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="failed"}') == 1, "failed")
        Opinion.fault = None
        assert ask(client, lesion) == before
        until(lambda: series(client, "dermlens_shadow_pairs_total") == 2, "scored again")
        assert series(client, "dermlens_rejected_total") == 0


def test_a_shadow_that_hangs_delays_no_answer_and_no_end(root: Path, lesion: bytes) -> None:
    goes_on, hangs = threading.Event(), threading.Event()

    def hang() -> None:
        hangs.set()
        goes_on.wait(60)

    Opinion.fault = hang
    try:
        with server(root, stuck_ms=1500) as client:
            ask(client, lesion)
            assert hangs.wait(10)
            for _ in range(4):
                ask(client, lesion)
            until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="busy"}') == 3, "one waits, the rest go")
            time.sleep(2)  # the watchdog looks several times a limit
            assert client.get("/readyz").status_code == 200
            leaving = time.monotonic()
        assert time.monotonic() - leaving < 10
    finally:
        goes_on.set()


def test_a_shadow_that_hangs_keeps_an_image_no_longer_than_a_request_may_take(root: Path, lesion: bytes) -> None:
    goes_on = threading.Event()
    Opinion.fault = lambda: goes_on.wait(60)
    try:
        with server(root, timeout_ms=500) as client:
            ask(client, lesion)
            until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="deadline"}') == 1, "given up")
            assert series(client, "dermlens_dropped_total") == 0  # which counts what was accepted
    finally:
        goes_on.set()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_shadow_that_cannot_be_loaded_keeps_no_server_from_starting(
    root: Path, lesion: bytes, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    damage(root / NAME / SHADOW / store.WEIGHTS)
    with server(root) as client:
        assert ask(client, lesion)["label"] == "malignant"
        assert series(client, "dermlens_shadow_pairs_total") == 0
        assert series(client, 'dermlens_shadow_dropped_total{reason="not_loaded"}') == 1
    (record,) = (record for record in caplog.records if record.name == "app.main")
    assert "no shadow: version 2 cannot be loaded" in record.getMessage()


def test_a_reload_of_the_served_version_leaves_the_shadow_alone(root: Path, lesion: bytes) -> None:
    with server(root) as client:
        ask(client, lesion)
        store.promote(root, NAME, "3")
        until(lambda: ask(client, lesion)["model"]["version"] == "3", "version 3")
        until(lambda: series(client, f'dermlens_shadow_pairs_total{{shadow="{SHADOW}",version="3"}}') >= 1, "compared")
        assert ask(client, lesion)["label"] == "benign"
        agreed = f'dermlens_shadow_disagreements_total{{label="benign",shadow="{SHADOW}",version="3"}}'
        assert series(client, agreed) == 0
        assert series(client, f'dermlens_shadow_pairs_total{{shadow="{SHADOW}",version="{SERVED}"}}') >= 1


def test_it_sees_only_its_share(root: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([0.0, 0.29, 0.3, 0.99])
    monkeypatch.setattr("app.shadow.random.random", lambda: next(drawn))
    with server(root, shadow_share=0.3) as client:
        for _ in range(4):
            ask(client, lesion)
            time.sleep(0.02)
        until(lambda: series(client, "dermlens_shadow_pairs_total") == 2, "two of four")
        assert series(client, "dermlens_shadow_dropped_total") == 0


def other(**changes: Any) -> Callable[[Path], object]:
    weights = safetensors.numpy.save({"w": np.full(4, 4, dtype=np.float32)})
    return lambda root: store.publish(root, make_manifest("4", **changes), {store.WEIGHTS: weights})


@pytest.mark.parametrize(
    "publish",
    [
        other(classes=("nevus", "melanoma")),
        other(operating_points={"balanced": make_manifest().operating_points["balanced"]}),
        other(preprocessing=Preprocessing(size=64, resize="squash-bilinear", mean=(0, 0, 0), std=(1, 1, 1))),
    ],
    ids=["classes", "operating point", "size"],
)
def test_what_cannot_be_compared_is_not(root: Path, lesion: bytes, publish: Callable[[Path], object]) -> None:
    publish(root)
    with server(root, shadow_version="4") as client:
        answer = client.post("/predict?operating_point=sensitivity-95", content=lesion, headers=JPEG)
        assert answer.status_code == 200
        until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="incomparable"}') == 1, "told")
        assert series(client, "dermlens_shadow_pairs_total") == 0


@pytest.mark.parametrize("served_crops", [True, False])
def test_a_shadow_that_treats_frames_otherwise_is_compared_where_there_is_none(
    root: Path, lesion: bytes, served_crops: bool
) -> None:
    for version, crops in (("4", served_crops), ("5", not served_crops)):
        prepared = Preprocessing(size=224, resize="squash-bilinear", crop_frame=crops, mean=(0, 0, 0), std=(1, 1, 1))
        weights = safetensors.numpy.save({"w": np.full(4, 4, dtype=np.float32)})
        store.publish(root, make_manifest(version, preprocessing=prepared), {store.WEIGHTS: weights})
    store.promote(root, NAME, "4")
    with server(root, shadow_version="5") as client:
        ask(client, encode(framed(draw_lesion(1, 3))))
        until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="incomparable"}') == 1, "told")
        ask(client, lesion)
        until(lambda: series(client, "dermlens_shadow_pairs_total") == 1, "scored")


def test_who_waits_for_the_served_version_goes_first(
    root: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, runs = threading.Event(), threading.Semaphore(0)
    run = Opinion.run

    def slow(self: Opinion, images: NDArray[np.uint8]) -> Output:
        if self._value == float(SERVED) and images.any():
            runs.release()
            goes_on.wait(30)
        return run(self, images)

    monkeypatch.setattr(Opinion, "run", slow)
    with server(root, max_batch=1) as client, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, client, lesion) for _ in range(3)]
        assert runs.acquire(timeout=10)
        until(lambda: series(client, "dermlens_queue_depth") == 2, "two wait")
        goes_on.set()
        assert [task.result()["label"] for task in asked] == ["malignant"] * 3
        counted = ("dermlens_shadow_pairs_total", "dermlens_shadow_dropped_total")
        until(lambda: sum(series(client, name) for name in counted) == 3, "each is scored or dropped")
        assert series(client, 'dermlens_shadow_dropped_total{reason="busy"}') >= 1


def test_a_mean_of_several_passes_is_not_compared_with_one(root: Path, lesion: bytes) -> None:
    with server(root) as client:
        assert client.post("/predict?tta=flips", content=lesion, headers=JPEG).status_code == 200
        until(lambda: series(client, 'dermlens_shadow_dropped_total{reason="incomparable"}') == 1, "left out")
        assert series(client, "dermlens_shadow_pairs_total") == 0
