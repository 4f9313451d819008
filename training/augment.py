"""Augmentation as a pure function of images and uniform random numbers.

The numbers come from (seed, epoch, image), never from the process, so that an interrupted run resumes exactly and
several processes see what one would. Geometry and resizing are one interpolation, colour is one matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from training.config import Augmentation

UNIFORMS = 14  # random numbers that one image uses


def augment(images: Tensor, uniforms: Tensor, *, size: int, strength: Augmentation) -> Tensor:
    """uint8[B,3,H,W] and float[B,UNIFORMS] in 0..1 -> float32[B,3,size,size] in 0..255."""
    u = uniforms.unbind(dim=1)
    grid = F.affine_grid(_geometry(uniforms, strength), [len(images), 3, size, size], align_corners=False)
    # Reflection keeps skin at the border, where zeros would draw a black wedge that means nothing
    out = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    out = _colour(out, uniforms, strength).clamp(0, 255)
    return _erase(out, u[11], u[12], u[13] * strength.erase)


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
    out = torch.einsum("bij,bjhw->bihw", matrix, images)
    mean = out.mean(dim=(1, 2, 3), keepdim=True)
    return mean + contrast[:, None, None, None] * (out - mean)


def _erase(images: Tensor, x: Tensor, y: Tensor, side: Tensor) -> Tensor:
    """Fill a box (centre x, y and side in fractions) with the image's mean colour."""
    line = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    half = side[:, None] / 2
    inside = ((line - y[:, None]).abs() < half)[:, :, None] & ((line - x[:, None]).abs() < half)[:, None, :]
    return torch.where(inside[:, None], images.mean(dim=(2, 3), keepdim=True), images)
