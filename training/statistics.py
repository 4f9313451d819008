"""Two classifiers on the same images, by McNemar and DeLong, and bootstrap intervals of a ROC-AUC."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm, rankdata
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

RESAMPLES = 2000  # of the bootstrap
FEWEST = 5  # images of a class below which an interval of ROC-AUC means nothing


@dataclass(frozen=True)
class McNemar:
    only_first: int  # images that only the first classifier gets right
    only_second: int
    p: float  # two-sided


@dataclass(frozen=True)
class DeLong:
    first: float  # ROC-AUC
    second: float
    difference: float  # first − second
    low: float  # 95% interval of the difference
    high: float
    p: float  # two-sided


def mcnemar(first_right: NDArray[np.bool_], second_right: NDArray[np.bool_]) -> McNemar:
    """Exact McNemar test on whether each of two classifiers is right, bool[N] each, about the same images.

    Under the null hypothesis a disagreement falls to either side like a fair coin (McNemar 1947).
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    disagreements = only_first + only_second
    p = float(binomtest(only_first, disagreements).pvalue) if disagreements else 1.0
    return McNemar(only_first, only_second, p)


def delong(labels: Labels, first: Floats, second: Floats) -> DeLong:
    """DeLong's test that two scores [N] of the same images have one ROC-AUC; `labels` [N] of 0 and 1.

    Source: DeLong et al. 1988, with the midranks of Sun and Xu 2014 (IEEE Signal Processing Letters 21(11),
    "Fast implementation of DeLong's algorithm"), which give every image's placement value in O(N log N).

    Raises:
        ValueError: a class has fewer than two images, so that its placements have no variance.
    """
    scores = np.stack([first, second])
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]
    m, n = positive.shape[1], negative.shape[1]
    if min(m, n) < 2:
        raise ValueError(f"DeLong's test needs two images of each class, here are {m} positive and {n} negative")
    ranks = rankdata(np.concatenate([positive, negative], axis=1), axis=1)
    # Share of the other class that an image is ranked on the right side of, ties counting half
    of_positive = (ranks[:, :m] - rankdata(positive, axis=1)) / n
    of_negative = 1 - (ranks[:, m:] - rankdata(negative, axis=1)) / m
    auc = of_positive.mean(axis=1)
    difference = float(auc[0] - auc[1])
    variance = np.var(of_positive[0] - of_positive[1], ddof=1) / m + np.var(of_negative[0] - of_negative[1], ddof=1) / n
    error = float(np.sqrt(variance))
    reach = float(norm.ppf(0.975)) * error
    # Without variance both rank alike, or are apart by the same on every image
    p = float(2 * norm.sf(abs(difference) / error)) if error else float(difference == 0)
    return DeLong(float(auc[0]), float(auc[1]), difference, difference - reach, difference + reach, p)


def resamples(labels: Labels, *, seed: int = 0) -> Floats:
    """How often each of 2000 bootstrap resamples holds each image, [1+2000,N]; the first row is the images as they
    are. Both classes are in every one."""
    rng = np.random.default_rng(seed)
    rows = [np.ones((1, len(labels)))]
    while sum(map(len, rows)) <= RESAMPLES:
        drawn = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=RESAMPLES)
        malignant = drawn @ labels
        rows.append(drawn[(malignant > 0) & (malignant < len(labels))].astype(np.float64))
    return np.concatenate(rows)[: 1 + RESAMPLES]


def auc_of_resamples(counts: Floats, labels: Labels, scores: Floats) -> Floats:
    """ROC-AUC [R] of resamples that hold the images `counts` [R,N] times: the share of pairs that stand in order."""
    higher, lower = scores[labels == 1][:, None], scores[labels == 0]
    in_order = (higher > lower) + 0.5 * (higher == lower)
    ones, noughts = counts[:, labels == 1], counts[:, labels == 0]
    pairs = ones.sum(axis=1) * noughts.sum(axis=1)
    return np.asarray(((ones @ in_order) * noughts).sum(axis=1) / pairs)


def auc_with_interval(labels: Labels, probabilities: Floats) -> list[float]:
    """ROC-AUC of images [N] and its 95% interval; without the interval, or empty, where a class has too few."""
    fewest = min(int(labels.sum()), int((1 - labels).sum()))
    if not fewest:
        return []
    value = float(roc_auc_score(labels, probabilities))
    if fewest < FEWEST:
        return [value]
    drawn = auc_of_resamples(resamples(labels), labels, probabilities)[1:]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return [value, float(low), float(high)]
