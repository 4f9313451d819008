"""Every metric against `isic-challenge-scoring`, the scorer of the ISIC challenges, which nobody here wrote."""

import numpy as np
import pandas as pd
import pytest
from isic_challenge_scoring import metrics as isic
from isic_challenge_scoring.confusion import create_binary_confusion_matrix

from training.evaluate import all_metrics, multiclass_metrics


@pytest.mark.parametrize("seed", range(5))
def test_two_classes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(300) < 0.4).astype(np.int64)
    probabilities = np.round(0.3 * labels + 0.7 * rng.random(300), 2)  # rounded, so that some are tied
    positive = probabilities >= 0.55
    ours = all_metrics(labels, probabilities, positive)
    weights = pd.Series(np.ones(300))
    counts = create_binary_confusion_matrix(labels == 1, positive, weights.to_numpy(), name="malignant")
    theirs = {
        "accuracy": isic.binary_accuracy(counts),
        "sensitivity": isic.binary_sensitivity(counts),
        "specificity": isic.binary_specificity(counts),
        "precision": isic.binary_ppv(counts),
        "f1": isic.binary_dice(counts),
        "roc_auc": isic.auc(pd.Series(labels), pd.Series(probabilities), weights),
        "pr_auc": isic.average_precision(pd.Series(labels), pd.Series(probabilities), weights),
    }
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-12)
    assert ours["balanced_accuracy"] == pytest.approx((ours["sensitivity"] + ours["specificity"]) / 2)


def test_three_classes() -> None:
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 3, 200)
    probabilities = rng.dirichlet(np.ones(3), 200) * 0.6 + np.eye(3)[labels] * 0.4
    truth, answers = pd.DataFrame(np.eye(3)[labels]), pd.DataFrame(probabilities)
    theirs = isic.balanced_multiclass_accuracy(truth, answers, pd.Series(np.ones(200)))
    ours = multiclass_metrics(labels, probabilities, probabilities.argmax(axis=1))
    assert ours["balanced_accuracy"] == pytest.approx(theirs, abs=1e-12)
    areas = [isic.auc(truth[k], answers[k], pd.Series(np.ones(200))) for k in range(3)]
    assert ours["roc_auc"] == pytest.approx(np.mean(areas), abs=1e-12)
