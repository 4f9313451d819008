"""What spoils a photograph, in five strengths: noise, focus, compression, light, hairs, rulers and turns.

The hairs and rulers are those of the training augmentation: a run with `augmentation.hairs` has seen their family.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from training.artefacts import draw_hairs, draw_ruler, lay_over

Pixels = NDArray[np.uint8]

# One row a kind, one number a strength, for an image of 224×224 pixels
LEVELS: dict[str, tuple[float, float, float, float, float]] = {
    "gaussian-noise": (8, 16, 26, 40, 60),  # standard deviation, of 255
    "blur": (0.7, 1.2, 1.8, 2.6, 4.0),  # standard deviation, pixels
    "jpeg": (50, 30, 20, 12, 6),  # quality, of 100; colour at half resolution
    "brightness": (1.1, 1.2, 1.35, 1.5, 1.75),  # factor; its inverse on every other image, by seed
    "colour-cast": (0.06, 0.12, 0.18, 0.26, 0.36),  # largest change of a channel's gain; the hue by seed
    "hair": (3, 6, 12, 24, 48),  # hairs
    "ruler": (1, 2, 3, 5, 8),  # rulers, each along a side
    "rotation": (9, 18, 27, 36, 45),  # degrees; to the left or right by seed
}
KINDS: tuple[str, ...] = tuple(LEVELS)
STRENGTHS = (1, 2, 3, 4, 5)


def corrupt(image: Pixels, kind: str, *, strength: int, seed: int) -> Pixels:
    """A spoilt copy of uint8[3,H,W], the same for the same arguments.

    The strengths of one seed differ in degree alone: the same noise, the same side of grey, the same first hairs.

    Raises:
        ValueError: the kind or the strength does not exist.
    """
    if kind not in LEVELS or strength not in STRENGTHS:
        raise ValueError(f"no corruption {kind} of strength {strength}: {', '.join(KINDS)}, 1 to 5")
    level = LEVELS[kind][strength - 1]
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    match kind:
        case "gaussian-noise":
            out = _bytes(image + level * rng.standard_normal(image.shape, dtype=np.float32))
        case "blur":
            out = _planes(_picture(image).filter(ImageFilter.GaussianBlur(level)))
        case "jpeg":
            out = jpeg(image, quality=int(level))
        case "brightness":
            out = _bytes(image * (level if rng.integers(2) else 1 / level))
        case "colour-cast":
            out = _bytes(image * (1 + level * _hue(rng))[:, None, None])
        case "hair":
            shade = rng.uniform(10, 70)
            hairs = draw_hairs(max(image.shape[1:]), count=int(level), rng=rng)
            out = _covered(image, hairs, colour=(shade * 1.3, shade, shade * 0.8))
        case "ruler":
            rulers = [draw_ruler(max(image.shape[1:]), rng=rng) for _ in range(int(level))]
            out = _covered(image, np.max(rulers, axis=0), colour=(20.0, 20.0, 20.0))
        case _:  # rotation
            out = _turned(image, level if rng.integers(2) else -level)
    return out


def jpeg(image: Pixels, *, quality: int) -> Pixels:
    """uint8[3,H,W] as a JPEG file of that quality, 1 to 100, gives it back; colour at half resolution."""
    buffer = io.BytesIO()
    _picture(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return _planes(Image.open(buffer))


def _hue(rng: np.random.Generator) -> NDArray[np.float64]:
    """Shifts [3] of red, green and blue in −1..1 that leave grey as bright as it was."""
    angle = rng.uniform(0, 2 * math.pi)
    shifts = np.cos(angle + np.array([0.0, 2.0, 4.0]) * math.pi / 3)
    return np.asarray(shifts / np.abs(shifts).max())


def _covered(image: Pixels, coverage: NDArray[np.float32], *, colour: tuple[float, float, float]) -> Pixels:
    _, height, width = image.shape
    fitted = np.asarray(Image.fromarray(coverage).resize((width, height)))  # a picture need not be square
    return _bytes(lay_over(image.astype(np.float32), fitted, colour=colour))


def _turned(image: Pixels, degrees: float) -> Pixels:
    """Turned about the middle; the skin goes on by reflection, where black corners would mean nothing."""
    _, height, width = image.shape
    margin = math.ceil((math.hypot(height, width) - min(height, width)) / 2) + 2  # a cubic kernel reaches 2 pixels
    wide = np.pad(image, ((0, 0), (margin, margin), (margin, margin)), mode="symmetric")
    turned = _planes(_picture(wide).rotate(degrees, Image.Resampling.BICUBIC))
    return turned[:, margin : margin + height, margin : margin + width]


def _picture(image: Pixels) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))


def _planes(picture: Image.Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1))


def _bytes(image: NDArray[np.floating]) -> Pixels:
    return np.asarray(np.rint(image).clip(0, 255), dtype=np.uint8)
