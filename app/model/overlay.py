"""Map of the evidence -> picture. ReLU and normalisation happen here, per image; the raw peak travels beside it."""

import functools
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from app.model.frame import WHOLE, Box
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


def render(
    cam: NDArray[np.float32],
    preview: Image.Image,
    *,
    lit: Box | None = None,
    style: Style,
    alpha: float,
    description: str,
) -> Overlay:
    """Draw a raw map float32[H,W] over an RGB preview of any size.

    Args:
        lit: the part of the preview that the map is of; by default all of it.
        alpha: opacity of the colour where the evidence peaks; it fades with the evidence, so skin without any stays.
        description: `Aim.description`, kept in the PNG's text beside the notice.
    """
    small = Image.fromarray(evidence(cam))
    left, top, right, bottom = (round(edge) for edge in (lit or WHOLE).of(*preview.size))
    left, top = min(left, preview.width - 1), min(top, preview.height - 1)  # of a very narrow one a pixel is left
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    strength = np.zeros((preview.height, preview.width), dtype=np.float32)
    shown = small.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    strength[top:bottom, left:right] = np.asarray(shown).clip(0, 1)
    # Opacity goes with the root, and so do the 256 levels: weak evidence then fades without an edge
    levels = (np.sqrt(strength) * 255).round().astype(np.uint8)
    picture = Image.fromarray(_colours()[levels])
    if style != "heatmap":
        opacity = (alpha * np.arange(256)).round().astype(np.uint8)
        picture = Image.composite(picture, preview, Image.fromarray(opacity[levels]))
    pixels = np.asarray(picture)
    if style == "side-by-side":
        pixels = np.concatenate([np.asarray(preview), pixels], axis=1)
    peak = float(cam.max())
    png = _png(pixels, {"Description": description, "Disclaimer": NOTICE})
    return Overlay(png=png, peak=peak, empty=peak <= 0)


@functools.cache
def _colours() -> NDArray[np.uint8]:
    """Colour uint8[256,3] of each level, the root of a strength."""
    stops = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(np.linspace(0, 1, 256) ** 2, stops, c) for c in zip(*ANCHORS, strict=True)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _png(pixels: NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
    """RGB uint8[H,W,3] as a PNG (W3C, third edition) with UTF-8 texts.

    Pillow tries five filters on every row: it took 3.4 ms for 224×224 pixels and 41 for 1024×680, where this took 1.2
    and 17 and made files of the same size.
    """
    height, width, _ = pixels.shape
    rows = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 0] = 2  # filter "up": each byte less the one above it
    flat = pixels.reshape(height, -1)
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(1, zlib.DEFLATED, strategy=zlib.Z_RLE)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]
    chunks += [(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + value.encode()) for key, value in text.items()]
    chunks += [(b"IDAT", deflate.compress(rows.data) + deflate.flush()), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
