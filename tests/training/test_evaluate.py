import numpy as np
import pytest

from training.evaluate import (
    all_metrics,
    calibration_error,
    decision_metrics,
    multiclass_metrics,
    ranking_metrics,
    with_intervals,
)

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
