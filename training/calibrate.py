"""Bias, temperature, operating points and abstention, fitted on held-out logits, or cross-fitted for honest figures."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.metrics import log_loss, roc_curve
from sklearn.model_selection import StratifiedKFold

from app.model.labels import calibrate
from training.evaluate import Floats, Labels

COVERAGES = ("0.90", "0.95")


@dataclass(frozen=True)
class Calibration:
    """What turns logits into an answer."""

    bias: NDArray[np.float32]  # [K], added to the logits; export adds it to the bias of the last layer
    temperature: float
    thresholds: dict[str, float]  # operating point -> on the probability of class 1; empty with more than two classes
    quantiles: dict[str, list[float]]  # coverage -> for each class, the smallest probability that stays in the set


@dataclass(frozen=True)
class Judged:
    """Answers for N images."""

    probabilities: Floats  # [N,K]
    decided: Labels  # [N], class at the balanced operating point, or the likeliest of more than two
    sets: dict[str, NDArray[np.bool_]]  # coverage -> [N,K], classes in the prediction set

    @property
    def referred(self) -> dict[str, NDArray[np.bool_]]:
        """Coverage -> [N], whether the set leaves no single class."""
        return {coverage: members.sum(axis=1) != 1 for coverage, members in self.sets.items()}


def fit(labels: Labels, logits: NDArray[np.float32]) -> Calibration:
    """Fit bias and temperature, then operating points and abstention, on labels [N] and logits [N,K]."""
    bias, temperature = fit_scaling(labels, logits)
    probabilities = calibrate(logits + bias, temperature)
    return Calibration(
        bias=bias,
        temperature=temperature,
        thresholds=operating_points(labels, probabilities[:, 1]) if logits.shape[1] == 2 else {},
        quantiles={c: conformal_quantiles(labels, probabilities, coverage=float(c)) for c in COVERAGES},
    )


def judge(logits: NDArray[np.float32], calibration: Calibration) -> Judged:
    """The answers for logits [N,K]."""
    probabilities = calibrate(logits + calibration.bias, calibration.temperature)
    decided = probabilities.argmax(axis=1)
    if calibration.thresholds:
        decided = (probabilities[:, 1] >= calibration.thresholds["balanced"]).astype(np.int64)
    sets = {coverage: probabilities >= np.array(q) for coverage, q in calibration.quantiles.items()}
    return Judged(probabilities, decided, sets)


def cross_fitted(
    labels: Labels, logits: NDArray[np.float32], *, folds: NDArray[np.int64] | None = None, pieces: int = 5
) -> Judged:
    """The answers for labels [N] and logits [N,K], each from a calibration that did not see that image.

    Args:
        folds: fold of each image [N] where the logits come from several networks: each is judged by the others'.
            One fold alone is cut into `pieces`, or as many as the smallest class has images.

    Raises:
        ValueError: a class has fewer than two images.
    """
    smallest = check_calibration(labels, classes=logits.shape[1])
    if folds is None or len(np.unique(folds)) == 1:
        pieces = min(pieces, smallest)
        splits = list(StratifiedKFold(pieces, shuffle=True, random_state=0).split(logits, labels))
    else:
        splits = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
    result = Judged(
        probabilities=np.empty(logits.shape),
        decided=np.empty(len(labels), dtype=np.int64),
        sets={coverage: np.empty(logits.shape, dtype=bool) for coverage in COVERAGES},
    )
    for others, mine in splits:
        judged = judge(logits[mine], fit(labels[others], logits[others]))
        result.probabilities[mine] = judged.probabilities
        result.decided[mine] = judged.decided
        for coverage, members in judged.sets.items():
            result.sets[coverage][mine] = members
    return result


def check_calibration(labels: Labels, *, classes: int) -> int:
    """The images [N] of the smallest class; raises ValueError where they are too few to be judged by one another."""
    smallest = int(np.bincount(labels, minlength=classes).min())
    if smallest < 2:
        raise ValueError(
            f"a class has {smallest} held-out images, and a calibration needs 2: fewer folds, or more data"
        )
    return smallest


def fit_scaling(labels: Labels, logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
    """The bias [K] and the temperature of the smallest log-loss on labels [N] and logits [N,K].

    Of two classes the second has a bias (Platt 1999): a network that last saw other images is off by one, which no
    temperature mends. More classes have none: some of a hundred have too few images for it.
    """
    classes = logits.shape[1]
    biased = [1] if classes == 2 else []

    def loss(x: Floats) -> float:
        moved = logits.astype(np.float64)
        moved[:, biased] += x[1:]
        return float(log_loss(labels, calibrate(moved, float(np.exp(x[0]))), labels=range(classes)))

    bounds = [(-3, 3), *[(-10, 10)] * len(biased)]  # log T, and each bias in logits
    found = minimize(loss, np.zeros(len(bounds)), bounds=bounds, method="L-BFGS-B").x
    bias = np.zeros(classes, dtype=np.float32)
    bias[biased] = found[1:]
    return bias, float(np.exp(found[0]))


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


def conformal_quantiles(labels: Labels, probabilities: Floats, *, coverage: float) -> list[float]:
    """For each class the smallest probability at which it stays in the prediction set, float[K].

    Class-conditional split conformal prediction (Vovk 2012; Angelopoulos and Bates 2021, section 4.2) with the score
    1 − p of the class: of new images of a class, at least `coverage` keep their class in the set.

    Args:
        labels: [N]. probabilities: calibrated, [N,K].
    """
    quantiles = []
    for kind in range(probabilities.shape[1]):
        own = np.sort(probabilities[labels == kind, kind])
        rank = int(np.floor((1 - coverage) * (len(own) + 1)))
        quantiles.append(float(own[rank - 1]) if rank else 0.0)  # too few images to leave any out
    return quantiles
