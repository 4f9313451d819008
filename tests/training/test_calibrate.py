import numpy as np
import pytest

from app.model.labels import calibrate
from training.calibrate import conformal_quantiles, cross_fitted, fit, judge
from training.evaluate import calibration_error


def overconfident(size: int = 4000, factor: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from true logits, and those logits multiplied."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 2, size)
    labels = (rng.random(size) < 1 / (1 + np.exp(-true))).astype(np.int64)
    return labels, np.stack([np.zeros(size), factor * true], axis=1).astype(np.float32)


def test_the_temperature_undoes_overconfidence() -> None:
    labels, logits = overconfident()
    fitted = fit(labels, logits)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    before, after = (calibration_error(labels, calibrate(logits, t)[:, 1]) for t in (1.0, fitted.temperature))
    assert after < 0.03 < before


def test_operating_points_hold_what_they_promise() -> None:
    labels, logits = overconfident()
    fitted = fit(labels, logits)
    p = judge(logits, fitted).probabilities[:, 1]

    def rates(point: str) -> tuple[float, float]:
        positive = p >= fitted.thresholds[point]
        return float(positive[labels == 1].mean()), float((~positive[labels == 0]).mean())

    sensitivity, specificity = rates("balanced")
    assert sensitivity == pytest.approx(specificity, abs=0.01)
    assert rates("sensitivity-95")[0] == pytest.approx(0.95, abs=0.005)
    assert rates("specificity-95")[1] == pytest.approx(0.95, abs=0.005)


def test_the_bias_undoes_logits_that_are_off_by_a_constant() -> None:
    labels, logits = overconfident()
    off = logits + np.array([0, -4.5], dtype=np.float32)
    fitted = fit(labels, off)
    assert fitted.bias.tolist() == pytest.approx([0, 4.5], abs=0.3)
    assert fitted.temperature == pytest.approx(3, rel=0.1)
    assert judge(off, fitted).probabilities == pytest.approx(judge(logits, fit(labels, logits)).probabilities, abs=1e-3)
    assert calibration_error(labels, judge(off, fitted).probabilities[:, 1]) < 0.03
    assert calibration_error(labels, calibrate(off, fitted.temperature)[:, 1]) > 0.1


def test_cross_fitting_judges_each_image_by_the_others() -> None:
    labels, logits = overconfident(60)

    def log_odds(moved_by: float) -> float:
        """Of the first image, moved alone: its own calibration stays as it is, that of the others may not."""
        changed = logits.copy()
        changed[0, 1] += moved_by
        p = cross_fitted(labels, changed).probabilities[0]
        return float(np.log(p[1] / p[0]))

    assert log_odds(50) - log_odds(0) == pytest.approx(2 * (log_odds(25) - log_odds(0)), rel=1e-6)


def test_a_class_of_one_held_out_image_is_refused() -> None:
    logits = np.zeros((5, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="a class has 1 held-out images, and a calibration needs 2"):
        cross_fitted(np.array([0, 0, 0, 0, 1]), logits)


def test_cross_fitting_over_folds_judges_each_fold_by_the_others() -> None:
    labels, logits = overconfident(400)
    folds = np.arange(400) % 2
    logits[folds == 1] *= 2  # each fold's network has a temperature of its own
    judged = cross_fitted(labels, logits, folds=folds)
    alone = judge(logits[folds == 0], fit(labels[folds == 1], logits[folds == 1]))
    assert np.array_equal(judged.probabilities[folds == 0], alone.probabilities)
    assert np.array_equal(judged.decided[folds == 0], alone.decided)


@pytest.mark.parametrize("coverage", ["0.90", "0.95"])
def test_prediction_sets_cover_each_class_as_promised(coverage: str) -> None:
    labels, logits = overconfident(20000)
    fresh = slice(10000, None)
    sets = judge(logits[fresh], fit(labels[:10000], logits[:10000])).sets[coverage]
    for kind in (0, 1):
        covered = float(sets[labels[fresh] == kind, kind].mean())
        assert covered == pytest.approx(float(coverage), abs=0.015)


def test_two_images_of_a_class_are_too_few_to_leave_it_out() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]] + [[0.3, 0.7]] * 50)
    assert conformal_quantiles(np.array([0, 0] + [1] * 50), probabilities, coverage=0.95) == [0.0, 0.7]


def test_more_than_two_classes_have_sets_but_no_operating_point() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 300)
    logits = (np.eye(3)[labels] * 2 + rng.normal(0, 1, (300, 3))).astype(np.float32)
    fitted = fit(labels, logits)
    assert fitted.thresholds == {}
    assert [len(q) for q in fitted.quantiles.values()] == [3, 3]
    judged = cross_fitted(labels, logits)
    assert np.array_equal(judged.decided, judged.probabilities.argmax(axis=1))
    assert fitted.bias.tolist() == [0, 0, 0]
    assert 0.85 < float(judged.sets["0.90"][np.arange(300), labels].mean()) < 0.95


def test_perfect_separation_still_gives_thresholds_between_nought_and_one() -> None:
    labels = np.array([0] * 10 + [1] * 10)
    logits = np.stack([np.zeros(20), np.where(labels, 5.0, -5.0)], axis=1).astype(np.float32)
    assert all(0 <= t <= 1 for t in fit(labels, logits).thresholds.values())
