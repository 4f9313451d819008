import numpy as np
import pytest

from training.tta import gains

LABELS = np.array([0, 1] * 40)


def test_a_better_answer_gains_and_the_same_answer_does_not() -> None:
    noise = np.random.default_rng(0).normal(0, 0.45, len(LABELS))
    single, better = LABELS + noise, LABELS + noise / 4
    for name, before, after, difference, low, _ in gains(LABELS, single, better, threshold=0.5):
        assert float(difference) == pytest.approx(float(after) - float(before), abs=2e-4)
        assert float(low) > 0, name
    for _, before, after, difference, low, high in gains(LABELS, single, single, threshold=0.5):
        assert before == after
        assert (float(difference), float(low), float(high)) == (0, 0, 0)
