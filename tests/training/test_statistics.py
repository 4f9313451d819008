import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from training.statistics import auc_of_resamples, delong, mcnemar, resamples

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def test_mcnemar_is_the_binomial_tail_over_the_disagreements() -> None:
    """2 against 10: 2·(C(12,0) + C(12,1) + C(12,2)) / 2¹²."""
    first = np.array([True] * 40 + [True] * 2 + [False] * 10 + [False] * 8)
    second = np.array([True] * 40 + [False] * 2 + [True] * 10 + [False] * 8)
    result = mcnemar(first, second)
    assert (result.only_first, result.only_second) == (2, 10)
    assert result.p == pytest.approx(158 / 4096)
    assert mcnemar(second, first).p == pytest.approx(result.p)


def test_mcnemar_without_a_disagreement_finds_nothing() -> None:
    assert mcnemar(np.array([True, False]), np.array([True, False])).p == 1.0


def scores(count: int, *, seed: int) -> tuple[Labels, Floats, Floats]:
    """Two correlated scores of unequal worth, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    shared = rng.normal(size=count)
    first = 1.4 * labels + shared + 0.6 * rng.normal(size=count)
    second = 1.0 * labels + shared + 0.9 * rng.normal(size=count)
    return labels, first.round(1), second.round(1)


def by_the_pairs(labels: Labels, first: Floats, second: Floats) -> tuple[float, float]:
    """AUC difference and its variance as DeLong et al. 1988 define them: over all pairs of unlike images."""
    wins = []
    for score in (first, second):
        gap = score[labels == 1][:, None] - score[labels == 0][None, :]
        wins.append((gap > 0) + 0.5 * (gap == 0))
    of_positive, of_negative = (np.cov([w.mean(axis=axis) for w in wins]) for axis in (1, 0))
    covariance = of_positive / wins[0].shape[0] + of_negative / wins[0].shape[1]
    contrast = np.array([1, -1])
    return float(wins[0].mean() - wins[1].mean()), float(contrast @ covariance @ contrast)


def test_delong_agrees_with_its_definition_over_all_pairs() -> None:
    labels, first, second = scores(150, seed=1)
    result = delong(labels, first, second)
    difference, variance = by_the_pairs(labels, first, second)
    assert result.first == pytest.approx(roc_auc_score(labels, first))
    assert result.second == pytest.approx(roc_auc_score(labels, second))
    assert result.difference == pytest.approx(difference)
    assert (result.high - result.low) / 2 == pytest.approx(1.959964 * variance**0.5)
    assert result.low < result.difference < result.high


def test_delong_interval_is_that_of_a_bootstrap() -> None:
    labels, first, second = scores(300, seed=2)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(600):
        pick = rng.integers(300, size=300)
        drawn.append(delong(labels[pick], first[pick], second[pick]).difference)
    result = delong(labels, first, second)
    assert (result.high - result.low) / 2 / 1.96 == pytest.approx(np.std(drawn), rel=0.12)


def test_delong_p_is_uniform_where_both_scores_are_worth_the_same() -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(300):
        labels = rng.integers(2, size=80)
        shared = labels + rng.normal(size=80)
        rejected += delong(labels, shared + rng.normal(size=80), shared + rng.normal(size=80)).p < 0.1
    assert 300 * 0.06 < rejected < 300 * 0.15


def test_delong_of_a_score_with_itself_finds_nothing() -> None:
    labels, first, second = scores(60, seed=4)
    same = delong(labels, first, np.exp(first))  # ranks are all that counts
    assert (same.difference, same.p) == (0.0, 1.0)
    turned = delong(labels, second, first)
    assert turned.difference == pytest.approx(-delong(labels, first, second).difference)
    assert turned.p == pytest.approx(delong(labels, first, second).p)


def test_delong_needs_two_images_of_each_class() -> None:
    with pytest.raises(ValueError, match="1 positive and 2 negative"):
        delong(np.array([1, 0, 0]), np.array([0.9, 0.1, 0.2]), np.array([0.9, 0.1, 0.2]))


def test_resampled_auc_is_scikit_learns_on_the_repeated_images() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    scores = np.round(rng.normal(labels, 1.0), 1)  # with ties
    counts = resamples(labels)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 50).all()
    found = auc_of_resamples(counts, labels, scores)
    for row in (0, 1, 77, 2000):
        pick = np.repeat(np.arange(50), counts[row].astype(int))
        assert found[row] == pytest.approx(roc_auc_score(labels[pick], scores[pick]))


def test_every_resample_holds_both_classes() -> None:
    labels = np.array([1, 0, 0, 0, 0])
    counts = resamples(labels)
    assert counts.shape == (2001, 5)
    assert (counts[:, 0] > 0).all()
    assert (counts[:, 1:].sum(axis=1) > 0).all()
