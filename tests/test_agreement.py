"""The bundled version: it loads, and HTTP agrees with `training.evaluate` on real images."""

import csv
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.model import store
from app.settings import Settings
from tests.conftest import NAME, ROOT, SHARED_DATA, needs_real_data

STORE = ROOT / "model_store"


def test_the_bundled_version_is_whole_and_good_enough() -> None:
    manifest = store.verify(STORE, NAME, store.current(STORE, NAME))
    assert manifest.metrics["roc_auc"].value >= 0.95
    assert manifest.metrics["accuracy"].value >= 0.88
    assert manifest.split.held_out_images > 500


@needs_real_data
def test_http_and_evaluate_agree_on_fifty_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.evaluate import main as evaluate

    monkeypatch.setenv("DERMLENS_DATA_DIR", str(SHARED_DATA))
    evaluate(["--store", str(STORE), "--csv", str(tmp_path / "held_out.csv")])
    with (tmp_path / "held_out.csv").open() as file:
        rows = list(csv.DictReader(file))[::10][:50]
    assert len(rows) == 50
    with TestClient(create_app(Settings(model_store=STORE))) as client:
        for row in rows:
            data = (SHARED_DATA / "isic2020" / "train" / row["name"]).read_bytes()
            answer = client.post("/predict", files={"file": ("x.jpg", data, "image/jpeg")}).json()
            assert answer["probabilities"]["malignant"] == pytest.approx(float(row["probability"]), abs=1e-3)
