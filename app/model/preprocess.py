"""Bytes -> checked RGB image -> uint8 tensor. Training and serving decode through this one function."""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from app.model.containers import Picture, read_jpeg, read_png, read_webp
from app.model.frame import Box, lit_part

# Named, so that Pillow loads no other plugin; it is never asked for another
FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
MAX_PIXELS = 64_000_000  # unless the caller says otherwise
MIN_SIDE = 16  # below this there is nothing to look at
LOW_RESOLUTION_SIDE = 200  # the training images have 224
MAX_ASPECT = 2.5  # dermoscopes give at most 16:9; squashing more than this distorts the lesion
PREVIEW_SIDE = 1024  # pixels, for a screen
# Decode a JPEG at no less than this times the target, so that the last resize still filters: at 1.5 the photographs of
# full_size are as close to a full decode as at 2 (0.0099 in probability at most) and 12 megapixels take a quarter less;
# at 1 they are twice as far from it
REDUCING_GAP = 1.5

# A progressive file has about 10 scans. One over 64 megapixels costs 38 ms and 117 bytes: 20 MB of them take hours
MAX_SCANS = 50
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS

# Offset, magic bytes and name of what people send by mistake; nothing here parses it
OTHERS = (
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "TIFF"),
    (4, b"ftyphe", "HEIC"),
    (4, b"ftypmif1", "HEIC"),
    (4, b"ftypavi", "AVIF"),
    (4, b"jP  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (128, b"DICM", "DICOM"),
    (0, b"8BPS", "PSD"),
    (0, b"\0\0\1\0", "ICO"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"<svg", "SVG"),
)

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


# JPEG file, side -> uint8[3,side,side] RGB as the file has it, its EXIF turn not undone
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
    lit: Box | None = None  # what of it the model sees, where a dark frame was cropped away


def decode(
    data: bytes,
    *,
    size: int = 224,
    max_pixels: int = MAX_PIXELS,
    crop_frame: bool = False,
    preview_side: int = 0,
    jpeg: JpegDecoder | None = None,
) -> DecodedImage:
    """Decode, check and resize one image to `uint8[3,size,size]`.

    The aspect ratio is not kept: the paper's images were squashed to a square (docs/decisions/001-squash.md).

    Args:
        data: the whole file.
        size: side of the square that the model takes, pixels.
        max_pixels: largest width × height accepted, within Pillow's own 89 million.
        crop_frame: leave a dark frame away before resizing; the preview keeps it.
        preview_side: longest side of a preview that keeps the aspect ratio, pixels; with 0 nobody will look, and the
            preview is what the model sees.
        jpeg: decodes JPEGs of which neither a preview nor a part is wanted, in place of Pillow, which takes those that
            are a ValueError to it.

    Raises:
        NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed.
    """
    picture = _read(data)
    _check(picture, max_pixels)
    try:
        return _decode(picture, size=size, crop_frame=crop_frame, preview_side=preview_side, jpeg=jpeg)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageTooLarge("the image takes more memory than the server has for it: scale it down") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, EOFError, struct.error, ...
        raise NotAnImage(f"the {picture.kind} file is truncated or damaged: export it again") from error


def _read(data: bytes) -> Picture:
    """The header, by the first bytes: Pillow's plugins never see another format."""
    if not data:
        raise NotAnImage("the upload is empty: send the bytes of a JPEG, PNG or WebP file")
    for offset, magic, name in OTHERS:
        if data.startswith(magic, offset):
            raise FormatNotServed(f"{name} is not served: convert the image to JPEG, PNG or WebP")
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return read_jpeg(data)
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return read_png(data)
        if data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
            return read_webp(data)
    except (ValueError, IndexError, struct.error) as error:
        raise NotAnImage("the image file is truncated or damaged: export it again") from error
    raise NotAnImage("the upload is not an image: send a JPEG, PNG or WebP file")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse by what a header says, before anything is decoded; raises ImageTooLarge, ImageTooSmall."""
    max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # above it, Pillow warns
    if width * height > max_pixels:
        limit = max_pixels / 1e6
        raise ImageTooLarge(f"{width}×{height} is over the limit of {limit:g} megapixels: scale it down")
    if min(width, height) < MIN_SIDE:
        raise ImageTooSmall(f"{width}×{height} is too small to judge: each side needs {MIN_SIDE} pixels or more")


def _check(picture: Picture, max_pixels: int) -> None:
    width, height = picture.width, picture.height
    check_size(width, height, max_pixels)
    if picture.scans > MAX_SCANS or picture.scans * width * height > MAX_SCANNED_PIXELS:
        raise NotAnImage(f"the JPEG file has {picture.scans} scans, where 10 are usual: export it again")
    if picture.animated:
        raise FormatNotServed("animated images are not served: send one still frame")
    if picture.depth > 8:
        raise FormatNotServed(f"{picture.depth}-bit images are not served: convert to 8 bits per channel")
    if picture.coding not in (0, 0xC0, 0xC1, 0xC2):
        raise FormatNotServed("lossless and arithmetic-coded JPEGs are not served: export a usual JPEG, PNG or WebP")


def _decode(
    picture: Picture, *, size: int, crop_frame: bool, preview_side: int, jpeg: JpegDecoder | None
) -> DecodedImage:
    width, height = picture.width, picture.height
    image: Image.Image = Image.open(io.BytesIO(picture.body), formats=(picture.kind,))
    if image.size != (width, height):
        raise NotAnImage("the image file contradicts itself about its size: export it again")
    mode = image.mode
    if mode == "CMYK":
        raise FormatNotServed("CMYK images are not served: convert to RGB, colour carries diagnostic weight")
    pixels = None
    # It gives no more pixels than the model sees: too few for a part of them
    if jpeg is not None and (picture.kind, mode) == ("JPEG", "RGB") and not (preview_side or crop_frame):
        with suppress(ValueError):
            pixels = jpeg(picture.body, size)
    if pixels is not None:
        image = Image.fromarray(pixels.transpose(1, 2, 0))
    else:
        # libjpeg scales by 1/2, 1/4 or 1/8 inside the DCT: a 12-megapixel photograph costs a fraction of a full
        # decode; other formats know no draft
        image.draft("RGB", (int(REDUCING_GAP * size), int(REDUCING_GAP * size)))
        image.load()
    turn = TURNS.get(picture.turned)
    if turn in SIDEWAYS:
        width, height = height, width
    return shrink(
        image,
        kind=picture.kind,
        mode=mode,
        width=width,
        height=height,
        size=size,
        crop_frame=crop_frame,
        preview_side=preview_side,
        turn=turn,
    )


def shrink(
    image: Image.Image,
    *,
    kind: str,
    mode: str,
    width: int,
    height: int,
    size: int,
    crop_frame: bool,
    preview_side: int,
    turn: Image.Transpose | None = None,
) -> DecodedImage:
    """The last step of `decode`, for pixels from anywhere; `image` may have been scaled, and is changed.

    Args:
        mode: Pillow's name of what was stored.
        width, height: pixels, upright, as uploaded.
        turn: what makes `image` upright.
    """
    squares = [part.resize((size, size), Image.Resampling.BILINEAR) for part in _upright(image, turn)]
    pixels, preview = _array(squares), _joined(squares)
    warnings = _warnings(mode, width, height)
    if lit := lit_part(pixels) if crop_frame else None:
        parts = _upright(image, turn)
        pixels = _array([p.resize((size, size), Image.Resampling.BILINEAR, box=lit.of(*p.size)) for p in parts])
        warnings = (*warnings, "a dark frame was cropped away")
    if preview_side:
        previews = []
        for part in _upright(image, turn):  # last, because `part` may be the image itself
            if max(part.size) > preview_side:
                part.thumbnail((preview_side, preview_side), Image.Resampling.BILINEAR, reducing_gap=REDUCING_GAP)
            previews.append(part)
        preview = _joined(previews)
    return DecodedImage(pixels, preview, width=width, height=height, format=kind, warnings=warnings, lit=lit)


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Iterator[Image.Image]:
    """RGB or grey, or the channels of RGB one by one, upright: a second copy of the whole takes 4 bytes a pixel."""
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode in ("L", "RGB") and turn is None:
        yield image
        return
    for channel in range(3 if image.mode.startswith("RGB") else 1):
        part = image.getchannel(channel)
        yield part if turn is None else part.transpose(turn)


def _joined(parts: list[Image.Image]) -> Image.Image:
    """RGB of what `_upright` gave: itself, or its channels; one channel is grey."""
    return parts[0] if parts[0].mode == "RGB" else Image.merge("RGB", parts if len(parts) == 3 else 3 * parts)


def _array(parts: list[Image.Image]) -> NDArray[np.uint8]:
    """The same as uint8[3,H,W]."""
    return np.ascontiguousarray(np.asarray(_joined(parts)).transpose(2, 0, 1))


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
