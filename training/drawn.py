"""Lesion-like images drawn from a seed: the suite and the smoke run prove the product where no data is present."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from app.model.metadata import SEXES, SITES, Metadata

PER_CLASS = 40
TRUE_LOOKS = 0.8  # share of drawn cases that look like what they are
MISSING = 0.25  # share of drawn cases that lack a field, each field by itself


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
            yield f"{kind}/{number:03d}.png", label, _png(label, number)


def _png(kind: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_lesion(kind, seed, size=(96, 96)).save(buffer, "PNG")
    return buffer.getvalue()


class Case(NamedTuple):
    """A drawn lesion, and what is drawn to be known of it."""

    image: bytes  # PNG
    label: int
    metadata: Metadata


def draw_cases(count: int, *, seed: int, effect: float = 1) -> Iterator[Case]:
    """Lesions whose class, 0 or 1, leans on an age and a site that were drawn first; their sex says nothing.

    One in five looks like the other class, so that no image alone can tell; none of them is of `draw_dataset`.

    Args:
        effect: how much age and site say; with 0 nothing.
    """
    rng = np.random.default_rng(seed)
    for number in range(count):
        age, sex, site = float(rng.integers(20, 91)), int(rng.integers(len(SEXES))), int(rng.integers(len(SITES)))
        leaning = effect * ((age - 55) / 20 + (1 if site % 2 else -1))
        label = int(rng.random() < 1 / (1 + np.exp(-leaning)))
        look = label if rng.random() < TRUE_LOOKS else 1 - label
        known = rng.random(3) >= MISSING
        yield Case(
            _png(look, PER_CLASS + count * seed + number),
            label,
            Metadata(
                age=age if known[0] else None,
                sex=SEXES[sex] if known[1] else None,
                site=SITES[site] if known[2] else None,
            ),
        )
