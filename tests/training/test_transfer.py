"""From a folder of three classes and a published version to /predict and /explain, without a line changed."""

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.model import store
from app.settings import Settings
from tests.conftest import NAME, ROOT, encode, make_manifest
from training.config import load_config
from training.drawn import draw_lesion
from training.export import main as export
from training.train import main as train

CLASSES = ("keratosis", "melanoma", "nevus")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind, name in enumerate(CLASSES):
        (tmp_path / "clinic" / name).mkdir(parents=True)
        for number in range(16):
            draw_lesion(kind, number, size=(96, 96)).save(tmp_path / "clinic" / name / f"{number}.png")
    return tmp_path / "clinic"


def test_three_classes_from_training_to_an_answer(folder: Path, random_weights: bytes, tmp_path: Path) -> None:
    config = tmp_path / "short.toml"
    text = (ROOT / "training" / "configs" / "smoke.toml").read_text()
    config.write_text(text.replace("epochs = 2", "epochs = 1").replace("size = 64", "size = 32"))
    start = make_manifest("7", training_config=load_config(config).model_dump(mode="json"))
    version = store.publish(tmp_path / "past", start, {store.WEIGHTS: random_weights})
    run, served = tmp_path / "run", tmp_path / "store"
    train(["--config", str(config), "--data", str(folder), "--init", str(version), "--run-dir", str(run)])
    export(["--run", str(run), "--store", str(served), "--promote"])
    manifest = json.loads((served / NAME / "1" / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert manifest["operating_points"] == {}
    assert set(manifest["metrics"]) == {"roc_auc", "log_loss", "ece", "accuracy", "balanced_accuracy"}
    assert set(manifest["abstention"]["0.95"]["quantiles"]) == set(CLASSES)
    assert "3" in (served / NAME / "1" / "DATA_CARD.md").read_text()
    image = encode(draw_lesion(1, 99, size=(120, 96)))
    with TestClient(create_app(Settings(model_store=served, engine="torch"))) as client:
        answer = client.post("/predict", content=image, headers={"content-type": "image/png"}).json()
        assert set(answer["probabilities"]) == set(CLASSES)
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)
        picture = client.post("/explain?target=nevus", content=image, headers={"content-type": "image/png"})
        assert picture.content.startswith(b"\x89PNG")


def test_a_folder_of_one_class_or_of_none_is_refused(folder: Path) -> None:
    config = load_config(ROOT / "training" / "configs" / "transfer.toml")
    data = config.with_data(folder).data
    assert (data.classes, data.lit_folds) == (list(CLASSES), ["root"])
    with pytest.raises(ValueError, match="0 sub-folders: one for each of 2 to 100 classes"):
        config.with_data(folder / "nevus")
    with pytest.raises(SystemExit, match="no folder"):
        train(["--config", str(ROOT / "training" / "configs" / "transfer.toml"), "--data", str(folder / "none")])
