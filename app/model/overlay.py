"""Map of the evidence -> picture. ReLU and normalisation happen here, per image; the raw peak travels beside it."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.model.labels import NOTICE, PREDICTED, Judgement
from app.model.manifest import Manifest

Style = Literal["overlay", "heatmap", "side-by-side"]
Method = Literal["gradcam", "integrated-gradients", "occlusion"]
METHODS: dict[Method, str] = {
    "gradcam": "Grad-CAM",
    "integrated-gradients": "Integrated gradients",
    "occlusion": "Occlusion",
}

# Evidence from none to most: dark blue, violet, orange, yellow; lightness rises all the way, so it reads in grey too
ANCHORS = ((16, 18, 64), (84, 24, 128), (176, 42, 110), (240, 104, 48), (255, 184, 40), (255, 250, 160))


@dataclass(frozen=True)
class Aim:
    """What a picture argues for."""

    label: str
    index: int  # of the label among the classes
    description: str  # method, label with its probability, and model version


def aim(target: str, method: Method, *, judgement: Judgement, manifest: Manifest) -> Aim:
    """The class that `target` (`predicted`, or a class that `labels.check_choices` let through) stands for."""
    label = judgement.label if target == PREDICTED else target
    chance = f"{label} {judgement.probabilities[label]:.3f}"
    description = f"{METHODS[method]} for {chance}, {manifest.name} {manifest.version}"
    return Aim(label, manifest.classes.index(label), description)


@dataclass(frozen=True)
class Overlay:
    png: bytes
    peak: float  # largest raw value of the map, in logits; at most 0 means no evidence for the target
    empty: bool


def evidence(cam: NDArray[np.float32]) -> NDArray[np.float32]:
    """Positive part of a raw map [H,W], scaled to 0..1 by its own peak; all 0 where nothing is positive."""
    positive = np.maximum(cam, 0)
    return np.asarray(positive / (positive.max() or 1), dtype=np.float32)


def render(cam: NDArray[np.float32], preview: Image.Image, *, style: Style, alpha: float, description: str) -> Overlay:
    """Draw a raw map float32[H,W] over an RGB preview of any size.

    Args:
        alpha: opacity of the colour where the evidence peaks; it fades with the evidence, so skin without any stays.
        description: `Aim.description`, kept in the PNG's text beside the notice.
    """
    small = Image.fromarray(evidence(cam))
    strength = np.asarray(small.resize(preview.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colour = _colour(strength)
    if style == "heatmap":
        picture = colour
    else:
        image = np.asarray(preview, dtype=np.float32)
        opacity = (alpha * np.sqrt(strength))[:, :, None]
        picture = image + opacity * (colour - image)
        if style == "side-by-side":
            picture = np.concatenate([image, picture], axis=1)
    text = PngInfo()
    text.add_text("Description", description)
    text.add_text("Disclaimer", NOTICE)
    buffer = io.BytesIO()
    # Level 1 is several times faster than the default and a photograph under colour hardly compresses anyway
    Image.fromarray(picture.round().astype(np.uint8)).save(buffer, "PNG", compress_level=1, pnginfo=text)
    peak = float(cam.max())
    return Overlay(png=buffer.getvalue(), peak=peak, empty=peak <= 0)


def _colour(strength: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[H,W] in 0..1 -> float32[H,W,3] in 0..255."""
    stops = np.linspace(0, 1, len(ANCHORS))
    table = np.stack([np.interp(np.linspace(0, 1, 256), stops, c) for c in zip(*ANCHORS, strict=True)], axis=1)
    return table.astype(np.float32)[(strength * 255).round().astype(np.uint8)]
