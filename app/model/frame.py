"""The dark frame of some dermoscopes, found so that it can be cropped away: networks take it for a sign of cancer.

At home and at other clinics alike, framed images are malignant more often (docs/decisions/019-crop-frames.md).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.model.quality import DARK, luma

MOST_DARK = 0.15  # of an outermost row or column that still belongs to the picture
LEAST_SIDE = 0.4  # of the picture; what is darker than this is dark, and not framed
CORNER = 2  # pixels from the edges: compression blurs the outermost ones


class Box(NamedTuple):
    """A part of a picture, in fractions of its width and height."""

    left: float
    top: float
    right: float
    bottom: float

    def of(self, width: float, height: float) -> tuple[float, float, float, float]:
        """The same in pixels of a picture: left, top, right, bottom."""
        return self.left * width, self.top * height, self.right * width, self.bottom * height


WHOLE = Box(0, 0, 1, 1)


def lit_part(pixels: NDArray[np.uint8]) -> Box | None:
    """The part of uint8[3,H,W] RGB within a dark frame; None where there is no frame, or little beside it.

    From the whole picture, the darkest of the four outermost lines goes until none is dark: of a bright disc, about the
    square within it is left.
    """
    edge = slice(CORNER, None, pixels.shape[1] - 2 * CORNER - 1), slice(CORNER, None, pixels.shape[2] - 2 * CORNER - 1)
    if (luma(pixels[:, *edge]) >= DARK).all():
        return None
    dark = luma(pixels) < DARK
    height, width = dark.shape
    left, top, right, bottom = 0, 0, width, height
    while True:
        part = dark[top:bottom, left:right]
        lines = [part[:, 0].mean(), part[0].mean(), part[:, -1].mean(), part[-1].mean()]
        darkest = int(np.argmax(lines))
        if lines[darkest] <= MOST_DARK:
            break
        left, top = left + (darkest == 0), top + (darkest == 1)
        right, bottom = right - (darkest == 2), bottom - (darkest == 3)
        if right - left < LEAST_SIDE * width or bottom - top < LEAST_SIDE * height:
            return None
    if (left, top, right, bottom) == (0, 0, width, height):
        return None
    return Box(left / width, top / height, right / width, bottom / height)
