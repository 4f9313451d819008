"""Cheap measures of what a picture is like, on the pixels that the model sees, and what they say against it."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, of RGB
DARK, WHITE = 30, 250  # of 255: below it a vignette or a frame, above it nothing is left of the skin


@dataclass(frozen=True)
class Measures:
    """Of one image."""

    brightness: float  # mean luma, 0..1
    sharpness: float  # variance of the luma's Laplacian (Pech-Pacheco et al. 2000), grey levels of 0..255 squared
    saturation: float  # mean of (max − min) / max over the channels, 0..1
    red: float  # share of red in the mean colour, 1/3 where it is grey
    blue: float
    dark: float  # share of pixels below `DARK`
    white: float  # share of pixels above `WHITE` in every channel


class Limit(NamedTuple):
    """From where on a measure is worth a warning, and from where on the answer is not to be relied on."""

    measure: str
    above: bool  # which side of the limits is wrong
    warn: float
    severe: float | None  # None: accuracy did not clearly fall
    words: str


# Warnings: beyond 0.5% of the training images, but for focus, which costs nothing until later; severe: where held-out
# accuracy clearly fell (training.quality, docs/decisions/018)
LIMITS = (
    Limit("sharpness", False, 2.0, 0.8, "blurred, or enlarged from few pixels: focus again"),
    Limit("sharpness", True, 1820, 6_000, "grainy: noise hides the lesion's structure"),
    Limit("brightness", False, 0.29, 0.15, "too dark: light it more"),
    Limit("brightness", True, 0.834, 0.95, "too bright: light it less"),
    Limit("white", True, 0.022, None, "overexposed: parts are pure white"),
    Limit("red", True, 0.526, None, "a red cast: set the white balance"),
    Limit("red", False, 0.327, None, "a cold cast: set the white balance"),
    Limit("blue", True, 0.36, 0.39, "a blue cast: set the white balance"),
    Limit("blue", False, 0.215, 0.19, "a yellow cast: set the white balance"),
    Limit("dark", True, 0.43, 0.45, "nearly half of it is black: crop to the lesion"),
)


class Quality(NamedTuple):
    """What is wrong with an image, in words."""

    warnings: tuple[str, ...]
    spoilt: tuple[str, ...]  # those of the warnings that make the answer one not to be relied on


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8[3,H,W] RGB -> float32[H,W], 0..255."""
    return np.tensordot(LUMA, pixels.astype(np.float32), axes=1)


def measure(pixels: NDArray[np.uint8]) -> Measures:
    """uint8[3,H,W] RGB -> `Measures`; a millisecond at 224 pixels."""
    grey = luma(pixels)
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * grey[1:-1, 1:-1]
    highest, lowest = pixels.max(axis=0), pixels.min(axis=0)
    colour = pixels.mean(axis=(1, 2)) + 1e-6  # black is grey
    return Measures(
        brightness=float(grey.mean()) / 255,
        sharpness=float(laplacian.var()),
        saturation=float(((highest - lowest) / np.maximum(highest, 1)).mean()),
        red=float(colour[0] / colour.sum()),
        blue=float(colour[2] / colour.sum()),
        dark=float((grey < DARK).mean()),
        white=float((lowest > WHITE).mean()),
    )


def assess(measures: Measures) -> Quality:
    """The warnings about an image, and those that are severe."""
    warnings, spoilt = [], []
    for limit in LIMITS:
        sign = 1 if limit.above else -1
        value = sign * getattr(measures, limit.measure)
        if value > sign * limit.warn:
            warnings.append(limit.words)
            if limit.severe is not None and value > sign * limit.severe:
                spoilt.append(limit.words)
    return Quality(tuple(warnings), tuple(spoilt))
