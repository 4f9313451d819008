"""Augmentation as a pure function of images and uniform random numbers.

The numbers come from (seed, epoch, image), never from the process, so that an interrupted run resumes exactly and
several processes see what one would. Geometry and resizing are one interpolation, colour is one matrix.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.artefacts import draw_hairs, draw_ruler, lay_over
from training.config import Augmentation
from training.corruptions import jpeg

UNIFORMS = 23  # random numbers that one image uses
MOST_HAIRS = 20


def augment(images: Tensor, uniforms: Tensor, *, size: int, strength: Augmentation) -> Tensor:
    """uint8[B,3,H,W] and float[B,UNIFORMS] in 0..1 -> float32[B,3,size,size] in 0..255."""
    u = uniforms.unbind(dim=1)
    grid = F.affine_grid(_geometry(uniforms, strength), [len(images), 3, size, size], align_corners=False)
    # Reflection keeps skin at the border, where zeros would draw a black wedge that means nothing
    out = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    if strength.blur:
        # Half of the images stay as sharp as they are
        out = torch.lerp(out, _reduced(out), (2 * u[14] - 1).clamp(min=0)[:, None, None, None] * strength.blur)
    if strength.hairs:
        out = _artefacts(out, u[15], u[16], strength.hairs)
    out = _colour(out, uniforms, strength).clamp(0, 255)
    if strength.noise or strength.jpeg:
        out = _recorded(out, u[20], u[21], u[22], strength)
    return _erase(out, u[11], u[12], u[13] * strength.erase)


def mixup(images: Tensor, labels: Tensor, *, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each image float[B,3,S,S] and label row float[B,K] mixed with those of the next in the batch."""
    shape = torch.full((len(images), 2), alpha)
    drawn = torch._standard_gamma(shape, generator=generator)
    weight = (drawn[:, 0] / drawn.sum(1).clamp(min=1e-12)).to(images.device)
    weight = torch.maximum(weight, 1 - weight)  # the image itself stays the larger part
    mixed = torch.lerp(images.roll(1, 0), images, weight[:, None, None, None])
    return mixed, torch.lerp(labels.roll(1, 0), labels, weight[:, None])


def _reduced(images: Tensor) -> Tensor:
    """The images at a quarter of their resolution, in their own size."""
    return F.interpolate(F.avg_pool2d(images, 4), size=images.shape[-2:], mode="bilinear", align_corners=False)


def _artefacts(images: Tensor, chance: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Hairs on a share of the images, a ruler on half as many."""
    out = images.clone()
    for row in torch.nonzero(chance < probability).flatten().tolist():
        rng = _generator(seeds[row])
        picture, size = out[row].numpy(), images.shape[-1]
        shade = float(rng.uniform(10, 70))
        hairs = draw_hairs(size, count=int(rng.integers(1, MOST_HAIRS)), rng=rng)
        picture = lay_over(picture, hairs, colour=(shade * 1.3, shade, shade * 0.8))
        if chance[row] < probability / 2:
            picture = lay_over(picture, draw_ruler(size, rng=rng), colour=(20.0, 20.0, 20.0))
        out[row] = torch.from_numpy(picture)
    return out


def _recorded(images: Tensor, noise: Tensor, seeds: Tensor, compression: Tensor, strength: Augmentation) -> Tensor:
    """What a sensor and a file add: Gaussian noise on half of the images, JPEG's blocks on half."""
    out = images.clone()
    deviations = (2 * noise - 1) * strength.noise * 255
    qualities = 100 * (1 - (2 * compression - 1) * strength.jpeg)
    for row, (deviation, quality) in enumerate(zip(deviations.tolist(), qualities.tolist(), strict=True)):
        if deviation > 0:
            rng = _generator(seeds[row])
            out[row] += deviation * torch.from_numpy(rng.standard_normal(out[row].shape, dtype=np.float32))
        if quality < 100:
            picture = out[row].round().clamp(0, 255).byte().numpy()
            out[row] = torch.from_numpy(jpeg(picture, quality=max(1, round(quality))))
    return out.clamp(0, 255)


def _generator(uniform: Tensor) -> np.random.Generator:
    """Seeded by a random number of the image, so that its batch does not matter."""
    return np.random.default_rng(int(uniform.double() * 2**24))


def _around(uniform: Tensor, half_width: float) -> Tensor:
    return (2 * uniform - 1) * half_width


def _geometry(uniforms: Tensor, strength: Augmentation) -> Tensor:
    """float[B,2,3]: output to input coordinates; flip, rotation, anisotropic scale, shear and shift."""
    u = uniforms.unbind(dim=1)
    angle = _around(u[1], math.radians(strength.rotation))
    flip = torch.where(u[0] < 0.5, -1.0, 1.0)
    scale_x = torch.exp(_around(u[2], strength.scale))
    scale_y = scale_x * torch.exp(_around(u[3], strength.scale / 2))
    shear = _around(u[4], strength.shear)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = [
        torch.stack([flip * scale_x * cos, scale_y * (shear * cos - sin), _around(u[5], 2 * strength.shift)], 1),
        torch.stack([flip * scale_x * sin, scale_y * (shear * sin + cos), _around(u[6], 2 * strength.shift)], 1),
    ]
    return torch.stack(rows, dim=1)


def _colour(images: Tensor, uniforms: Tensor, strength: Augmentation) -> Tensor:
    """Brightness, contrast about the image's mean, and saturation with hue as a turn about the grey axis."""
    u = uniforms.unbind(dim=1)
    gain = 1 + _around(u[7], strength.brightness)
    contrast = 1 + _around(u[8], strength.contrast)
    saturation = 1 + _around(u[9], strength.saturation)
    hue = _around(u[10], math.radians(strength.hue))
    grey = torch.full((3, 3), 1 / 3)
    root = math.sqrt(1 / 3)
    turn = torch.tensor([[0.0, -root, root], [root, 0.0, -root], [-root, root, 0.0]])  # cross product with grey
    chroma = torch.eye(3) - grey
    cos, sin = torch.cos(hue)[:, None, None], torch.sin(hue)[:, None, None]
    matrix = gain[:, None, None] * (grey + saturation[:, None, None] * (cos * chroma + sin * turn))
    matrix = (1 + _around(uniforms[:, 17:20], strength.tint))[:, :, None] * matrix
    out = torch.einsum("bij,bjhw->bihw", matrix, images)
    mean = out.mean(dim=(1, 2, 3), keepdim=True)
    return mean + contrast[:, None, None, None] * (out - mean)


def _erase(images: Tensor, x: Tensor, y: Tensor, side: Tensor) -> Tensor:
    """Fill a box (centre x, y and side in fractions) with the image's mean colour."""
    line = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    half = side[:, None] / 2
    inside = ((line - y[:, None]).abs() < half)[:, :, None] & ((line - x[:, None]).abs() < half)[:, None, :]
    return torch.where(inside[:, None], images.mean(dim=(2, 3), keepdim=True), images)
