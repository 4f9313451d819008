"""What the HTTP API says, as JSON."""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, Field

from app.model.labels import NOTICE, Concern, Judgement
from app.model.manifest import Manifest, Probability
from app.model.metadata import Field as MetadataField
from app.model.overlay import Method
from app.model.preprocess import DecodedImage


class ModelRef(BaseModel):
    name: str
    version: str


class OutOfDistribution(BaseModel):
    """How unlike the training images the image is."""

    score: float = Field(description="Near 1 for a training image.")
    threshold: float
    flagged: bool = Field(description="The score is above the threshold.")


class Decision(BaseModel):
    """The answer at one operating point, and whether a person should look instead."""

    operating_point: str | None = Field(description="Null, like the next two, for a model with more than two classes.")
    threshold: Probability | None
    positive: bool | None
    refer: bool = Field(description="A person should look instead, for what `refer_because` names.")
    refer_because: list[Concern] = Field(
        description="`conformal`: `prediction_set` does not hold exactly one class; `out_of_distribution`: the image "
        "is unlike what the model knows; `quality`: it is so spoilt that the model errs more."
    )
    reasons: list[str] = Field(
        description="Why it refers, how a set of one class differs from the label, what else was used."
    )
    out_of_distribution: OutOfDistribution | None = Field(description="Null where the version does not measure it.")
    prediction_set: list[str] | None = Field(
        description="The classes that stay plausible at this coverage, maybe none; null where no rule was applied."
    )
    coverage: str | None = Field(
        description="Share of each class's images whose set holds their class, as fitted; null where none was applied."
    )


class ImageFacts(BaseModel):
    width: int = Field(description="Pixels, upright, as uploaded.")
    height: int
    format: str
    warnings: list[str] = Field(description="What may make the answer worse, in words.")


class Prediction(BaseModel):
    request_id: str
    model: ModelRef
    label: str
    probabilities: dict[str, Probability]
    decision: Decision
    image: ImageFacts
    metadata: list[MetadataField] = Field([], description="What was used beside the image; experimental.")
    notice: str = NOTICE


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:dermlens:problem:not-an-image"])
    title: str
    status: int
    detail: str
    request_id: str

    @property
    def slug(self) -> str:
        """The last part of the type, a metric's label."""
        return self.type.rsplit(":", 1)[1]


class BatchItem(BaseModel):
    """One file's outcome: a prediction or a problem, never both."""

    index: int = Field(description="Place of the file in the request, from 0.")
    prediction: Prediction | None = None
    problem: Problem | None = None


class Explanation(Prediction):
    """A prediction with its evidence."""

    target: str = Field(description="The class that the map argues for.")
    method: Method
    map: list[list[float]] = Field(
        description="Raw map of the method in logits, before ReLU, over `seen`; rows from the top."
    )
    seen: tuple[float, float, float, float] = Field(
        description="The part of the image that was judged, in fractions of its width and height: left, top, right and "
        "bottom. All of it, but for a dark frame where the version crops it."
    )
    peak: float = Field(description="Largest raw value of the map; at most 0 means no evidence for the target.")
    empty: bool
    overlay_png: str = Field(description="Base64 of the picture that `Accept: image/png` gets.")


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    reason: str | None = None


class ModelInfo(BaseModel):
    """A published version; `problem` says why it cannot be read, where it cannot."""

    version: str
    served: bool
    manifest: dict[str, Any] | None = None
    report: list[str] = Field([], description="Files that `/models/{version}/report/{file}` gives.")
    problem: str | None = None


class Asked(BaseModel):
    """What holds for a request that says nothing else."""

    operating_point: str
    coverage: str


class Limits(BaseModel):
    """What an image may have at most."""

    bytes: int
    pixels: int = Field(description="Width × height.")


class Models(BaseModel):
    name: str
    versions: list[ModelInfo]
    defaults: Asked
    limits: Limits


class Promoted(BaseModel):
    """The version that is served from now on, and the one that was before it."""

    version: str
    previous: str


def prediction_fields(
    judgement: Judgement, image: DecodedImage, *, manifest: Manifest, request_id: str
) -> dict[str, Any]:
    """The fields that `Prediction` and `Explanation` share."""
    novelty = judgement.out_of_distribution
    decision = Decision(
        operating_point=None if judgement.threshold is None else judgement.operating_point,
        threshold=judgement.threshold,
        positive=judgement.positive,
        refer=judgement.refer,
        refer_because=list(judgement.refer_because),
        reasons=list(judgement.reasons),
        out_of_distribution=None if novelty is None else OutOfDistribution(**asdict(novelty)),
        prediction_set=None if judgement.prediction_set is None else list(judgement.prediction_set),
        coverage=judgement.coverage,
    )
    return {
        "request_id": request_id,
        "model": ModelRef(name=manifest.name, version=manifest.version),
        "label": judgement.label,
        "probabilities": judgement.probabilities,
        "decision": decision,
        "image": ImageFacts(width=image.width, height=image.height, format=image.format, warnings=list(image.warnings)),
        "metadata": list(judgement.metadata),
    }
