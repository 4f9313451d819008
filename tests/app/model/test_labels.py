import numpy as np
import pytest

from app.model.labels import OFF, Judgement, UnknownChoice, calibrate, check_choices, check_metadata, judge
from app.model.manifest import Abstention, MetadataFusion
from tests.conftest import make_manifest, make_rule


def judge_at(malignant: float, rule: Abstention | None, operating_point: str = "balanced") -> Judgement:
    """The judgement where malignant has this probability."""
    manifest = make_manifest(temperature=1.0, abstention={} if rule is None else {"0.95": rule})
    logits = np.array([0, np.log(malignant / (1 - malignant))], dtype=np.float32)
    return judge(logits, manifest, operating_point, coverage="0.95")


def test_calibration_is_softmax_at_a_temperature() -> None:
    probabilities = calibrate(np.array([0.0, 3.0], dtype=np.float32), 1.5)
    assert probabilities == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])


def test_calibration_survives_huge_logits() -> None:
    assert calibrate(np.array([[1e5, -1e5]], dtype=np.float32), 0.5).tolist() == [[1.0, 0.0]]


def test_the_label_follows_the_operating_point_not_one_half() -> None:
    judgement = judge_at(0.45, None)  # balanced threshold 0.4
    assert judgement.probabilities["malignant"] == pytest.approx(0.45)
    assert (judgement.label, judgement.positive, judgement.threshold) == ("malignant", True, 0.4)
    strict = judge_at(0.45, None, "specificity-95")
    assert (strict.label, strict.positive) == ("benign", False)


def test_with_three_classes_the_likeliest_wins_and_there_is_no_threshold() -> None:
    manifest = make_manifest(classes=("a", "b", "c"), operating_points={})
    judgement = judge(np.array([0.0, 2.0, 1.0], dtype=np.float32), manifest, "balanced", coverage=OFF)
    assert (judgement.label, judgement.threshold, judgement.positive) == ("b", None, None)
    assert sum(judgement.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("malignant", "quantiles", "expected"),
    [
        (0.9, (0.3, 0.2), ("malignant",)),
        (0.1, (0.3, 0.2), ("benign",)),
        (0.25, (0.3, 0.2), ("benign", "malignant")),
        (0.5, (0.6, 0.7), ()),
        (0.5, (0.5, 0.6), ("benign",)),  # reaching the quantile is enough
        (0.9, (0.05, 0.95), ("benign",)),  # the less likely class may be the plausible one
    ],
)
def test_a_class_is_plausible_where_it_reaches_its_own_quantile(
    malignant: float, quantiles: tuple[float, float], expected: tuple[str, ...]
) -> None:
    judgement = judge_at(malignant, make_rule(*quantiles))
    assert judgement.prediction_set == expected
    assert judgement.refer == (len(expected) != 1)
    assert judgement.coverage == "0.95"


def test_a_set_that_is_just_the_label_needs_no_words() -> None:
    judgement = judge_at(0.9, make_rule(0.3, 0.2))
    assert (judgement.label, judgement.refer, judgement.reasons) == ("malignant", False, ())


@pytest.mark.parametrize(
    ("malignant", "quantiles", "reason"),
    [
        (0.5, (0.3, 0.2), "both benign and malignant are plausible at 95% coverage"),
        (0.5, (0.6, 0.7), "neither benign nor malignant is plausible at 95% coverage: the model is less sure than it"),
    ],
)
def test_a_referral_says_why(malignant: float, quantiles: tuple[float, float], reason: str) -> None:
    judgement = judge_at(malignant, make_rule(*quantiles))
    assert judgement.refer
    (told,) = judgement.reasons
    assert told.startswith(reason)


@pytest.mark.parametrize(
    ("malignant", "point", "label", "plausible"),
    [(0.2, "sensitivity-95", "malignant", "benign"), (0.8, "specificity-95", "benign", "malignant")],
)
def test_a_set_against_the_operating_point_is_told_and_not_referred(
    malignant: float, point: str, label: str, plausible: str
) -> None:
    judgement = judge_at(malignant, make_rule(0.3, 0.3), point)
    assert (judgement.label, judgement.prediction_set, judgement.refer) == (label, (plausible,), False)
    assert judgement.reasons == (
        f"only {plausible} is plausible at 95% coverage, but the operating point {point} says {label}",
    )


def test_without_a_rule_nothing_is_referred_and_there_is_no_set() -> None:
    for judgement in (
        judge_at(0.5, None),
        judge(np.zeros(2, np.float32), make_manifest(abstention={"0.95": make_rule(1, 1)}), "balanced", coverage=OFF),
    ):
        assert (judgement.refer, judgement.reasons) == (False, ())
        assert judgement.prediction_set is None
        assert judgement.coverage is None


def test_three_classes_abstain_too() -> None:
    classes = ("a", "b", "c")
    rule = Abstention(quantiles={"a": 0.3, "b": 0.3, "c": 0.0}, coverage={}, refer_rate=0, fitted_on="nothing")
    manifest = make_manifest(classes=classes, operating_points={}, abstention={"0.90": rule}, temperature=1.0)

    def told(*probabilities: float) -> tuple[str, ...]:
        return judge(np.log(np.array(probabilities, np.float32)), manifest, "balanced", coverage="0.90").reasons

    assert told(0.4, 0.4, 0.2) == ("a and b and c are plausible at 90% coverage",)
    assert told(0.9, 0.05, 0.05) == ("both a and c are plausible at 90% coverage",)
    assert told(0.25, 0.29, 0.46) == ()
    manifest = make_manifest(
        classes=classes,
        operating_points={},
        temperature=1.0,
        abstention={"0.90": rule.model_copy(update={"quantiles": {"a": 0.5, "b": 0.3, "c": 0.9}})},
    )
    assert told(0.49, 0.31, 0.2) == ("only b is plausible at 90% coverage, but the highest probability says a",)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"operating_point": "lucky"}, "no operating point 'lucky': this version has balanced, sensitivity-95, specif"),
        ({"coverage": "0.80"}, "no coverage '0.80': this version has off, 0.95"),
        ({"coverage": ""}, "no coverage '': this version has off, 0.95"),
        ({"target": "mole"}, "no target 'mole': this version has predicted, benign, malignant"),
    ],
)
def test_an_unknown_choice_is_told_what_there_is(choice: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownChoice, match=message):
        check_choices(make_manifest(abstention={"0.95": make_rule(0, 0)}), **choice)


def test_known_choices_pass() -> None:
    manifest = make_manifest(abstention={"0.95": make_rule(0, 0)})
    for coverage in (OFF, "0.95", None):
        check_choices(manifest, operating_point="sensitivity-95", coverage=coverage, target="benign")
    check_choices(make_manifest(), target="predicted")


def test_metadata_that_the_version_does_not_take_is_refused_by_name() -> None:
    about = MetadataFusion(experimental=True, fields=("age", "site"), trained_on="", held_out="", roc_auc={}, gain={})
    check_metadata(make_manifest(metadata=about), ("age", "site"))
    with pytest.raises(UnknownChoice, match="no use for sex: this version takes age and site alone"):
        check_metadata(make_manifest(metadata=about), ("age", "sex"))
    with pytest.raises(UnknownChoice, match="no use for age and sex: this version answers from the image alone"):
        check_metadata(make_manifest(), ("age", "sex"))


def test_a_judgement_says_what_was_used_beside_the_image_and_refers_nothing_for_it() -> None:
    logits = np.array([0, 2], dtype=np.float32)
    manifest = make_manifest(abstention={"0.95": make_rule(0.5, 0.1)})
    alone = judge(logits, manifest, "balanced", coverage="0.95")
    told = judge(logits, manifest, "balanced", coverage="0.95", metadata=("age", "site"))
    assert (alone.metadata, alone.reasons) == ((), ())
    assert told.metadata == ("age", "site")
    assert told.reasons[0].startswith("used beside the image: age and site (experimental; ")
    assert told.refer == alone.refer
    assert told.probabilities == alone.probabilities
