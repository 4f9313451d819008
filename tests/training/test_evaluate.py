from pathlib import Path

import numpy as np
import pytest

from app.model import store
from app.model.labels import calibrate
from tests.conftest import ROOT, make_manifest
from training.config import Data, load_config
from training.data import load_dataset
from training.drawn import draw_lesion
from training.evaluate import (
    all_metrics,
    calibration_error,
    calibration_floor,
    decision_metrics,
    main,
    multiclass_metrics,
    ranking_metrics,
    served_logits,
    with_intervals,
)
from training.report import read_rows

LABELS = np.array([0, 0, 0, 1, 1])
PROBABILITIES = np.array([0.1, 0.2, 0.7, 0.6, 0.9])


def test_ranking_metrics_by_hand() -> None:
    found = ranking_metrics(LABELS, PROBABILITIES)
    assert found["roc_auc"] == pytest.approx(5 / 6)
    assert found["pr_auc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.04 + 0.49 + 0.16 + 0.01) / 5)


def test_decision_metrics_by_hand() -> None:
    found = decision_metrics(LABELS, PROBABILITIES >= 0.65)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            "balanced_accuracy": 7 / 12,
            "precision": 1 / 2,
            "sensitivity": 1 / 2,
            "specificity": 2 / 3,
            "f1": 1 / 2,
        }
    )


def test_decision_metrics_where_nothing_is_positive() -> None:
    found = decision_metrics(LABELS, PROBABILITIES > 1)
    assert (found["precision"], found["sensitivity"], found["f1"], found["specificity"]) == (0, 0, 0, 1)


def test_calibration_error_is_nought_where_shares_match_and_the_gap_where_not() -> None:
    labels = np.tile([0, 0, 0, 1], 150)
    assert calibration_error(labels, np.full(600, 0.25)) == pytest.approx(0, abs=0.02)
    assert calibration_error(labels, np.full(600, 0.65)) == pytest.approx(0.4, abs=1e-9)


def test_intervals_hold_their_value_and_shrink_with_data() -> None:
    rng = np.random.default_rng(1)

    def width(size: int) -> float:
        labels = rng.integers(0, 2, size)
        scores = (labels * 0.3 + rng.random(size)) / 1.3
        metric = with_intervals(all_metrics, labels, scores, scores > 0.5)["roc_auc"]
        assert metric.low <= metric.value <= metric.high
        return metric.high - metric.low

    assert width(1000) < width(100) / 2


def test_multiclass_metrics_by_hand() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 1, 1, 2, 1])
    found = multiclass_metrics(labels, np.eye(3)[predicted] * 0.7 + 0.1, predicted)
    assert found["accuracy"] == found["balanced_accuracy"] == pytest.approx(5 / 6)
    # One class against the rest: perfect; one of four others tied with the two; one of two below, tied with the rest
    assert found["roc_auc"] == pytest.approx((1 + 7 / 8 + 3 / 4) / 3)


def test_a_hundred_small_classes_have_intervals() -> None:
    labels = np.repeat(np.arange(100), 2)
    found = with_intervals(lambda y, _, d: {"accuracy": float((y == d).mean())}, labels, np.zeros(200), labels)
    assert found["accuracy"].value == found["accuracy"].low == 1


def test_few_images_cannot_show_an_error_of_calibration_near_nought() -> None:
    probabilities = np.random.default_rng(5).random(50_000)
    assert calibration_floor(probabilities, draws=10) < 0.01
    assert 0.07 < calibration_floor(probabilities[:150]) < 0.15


def test_a_version_is_measured_elsewhere_as_it_is_served(
    tmp_path: Path, random_weights: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, name in enumerate(("benign", "malignant")):
        for place in ("home", "clinic"):
            (tmp_path / place / name).mkdir(parents=True)
        for number in range(8):
            image = draw_lesion(kind, number, size=(64, 64))
            image.save(tmp_path / "clinic" / name / f"{number}.png")
            if number < 2:
                image.rotate(90).save(tmp_path / "home" / name / f"{number}.png")
    monkeypatch.setenv("DERMLENS_DATA_DIR", str(tmp_path))
    config = load_config(ROOT / "training" / "configs" / "smoke.toml").model_dump(mode="json")
    manifest = make_manifest(training_config=config | {"data": config["data"] | {"root": "home"}})
    folder = store.publish(tmp_path, manifest, {store.WEIGHTS: random_weights})
    main(["--store", str(tmp_path), "--version", "1", "--data", "clinic", "--evidence", str(tmp_path)])
    assert "on 12 images of clinic that it has not seen" in capsys.readouterr().out  # the four twins are left out
    rows = {row["metric"]: float(row["value"]) for row in read_rows(tmp_path / "external.csv")}
    dataset = load_dataset(Data(root="clinic", without=["home"]), seed=7, progress=False)
    positive = calibrate(served_logits(folder, dataset.images), 1.5)[:, 1] >= 0.4
    assert rows["accuracy"] == pytest.approx(float((positive == dataset.labels.numpy()).mean()), abs=1e-6)
    with pytest.raises(SystemExit, match="no folder"):
        main(["--store", str(tmp_path), "--version", "1", "--data", "nowhere"])
    with pytest.raises(SystemExit, match="was trained on home"):
        main(["--store", str(tmp_path), "--version", "1", "--data", "home"])
