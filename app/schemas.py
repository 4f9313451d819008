"""What the HTTP API says, as JSON."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from app.model.labels import NOTICE, Judgement
from app.model.manifest import Manifest
from app.model.preprocess import DecodedImage

Probability = Annotated[float, Field(ge=0, le=1)]


class ModelRef(BaseModel):
    name: str
    version: str


class Decision(BaseModel):
    """The answer at one operating point, for a model with two classes."""

    operating_point: str
    threshold: Probability
    positive: bool
    refer: bool = Field(description="The model abstains; always false for a version without an abstention rule.")


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
    decision: Decision | None
    image: ImageFacts
    notice: str = NOTICE


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(examples=["urn:dermlens:problem:not-an-image"])
    title: str
    status: int
    detail: str
    request_id: str


class BatchItem(BaseModel):
    """One file's outcome: a prediction or a problem, never both."""

    index: int = Field(description="Place of the file in the request, from 0.")
    prediction: Prediction | None = None
    problem: Problem | None = None


class Explanation(Prediction):
    """A prediction with its evidence."""

    target: str = Field(description="The class that the map argues for.")
    map: list[list[float]] = Field(description="Raw class-activation map in logits, before ReLU; rows from the top.")
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
    problem: str | None = None


class Models(BaseModel):
    name: str
    versions: list[ModelInfo]


def prediction_fields(
    judgement: Judgement, image: DecodedImage, *, manifest: Manifest, request_id: str
) -> dict[str, Any]:
    """The fields that `Prediction` and `Explanation` share."""
    decision = None
    if judgement.threshold is not None and judgement.positive is not None:
        decision = Decision(
            operating_point=judgement.operating_point,
            threshold=judgement.threshold,
            positive=judgement.positive,
            refer=False,
        )
    return {
        "request_id": request_id,
        "model": ModelRef(name=manifest.name, version=manifest.version),
        "label": judgement.label,
        "probabilities": judgement.probabilities,
        "decision": decision,
        "image": ImageFacts(width=image.width, height=image.height, format=image.format, warnings=list(image.warnings)),
    }
