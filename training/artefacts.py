"""Hairs and rulers, drawn from a seed: what lies over a lesion and must not decide about it."""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SUPERSAMPLING = 2  # drawn twice as large and reduced, so that edges are soft as in a photograph


def draw_hairs(size: int, *, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Coverage float32[size,size] in 0..1 of `count` curved hairs that cross the image."""
    side = size * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    t = np.linspace(0, 1, 16)[:, None]
    for _ in range(count):
        start, bend, end = rng.uniform(-0.2, 1.2, (3, 2)) * side
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end  # a quadratic Bézier curve
        width = rng.uniform(0.003, 0.009) * side
        pen.line([tuple(point) for point in curve], fill=int(rng.uniform(150, 255)), width=max(1, round(width)))
    return _reduced(canvas, size)


def draw_ruler(size: int, *, rng: np.random.Generator) -> NDArray[np.float32]:
    """Coverage float32[size,size] in 0..1 of a ruler's marks along one side."""
    side = size * SUPERSAMPLING
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    step, edge = rng.uniform(0.02, 0.05) * side, rng.uniform(0.0, 0.12) * side
    for mark in range(math.ceil(side / step)):
        length = side * (0.08 if mark % 5 == 0 else 0.04)
        pen.line([(mark * step, edge), (mark * step, edge + length)], fill=255, width=max(1, side // 200))
    return _reduced(canvas.rotate(90 * int(rng.integers(4))), size)


def lay_over(
    image: NDArray[np.float32], coverage: NDArray[np.float32], *, colour: tuple[float, float, float]
) -> NDArray[np.float32]:
    """float32[3,H,W] under `coverage` float32[H,W] of one colour."""
    paint = np.array(colour, dtype=np.float32)[:, None, None]
    return np.asarray(image + coverage * (paint - image), dtype=np.float32)


def _reduced(canvas: Image.Image, size: int) -> NDArray[np.float32]:
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / np.float32(255)
