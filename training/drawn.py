"""Lesion-like images drawn from a seed: the suite and the smoke run prove the product where no data is present."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

PER_CLASS = 40


def draw_lesion(kind: int, seed: int, *, size: tuple[int, int] = (224, 224)) -> Image.Image:
    """An RGB picture of skin with a pigmented spot: the higher `kind`, the darker and more ragged."""
    rng = np.random.default_rng([kind, seed])
    width, height = size
    skin = np.array([222, 178, 154]) + rng.normal(0, 8, 3)
    noise = rng.normal(0, 5, (height, width, 1)) + skin
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8), "RGB")
    draw = ImageDraw.Draw(image)
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    middle = np.array(size) * (0.5 + rng.uniform(-0.15, 0.15, 2))
    # Three lobes, scattered enough that no two drawings pass for frames of one lesion
    for centre in middle + min(size) * rng.uniform(-0.12, 0.12, (3, 2)):
        ragged = 1 + (0.05 + 0.2 * kind) * np.interp(angles, np.linspace(0, 2 * np.pi, 13), rng.normal(0, 1, 13))
        radius = min(size) * rng.uniform(0.06, 0.16) * ragged.clip(0.4, 1.7)
        points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius[:, None] + centre
        colour = (np.array([160, 104, 72]) - 50 * kind + rng.normal(0, 12, 3)).clip(10, 255)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=tuple(int(c) for c in colour))
    return image.filter(ImageFilter.GaussianBlur(min(size) / 110))


def draw_dataset(classes: list[str]) -> Iterator[tuple[str, int, bytes]]:
    """`PER_CLASS` PNG files a class as (name, label, bytes)."""
    for label, kind in enumerate(classes):
        for number in range(PER_CLASS):
            buffer = io.BytesIO()
            draw_lesion(label, number, size=(96, 96)).save(buffer, "PNG")
            yield f"{kind}/{number:03d}.png", label, buffer.getvalue()
