"""From logits to what a person is told: calibrated probabilities, a decision, and when to refer instead."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.model.manifest import Abstention, Manifest
from app.model.metadata import Field

NOTICE = "Research use only. Not a medical device."
OFF = "off"  # the coverage at which nothing is referred
PREDICTED = "predicted"  # the target that follows the decision
FOREIGN = "the image is unlike the dermoscopic images that the model knows: its score is {:.2f} times the limit"
BESIDE = "used beside the image: {} (experimental; operating points and prediction sets were fitted without)"

Concern = Literal["conformal", "out_of_distribution", "quality"]  # why a person should look instead


class UnknownChoice(ValueError):
    """An operating point, coverage, target or field of metadata that the version does not have."""


@dataclass(frozen=True)
class Novelty:
    """How unlike the training images an image is."""

    score: float  # near 1 for a training image
    threshold: float
    flagged: bool


@dataclass(frozen=True)
class Judgement:
    """The calibrated answer for one image."""

    label: str  # with two classes the decision at the operating point, else the likeliest class
    probabilities: dict[str, float]
    operating_point: str
    threshold: float | None  # on the probability of the last class; None with more than two classes
    positive: bool | None
    coverage: str | None = None  # of the prediction set; None where no abstention rule was applied
    prediction_set: tuple[str, ...] | None = None  # the classes that stay plausible, maybe none; None without a rule
    refer_because: tuple[Concern, ...] = ()  # conformal: the set does not hold exactly one class
    reasons: tuple[str, ...] = ()  # why it refers, how the set differs from the label, what else was used; in words
    out_of_distribution: Novelty | None = None  # None: this version or engine does not tell
    metadata: tuple[Field, ...] = ()  # what was used beside the image

    @property
    def refer(self) -> bool:
        """Whether a person should look instead."""
        return bool(self.refer_because)


def calibrate(logits: NDArray[np.float32] | NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Softmax of logits/T over the last axis (temperature scaling, Guo et al. 2017)."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def check_choices(
    manifest: Manifest, *, operating_point: str | None = None, coverage: str | None = None, target: str | None = None
) -> None:
    """Refuse by name what the version does not have; None was not chosen and is not checked.

    Raises:
        UnknownChoice: its message lists what there is.
    """
    for kind, chosen, known in (
        ("operating point", operating_point, tuple(manifest.operating_points)),
        ("coverage", coverage, (OFF, *manifest.abstention)),
        ("target", target, (PREDICTED, *manifest.classes)),
    ):
        if chosen is not None and chosen not in known:
            raise UnknownChoice(f"no {kind} {chosen!r}: this version has {', '.join(known) or 'none'}")


def check_metadata(manifest: Manifest, fields: Sequence[Field]) -> None:
    """Refuse what the version cannot use beside the image; raises UnknownChoice."""
    taken = manifest.metadata.fields if manifest.metadata else ()
    if left_over := [field for field in fields if field not in taken]:
        takes = f"takes {' and '.join(taken)} alone" if taken else "answers from the image alone"
        raise UnknownChoice(f"no use for {' and '.join(left_over)}: this version {takes}")


def judge(
    logits: NDArray[np.float32],
    manifest: Manifest,
    operating_point: str,
    *,
    coverage: str,
    score: float | None = None,
    spoilt: Sequence[str] = (),
    metadata: tuple[Field, ...] = (),
) -> Judgement:
    """Probabilities, decision and referral for the logits [K] of one image; the last of two classes is the positive.

    A class is in the prediction set iff its probability reaches its own quantile, so that of each class's images,
    about `coverage` have it in their set, however rare the class. The set decides on referral as the manifest's
    `refer_rate` was measured; an image that is foreign or spoilt is referred whatever its set, also without a rule.
    The operating point is a separate choice, of how many false alarms a missed malignancy is worth, so it may disagree
    with a set of one class: `sensitivity-95` says malignant where only benign is plausible. Then the label still
    follows the operating point, the set refers nothing, and a reason says so.

    Args:
        coverage: key of `manifest.abstention`; with any other, `off` among them, no set is formed.
        score: of `out_of_distribution.Familiar`; None where it is not known.
        spoilt: what is so wrong with the image that its answer is not to be relied on, in words.
        metadata: what the logits owe to more than the image.
    """
    probabilities = calibrate(logits, manifest.temperature)
    by_class = {name: float(p) for name, p in zip(manifest.classes, probabilities, strict=True)}
    point = manifest.operating_points.get(operating_point)
    positive = None if point is None else bool(probabilities[-1] >= point.threshold)
    label = manifest.classes[int(probabilities.argmax()) if positive is None else int(positive)]
    answer = Judgement(
        label=label,
        probabilities=by_class,
        operating_point=operating_point,
        threshold=point.threshold if point else None,
        positive=positive,
    )
    rule = manifest.abstention.get(coverage)
    if rule is not None:
        answer = _with_set(answer, rule, coverage)
    limits = manifest.out_of_distribution
    if limits is not None and score is not None:
        novelty = Novelty(score, limits.threshold, flagged=score > limits.threshold)
        answer = replace(answer, out_of_distribution=novelty)
        if novelty.flagged:
            answer = _refer(answer, "out_of_distribution", FOREIGN.format(score / limits.threshold))
    for reason in spoilt:
        answer = _refer(answer, "quality", reason)
    if metadata:
        told = BESIDE.format(" and ".join(metadata))
        answer = replace(answer, metadata=metadata, reasons=(*answer.reasons, told))
    return answer


def _refer(answer: Judgement, concern: Concern, reason: str) -> Judgement:
    concerns = dict.fromkeys((*answer.refer_because, concern))
    return replace(answer, refer_because=tuple(concerns), reasons=(*answer.reasons, reason))


def _with_set(answer: Judgement, rule: Abstention, coverage: str) -> Judgement:
    """The answer with its prediction set, and referred where that does not hold exactly one class."""
    plausible = tuple(name for name, p in answer.probabilities.items() if p >= rule.quantiles[name])
    return replace(
        answer,
        coverage=coverage,
        prediction_set=plausible,
        refer_because=("conformal",) if len(plausible) != 1 else (),
        reasons=_reasons(plausible, answer, at=f"plausible at {float(coverage):.0%} coverage"),
    )


def _reasons(plausible: tuple[str, ...], answer: Judgement, *, at: str) -> tuple[str, ...]:
    """Why the prediction set is not just the label."""
    if plausible == (answer.label,):
        return ()
    if not plausible:
        return (f"neither {' nor '.join(answer.probabilities)} is {at}: the model is less sure than it mostly is",)
    if len(plausible) > 1:
        return (f"{'both ' if len(plausible) == 2 else ''}{' and '.join(plausible)} are {at}",)
    source = "the highest probability" if answer.positive is None else f"the operating point {answer.operating_point}"
    return (f"only {plausible[0]} is {at}, but {source} says {answer.label}",)
