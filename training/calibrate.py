"""Temperature and operating points, fitted on held-out logits; and the same cross-fitted, for honest figures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, roc_curve
from sklearn.model_selection import StratifiedKFold

from app.model.labels import calibrate
from training.evaluate import Floats, Labels


@dataclass(frozen=True)
class Calibration:
    temperature: float
    thresholds: dict[str, float]  # operating point -> threshold on the calibrated probability of class 1


def fit(labels: Labels, logits: NDArray[np.float32]) -> Calibration:
    """Fit temperature by log-loss, then the operating points, on labels [N] and logits [N,2]."""

    def loss(log_t: float) -> float:
        return float(log_loss(labels, calibrate(logits, float(np.exp(log_t))), labels=[0, 1]))

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))
    probabilities = calibrate(logits, temperature)[:, 1]
    return Calibration(temperature, operating_points(labels, probabilities))


def operating_points(labels: Labels, probabilities: Floats) -> dict[str, float]:
    """Thresholds: `balanced` where sensitivity meets specificity, and the two that hold 95% of one of them.

    The crossing is steadier than the best accuracy or Youden's index, which jump between single images.
    """
    fpr, tpr, thresholds = roc_curve(labels, probabilities, drop_intermediate=False)
    thresholds = np.clip(thresholds, 0, 1)
    sensitive = int(np.argmax(tpr >= 0.95))
    specific = int(np.flatnonzero(1 - fpr >= 0.95)[-1])
    return {
        "balanced": float(np.interp(0, tpr - (1 - fpr), thresholds)),
        "sensitivity-95": float(thresholds[sensitive]),
        "specificity-95": float(thresholds[specific]),
    }


def cross_fitted(
    labels: Labels, logits: NDArray[np.float32], *, point: str = "balanced", folds: int = 5
) -> tuple[Floats, NDArray[np.bool_]]:
    """Probabilities [N] and decisions [N], each from a calibration that did not see that image."""
    probabilities, positive = np.empty(len(labels)), np.empty(len(labels), dtype=bool)
    for others, mine in StratifiedKFold(folds, shuffle=True, random_state=0).split(logits, labels):
        fitted = fit(labels[others], logits[others])
        probabilities[mine] = calibrate(logits[mine], fitted.temperature)[:, 1]
        positive[mine] = probabilities[mine] >= fitted.thresholds[point]
    return probabilities, positive
