"""Cheap measures of what a picture is like, on the pixels that the model sees; nothing here judges."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, of RGB


@dataclass(frozen=True)
class Measures:
    """Of one image."""

    brightness: float  # mean luma, 0..1
    sharpness: float  # variance of the luma's Laplacian (Pech-Pacheco et al. 2000), grey levels of 0..255 squared
    saturation: float  # mean of (max − min) / max over the channels, 0..1


def measure(pixels: NDArray[np.uint8]) -> Measures:
    """uint8[3,H,W] RGB -> `Measures`; a millisecond at 224 pixels."""
    luma = np.tensordot(LUMA, pixels.astype(np.float32), axes=1)
    centre = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * centre
    highest, lowest = pixels.max(axis=0), pixels.min(axis=0)
    return Measures(
        brightness=float(luma.mean()) / 255,
        sharpness=float(laplacian.var()),
        saturation=float(((highest - lowest) / np.maximum(highest, 1)).mean()),
    )
