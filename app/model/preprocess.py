"""Bytes -> checked RGB image -> uint8 tensor. Training and serving decode through this one function."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 64_000_000  # unless the caller says otherwise
MIN_SIDE = 16  # below this there is nothing to look at
LOW_RESOLUTION_SIDE = 200  # the training images have 224
MAX_ASPECT = 2.5  # dermoscopes give at most 16:9; squashing more than this distorts the lesion
PREVIEW_SIDE = 1024  # pixels, for a screen
# Decode a JPEG at no less than this times the target, so that the last resize still filters: at 1.5 the photographs of
# full_size are as close to a full decode as at 2 (0.0099 in probability at most) and 12 megapixels take a quarter less;
# at 1 they are twice as far from it
REDUCING_GAP = 1.5

# What undoes each EXIF orientation (EXIF 2.3, tag 0x0112)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (TURNS[5], TURNS[6], TURNS[7], TURNS[8])


# Whole JPEG file, side -> uint8[3,side,side] RGB as the file has it, its EXIF turn not undone
JpegDecoder = Callable[[bytes, int], NDArray[np.uint8]]


class ImageError(ValueError):
    """An image that cannot be served; the message says what to do about it."""


class NotAnImage(ImageError):
    """The bytes are no image, or a damaged one."""


class ImageTooLarge(ImageError):
    """More pixels than the limit, seen in the header and not decoded."""


class ImageTooSmall(ImageError):
    """Fewer pixels on a side than `MIN_SIDE`."""


class FormatNotServed(ImageError):
    """A real image of a format, mode or depth that the model was not made for."""


@dataclass(frozen=True)
class DecodedImage:
    """A decoded upload: what the model sees, what a person is shown, and what was noticed."""

    pixels: NDArray[np.uint8]  # uint8[3,size,size] RGB
    preview: Image.Image  # RGB, upright; see `decode`
    width: int  # pixels, upright, as uploaded
    height: int
    format: str
    warnings: tuple[str, ...]


def decode(
    data: bytes,
    *,
    size: int = 224,
    max_pixels: int = MAX_PIXELS,
    preview_side: int = 0,
    jpeg: JpegDecoder | None = None,
) -> DecodedImage:
    """Decode, check and resize one image to `uint8[3,size,size]`.

    The aspect ratio is not kept: the paper's images were squashed to a square (docs/decisions/001-squash.md).

    Args:
        data: the whole file.
        size: side of the square that the model takes, pixels.
        max_pixels: largest width × height accepted.
        preview_side: longest side of a preview that keeps the aspect ratio, pixels; with 0 nobody will look, and the
            preview is what the model sees.
        jpeg: decodes JPEGs of which no preview is wanted, in place of Pillow; ValueError for one that it cannot.

    Raises:
        NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed.
    """
    image = _open(data)
    width, height = image.size
    _check(image, data, max_pixels)
    # A phone writes a JPEG with a second picture (gain map, preview) behind the first: Pillow calls it MPO
    kind, mode = "JPEG" if image.format == "MPO" else str(image.format), image.mode
    elsewhere = jpeg if (kind, mode) == ("JPEG", "RGB") and not preview_side else None
    try:
        if elsewhere is not None:
            loaded = Image.fromarray(elsewhere(data, size).transpose(1, 2, 0))
        else:
            # libjpeg scales by 1/2, 1/4 or 1/8 inside the DCT: a 12-megapixel photograph costs a fraction of a full
            # decode; other formats know no draft
            image.draft("RGB", (int(REDUCING_GAP * size), int(REDUCING_GAP * size)))
            image.load()
            loaded = image
    except (OSError, SyntaxError, ValueError, MemoryError, OverflowError, EOFError) as error:
        raise NotAnImage(f"the {kind} file is truncated or damaged: export it again") from error
    turn = TURNS.get(_orientation(image))
    upright = loaded if turn is None else loaded.transpose(turn)
    if turn in SIDEWAYS:
        width, height = height, width
    rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    square = rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
    preview = rgb if preview_side else square
    if preview_side and max(rgb.size) > preview_side:
        preview.thumbnail((preview_side, preview_side), Image.Resampling.BILINEAR, reducing_gap=REDUCING_GAP)
    return DecodedImage(
        pixels=pixels,
        preview=preview,
        width=width,
        height=height,
        format=kind,
        warnings=_warnings(mode, width, height),
    )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; whatever else the EXIF holds is never parsed, and broken EXIF is no broken image."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow's EXIF reader raises struct.error, TypeError, AttributeError and more on odd tags
        return 1


def _open(data: bytes) -> Image.Image:
    if not data:
        raise NotAnImage("the upload is empty: send the bytes of a JPEG, PNG or WebP file")
    try:
        return Image.open(io.BytesIO(data))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge("the image has far too many pixels: scale it down") from error
    except UnidentifiedImageError as error:
        raise NotAnImage("the upload is not an image: send a JPEG, PNG or WebP file") from error
    except (OSError, SyntaxError, ValueError, MemoryError, OverflowError, EOFError) as error:
        raise NotAnImage("the image file is damaged: export it again") from error


def _check(image: Image.Image, data: bytes, max_pixels: int) -> None:
    width, height = image.size
    if image.format not in (*FORMATS, "MPO"):
        raise FormatNotServed(f"{image.format} is not served: convert the image to JPEG, PNG or WebP")
    if width * height > max_pixels:
        limit = max_pixels / 1e6
        raise ImageTooLarge(f"{width}×{height} is over the limit of {limit:g} megapixels: scale it down")
    if min(width, height) < MIN_SIDE:
        raise ImageTooSmall(f"{width}×{height} is too small to judge: each side needs {MIN_SIDE} pixels or more")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise FormatNotServed("animated images are not served: send one still frame")
    if image.mode == "CMYK":
        raise FormatNotServed("CMYK images are not served: convert to RGB, colour carries diagnostic weight")
    # Pillow reads 16-bit RGB PNGs as 8-bit without a word; byte 24 of a PNG is its bit depth
    if image.mode.startswith(("I", "F")) or (image.format == "PNG" and data[24] > 8):
        raise FormatNotServed("16-bit images are not served: convert to 8 bits per channel")


def _warnings(mode: str, width: int, height: int) -> tuple[str, ...]:
    found = []
    if mode in ("1", "L", "LA"):
        found.append("greyscale image: the model was trained on colour")
    if mode in ("RGBA", "LA", "PA"):
        found.append("transparency was ignored")
    if min(width, height) < LOW_RESOLUTION_SIDE:
        found.append(f"low resolution: the shorter side has {min(width, height)} pixels, 224 or more is better")
    if max(width, height) > MAX_ASPECT * min(width, height):
        found.append(f"extreme aspect ratio {max(width, height) / min(width, height):.1f}:1: crop to the lesion")
    return tuple(found)
