import numpy as np
import pytest

from app.model.labels import calibrate
from training.calibrate import cross_fitted, fit
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
    p = calibrate(logits, fitted.temperature)[:, 1]

    def rates(point: str) -> tuple[float, float]:
        positive = p >= fitted.thresholds[point]
        return float(positive[labels == 1].mean()), float((~positive[labels == 0]).mean())

    sensitivity, specificity = rates("balanced")
    assert sensitivity == pytest.approx(specificity, abs=0.01)
    assert rates("sensitivity-95")[0] == pytest.approx(0.95, abs=0.005)
    assert rates("specificity-95")[1] == pytest.approx(0.95, abs=0.005)


def test_cross_fitting_judges_each_image_by_the_others() -> None:
    labels, logits = overconfident(60)
    probabilities, positive = cross_fitted(labels, logits)
    changed = logits.copy()
    changed[0, 1] += 50  # one image moves: its own calibration does not, that of the others may
    moved, _ = cross_fitted(labels, changed)
    ratio = np.log(moved[0] / (1 - moved[0])) / changed[0, 1]
    assert ratio == pytest.approx(np.log(probabilities[0] / (1 - probabilities[0])) / logits[0, 1], rel=1e-6)
    assert positive.dtype == bool


def test_perfect_separation_still_gives_thresholds_between_nought_and_one() -> None:
    labels = np.array([0] * 10 + [1] * 10)
    logits = np.stack([np.zeros(20), np.where(labels, 5.0, -5.0)], axis=1).astype(np.float32)
    assert all(0 <= t <= 1 for t in fit(labels, logits).thresholds.values())
