"""What a command that has loaded a model does with images: decode, run and judge, as the server would."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from app.clinical.dicom import decode
from app.engines.base import Output
from app.main import OpenModel
from app.model.flips import Tta, flips, mean_cam, mean_logits
from app.model.labels import PREDICTED, Judgement, judge
from app.model.out_of_distribution import score_of
from app.model.overlay import aim, render
from app.model.preprocess import DecodedImage
from app.model.quality import assess, measure
from app.settings import Settings


class Picture(NamedTuple):
    image: DecodedImage  # what is wrong with it among its warnings
    spoilt: tuple[str, ...]  # as `Quality.spoilt`


def read(data: bytes, model: OpenModel, settings: Settings, *, preview_side: int = 0) -> Picture:
    """Decode and assess a file; raises `ImageError`."""
    image = decode(
        data,
        size=model.manifest.preprocessing.size,
        max_pixels=settings.max_pixels,
        crop_frame=model.manifest.preprocessing.crop_frame,
        preview_side=preview_side,
        unbounded=True,
    )
    quality = assess(measure(image.pixels))
    return Picture(replace(image, warnings=(*image.warnings, *quality.warnings)), quality.spoilt)


def run(pictures: Sequence[Picture], model: OpenModel, *, tta: Tta) -> list[Output]:
    """The outputs for each image, without the axis of the batch; with `tta` the mean of its four."""
    if tta == "none":
        batch = [model.engine.run(np.stack([image.pixels for image, _ in pictures]))] if pictures else []
        return [
            Output(output.logits[row], output.cam[row], None if output.features is None else output.features[row])
            for output in batch
            for row in range(len(pictures))
        ]
    fours = [model.engine.run(np.stack(flips(image.pixels))) for image, _ in pictures]
    own = [None if four.features is None else four.features[0] for four in fours]
    return [
        Output(mean_logits(list(four.logits)), mean_cam(list(four.cam)), features)
        for four, features in zip(fours, own, strict=True)
    ]


def evidence(picture: Picture, output: Output, judgement: Judgement, model: OpenModel) -> tuple[bytes, str]:
    """What speaks for the predicted class over the image, as a PNG, and a line that says so."""
    shown = aim(PREDICTED, "gradcam", judgement=judgement, manifest=model.manifest)
    overlay = render(
        output.cam[shown.index],
        picture.image.preview,
        lit=picture.image.lit,
        style="overlay",
        alpha=0.6,
        description=shown.description,
    )
    return overlay.png, shown.description


def judged(picture: Picture, output: Output, model: OpenModel, settings: Settings) -> Judgement:
    """The answer for an image that has been run."""
    return judge(
        output.logits,
        model.manifest,
        settings.operating_point,
        coverage=settings.coverage,
        score=score_of(output.features, model.familiar),
        spoilt=picture.spoilt,
    )
