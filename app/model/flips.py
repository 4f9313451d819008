"""Test-time augmentation: the answer for an image and its mirror images, averaged."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Tta = Literal["none", "flips"]
AXES: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))  # none, left and right, top and bottom, both


def flips(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """The four of uint8[3,S,S], itself first."""
    return [np.ascontiguousarray(np.flip(pixels, axes)) for axes in AXES]


def mean_logits(logits: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """[K] of the four."""
    return np.asarray(np.mean(logits, axis=0), dtype=np.float32)


def mean_cam(cams: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """[K,H,W] of the four, each turned back; or of the first alone."""
    upright = [np.flip(cam, axes) for cam, axes in zip(cams, AXES, strict=False)]
    return np.asarray(np.mean(upright, axis=0), dtype=np.float32)
