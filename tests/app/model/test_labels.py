import numpy as np
import pytest

from app.model.labels import calibrate, judge
from tests.conftest import make_manifest


def test_calibration_is_softmax_at_a_temperature() -> None:
    probabilities = calibrate(np.array([0.0, 3.0], dtype=np.float32), 1.5)
    assert probabilities == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])


def test_calibration_survives_huge_logits() -> None:
    assert calibrate(np.array([[1e5, -1e5]], dtype=np.float32), 0.5).tolist() == [[1.0, 0.0]]


def test_the_label_follows_the_operating_point_not_one_half() -> None:
    manifest = make_manifest(temperature=1.0)  # balanced threshold 0.4
    judgement = judge(np.array([0.2, 0.0], dtype=np.float32), manifest, "balanced")
    assert judgement.probabilities["malignant"] == pytest.approx(0.45, abs=0.01)
    assert (judgement.label, judgement.positive, judgement.threshold) == ("malignant", True, 0.4)
    strict = judge(np.array([0.2, 0.0], dtype=np.float32), manifest, "specificity-95")
    assert (strict.label, strict.positive) == ("benign", False)


def test_with_three_classes_the_likeliest_wins_and_there_is_no_threshold() -> None:
    manifest = make_manifest(classes=("a", "b", "c"), operating_points={})
    judgement = judge(np.array([0.0, 2.0, 1.0], dtype=np.float32), manifest, "balanced")
    assert (judgement.label, judgement.threshold, judgement.positive) == ("b", None, None)
    assert sum(judgement.probabilities.values()) == pytest.approx(1)
