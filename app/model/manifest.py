"""What a published version says of itself: `manifest.json`, and how one of an older schema is read."""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from app.model.metadata import Field as MetadataField

SCHEMA_VERSION: Final = 3  # docs/upgrading.md lists what each brought

Gate = Literal["channel_softmax", "branch_softmax"]
StrideVariant = Literal["v1", "v1.5"]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Triple = tuple[float, float, float]
Probability = Annotated[float, Field(ge=0, le=1)]
Coverage = Annotated[str, StringConstraints(pattern=r"^0\.[0-9]{2}$")]


class NewerSchema(Exception):
    """A manifest that a newer dermlens published."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(Part):
    backbone: Literal["resnet50"]
    stride_variant: StrideVariant
    gate: Gate | None  # None: the plain baseline


class Preprocessing(Part):
    size: int = Field(ge=32)  # pixels
    resize: Literal["squash-bilinear"]  # aspect ratio not kept, antialiased
    crop_frame: bool = False  # a dermoscope's dark one (`frame.lit_part`), before resizing
    mean: Triple
    std: Triple


class OperatingPoint(Part):
    """A threshold on the calibrated probability of the positive (last) class."""

    threshold: Probability
    fitted_on: str


class Abstention(Part):
    """Class-conditional (Mondrian) split-conformal prediction sets at one coverage (Vovk 2012), for `labels.judge`.

    The measured figures are cross-fitted: each image is judged by quantiles that were fitted without it.
    """

    quantiles: dict[str, Probability]  # class -> its smallest calibrated probability at which the set still holds it
    coverage: dict[str, Probability]  # class -> share of its held-out images whose set holds it
    refer_rate: Probability  # share of held-out images whose set does not hold exactly one class
    fitted_on: str


class Metric(Part):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


class Comparison(Part):
    """One version in two precisions on the same held-out images."""

    images: int
    float32: dict[str, float]  # metric -> value
    int8: dict[str, float]
    probability_difference: dict[str, float]  # of the last class; median, p99, max
    cam_correlation: dict[str, float]  # of each image's two maps; median, p01, min
    shipped: bool  # whether int8 was close enough to be in `files`


class OutOfDistribution(Part):
    """When an image is too unlike the training images to be answered: `out_of_distribution.Familiar` and a threshold.

    The flagged shares are of dermoscopy that nothing was trained on, AUROC of foreign images against it.
    """

    method: Literal["ppca-mahalanobis"]
    threshold: float = Field(gt=0)  # on the score; above it the image is flagged
    fitted_on: str  # statistics and threshold, in words
    flagged: dict[
        str, Probability
    ]  # folder of dermoscopy, or the part that set the threshold -> share flagged; that part cross-fitted
    auroc: dict[str, Probability]  # kind of foreign image -> AUROC; "all" is over every one of them


class MetadataFusion(Part):
    """What else than the image a version takes: `metadata.Fusion`, and what that gained on held-out images.

    Thresholds and prediction sets are those of the image alone.
    """

    experimental: Literal[True]
    fields: Annotated[tuple[MetadataField, ...], Field(min_length=1)]
    trained_on: str  # in words
    held_out: str  # what the figures are of, in words
    roc_auc: dict[str, Metric]  # what was known -> value
    gain: dict[str, Metric]  # the same -> paired difference to the image alone


class Split(Part):
    """Where the metrics come from."""

    data: str
    folds: int
    held_out_fold: int
    training_images: int
    held_out_images: int
    fingerprint: Sha256


class FileRecord(Part):
    sha256: Sha256
    size: int = Field(ge=0)  # bytes


class Manifest(Part):
    """The whole of `manifest.json`; docs/architecture.md describes each field."""

    schema_version: Literal[3]
    name: Identifier
    version: Identifier
    created: datetime
    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    architecture: Architecture
    preprocessing: Preprocessing
    temperature: float = Field(gt=0)
    operating_points: dict[str, OperatingPoint]  # empty with more than two classes
    abstention: dict[Coverage, Abstention] = {}  # "0.95" -> the rule for that coverage; empty: no set is formed
    metrics: dict[str, Metric]
    external_metrics: dict[str, dict[str, Metric]] = {}  # data set that the split knows nothing of -> its metrics
    calibrated_on: str = ""  # where temperature, operating points and abstention were fitted, in words
    quantization: Comparison | None = None  # None: int8 was not tried
    out_of_distribution: OutOfDistribution | None = None  # None: nothing is flagged
    metadata: MetadataFusion | None = None  # None: it answers from the image alone
    split: Split
    training_config: dict[str, Any]
    git_commit: str
    licence: str
    files: dict[str, FileRecord]

    @model_validator(mode="before")
    @classmethod
    def _of_this_schema(cls, raw: Any) -> Any:
        return migrate(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _two_classes_decide(self) -> "Manifest":
        if len(self.classes) == 2 and "balanced" not in self.operating_points:
            raise ValueError("a version with two classes needs the operating point 'balanced'")
        return self

    @model_validator(mode="after")
    def _every_class_has_its_quantile(self) -> "Manifest":
        for coverage, rule in self.abstention.items():
            if set(rule.quantiles) != set(self.classes):
                raise ValueError(f"abstention {coverage}: the quantiles are not those of {', '.join(self.classes)}")
        return self


def migrate(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest as this program writes them; older ones are brought up a schema at a time.

    Raises:
        NewerSchema.
    """
    schema = raw.get("schema_version")
    if type(schema) is not int:  # left to validation, as is an unknown one
        return raw
    if schema > SCHEMA_VERSION:
        raise NewerSchema(
            f"schema {schema} is newer than {SCHEMA_VERSION}, the last that this program reads: upgrade dermlens"
        )
    while step := STEPS.get(raw["schema_version"]):
        raw = step(raw)
    return raw


def _from_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 may name abilities that a version of schema 1 has not; each of those fields is None by default."""
    return raw | {"schema_version": 2}


def _from_2(raw: dict[str, Any]) -> dict[str, Any]:
    """Schema 3 may crop frames away, which no version of schema 2 does."""
    return raw | {"schema_version": 3}


STEPS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1, 2: _from_2}  # schema -> to the next one
