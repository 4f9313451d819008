"""From logits to what a person is told: calibrated probabilities and a decision at an operating point."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.model.manifest import Manifest

NOTICE = "Research use only. Not a medical device."


@dataclass(frozen=True)
class Judgement:
    """The calibrated answer for one image."""

    label: str  # with two classes the decision at the operating point, else the likeliest class
    probabilities: dict[str, float]
    operating_point: str
    threshold: float | None  # on the probability of the last class; None with more than two classes
    positive: bool | None


def calibrate(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """Softmax of logits/T over the last axis (temperature scaling, Guo et al. 2017)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def judge(logits: NDArray[np.float32], manifest: Manifest, operating_point: str) -> Judgement:
    """Probabilities and decision for the logits [K] of one image; the last of two classes is the positive one."""
    probabilities = calibrate(logits, manifest.temperature)
    point = manifest.operating_points.get(operating_point)
    positive = None if point is None else bool(probabilities[-1] >= point.threshold)
    winner = int(probabilities.argmax()) if positive is None else int(positive)
    return Judgement(
        label=manifest.classes[winner],
        probabilities={name: float(p) for name, p in zip(manifest.classes, probabilities, strict=True)},
        operating_point=operating_point,
        threshold=point.threshold if point else None,
        positive=positive,
    )
