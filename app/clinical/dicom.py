"""DICOM files in: one still colour photograph, out of a file whose every length is checked before it is believed.

pydicom is not asked (docs/decisions/016-dicom-is-read-here.md). Numbers like PS3.5 are parts of the DICOM standard.
"""

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, Jpeg2KImagePlugin

from app.model import preprocess
from app.model.containers import read_jpeg
from app.model.preprocess import (
    MAX_PIXELS,
    DecodedImage,
    FormatNotServed,
    ImageError,
    ImageTooLarge,
    JpegDecoder,
    NotAnImage,
    check_size,
    shrink,
)

MAX_PARTS = 20_000  # elements of a header, nested ones among them, or fragments of a frame; usual are hundreds
MAX_HEADER_BYTES = 4_000_000  # of a deflated file, inflated

# SOP class -> what to warn of (PS3.4, B.5)
SOP_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.77.1.7": (),  # Dermoscopic Photography
    "1.2.840.10008.5.1.4.1.1.77.1.4": (),  # VL Photographic
    "1.2.840.10008.5.1.4.1.1.7": ("Secondary Capture: nothing in the file says that it is a dermoscopic photograph",),
}
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # PS3.3, C.7.6.3.1.2
_IMPLICIT, _EXPLICIT, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99"
_JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")

_PIXELS, _UNDEFINED = 0x7FE00010, 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}  # PS3.5, 7.1.2
# Says that three components are RGB where nothing else in a JPEG file says what they are; libjpeg takes them for YCbCr
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


class _Pixels(NamedTuple):
    """Where the pixel data lie in the data set."""

    start: int
    length: int  # bytes, or _UNDEFINED where they are encapsulated


@dataclass(frozen=True)
class _Header:
    width: int  # pixels
    height: int
    photometric: str  # one of COLOURS
    planar: bool  # uncompressed: all red, then all green, then all blue
    warnings: tuple[str, ...]


def is_dicom(data: bytes) -> bool:
    """Whether it is a DICOM file by its first bytes (PS3.10, 7.1)."""
    return data.startswith(b"DICM", 128)


def decode(
    data: bytes,
    *,
    size: int = 224,
    max_pixels: int = MAX_PIXELS,
    crop_frame: bool = False,
    preview_side: int = 0,
    jpeg: JpegDecoder | None = None,
    unbounded: bool = False,
) -> DecodedImage:
    """As `preprocess.decode`, and DICOM files.

    Args:
        jpeg: for JPEG files; a DICOM file's JPEG is Pillow's.
        unbounded: decode JPEG 2000 and JPEG-LS too, whose time and memory no header bounds: where this process may be
            killed, or who runs it chose the file.

    Raises:
        NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed.
    """
    if not is_dicom(data):
        return preprocess.decode(
            data, size=size, max_pixels=max_pixels, crop_frame=crop_frame, preview_side=preview_side, jpeg=jpeg
        )
    try:
        return _decode(
            data,
            size=size,
            max_pixels=max_pixels,
            crop_frame=crop_frame,
            preview_side=preview_side,
            unbounded=unbounded,
        )
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageTooLarge("the image takes more memory than the server has for it: scale it down") from error
    except Exception as error:  # struct.error, KeyError, ValueError, zlib.error, and whatever the codecs raise
        raise NotAnImage("the DICOM file is truncated or damaged: export it again") from error


def warm_up() -> None:
    """Import what some files need, where it is installed."""
    try:
        _jpeg_ls_decoder()
    except FormatNotServed:
        return


def _decode(
    data: bytes, *, size: int, max_pixels: int, crop_frame: bool, preview_side: int, unbounded: bool
) -> DecodedImage:
    syntax, body = _meta(data)
    if syntax not in (_IMPLICIT, _EXPLICIT, _DEFLATED, *_JPEG, *_CODECS):
        raise FormatNotServed(
            "the file's transfer syntax is not served: export it uncompressed, or as RLE, JPEG baseline, JPEG 2000 or "
            "JPEG-LS"
        )
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    if syntax == _DEFLATED:
        body = inflater.decompress(body, MAX_HEADER_BYTES)
    fields, pixels = _fields(body, explicit=syntax != _IMPLICIT)
    header = _check(fields, max_pixels)
    if inflater.unconsumed_tail:
        body += inflater.decompress(inflater.unconsumed_tail, 3 * header.width * header.height)
    if syntax in _JPEG:
        file = _jpeg(_frame(body, pixels), header)
        image = preprocess.decode(
            file, size=size, max_pixels=max_pixels, crop_frame=crop_frame, preview_side=preview_side
        )
    else:
        if codec := _CODECS.get(syntax):
            if codec in (_jpeg_2000, _jpeg_ls) and not unbounded:
                raise FormatNotServed(
                    "JPEG 2000 and JPEG-LS are decoded only in processes of their own: send JPEG baseline or "
                    "uncompressed, or let the server be run with DERMLENS_DECODE_ISOLATION=process"
                )
            picture = codec(_frame(body, pixels), header)
        else:
            picture = _native(_value(body, *pixels), header)
        image = shrink(
            picture.convert("RGB"),
            kind="DICOM",
            mode="RGB",
            width=header.width,
            height=header.height,
            size=size,
            crop_frame=crop_frame,
            preview_side=preview_side,
        )
    return replace(image, format="DICOM", warnings=(*header.warnings, *image.warnings))


def _meta(data: bytes) -> tuple[str, bytes]:
    """The transfer syntax, and the data set that it encodes (PS3.10, 7.1)."""
    (length,) = struct.unpack_from("<I", data, 140)
    end = 144 + length
    if data[132:140] != b"\2\0\0\0UL\4\0" or end > len(data):
        raise ValueError("no file meta information")
    for tag, start, size in _elements(data[:end], 144, explicit=True):
        if tag == 0x00020010:
            return _text(_value(data, start, size)), data[end:]
    raise ValueError("no transfer syntax")


def _fields(body: bytes, *, explicit: bool) -> tuple[dict[int, bytes], _Pixels]:
    """The short values before the pixel data, by tag, and where those are."""
    fields: dict[int, bytes] = {}
    for tag, start, length in _elements(body, 0, explicit=explicit):
        if tag == _PIXELS:
            return fields, _Pixels(start, length)
        if length <= 64:
            fields.setdefault(tag, _value(body, start, length))
    raise NotAnImage("the DICOM file holds no pixels: send the photograph itself")


def _elements(data: bytes, at: int, *, explicit: bool) -> Iterator[tuple[int, int, int]]:
    """Tag, start and length of each value up to the pixel data (PS3.5, 7); what is nested is passed over."""
    outside: list[bool] = []  # of each sequence and item of undefined length around: whether VRs were explicit
    for _ in range(MAX_PARTS):
        if at == len(data) and not outside:
            return
        group, element = struct.unpack_from("<HH", data, at)
        tag, vr = group << 16 | element, data[at + 4 : at + 6]
        if group == 0xFFFE or not explicit:
            (length,), start = struct.unpack_from("<I", data, at + 4), at + 8
        elif vr in _LONG:
            (length,), start = struct.unpack_from("<I", data, at + 8), at + 12
        else:
            (length,), start = struct.unpack_from("<H", data, at + 6), at + 8
        if tag == _PIXELS and not outside:
            yield tag, start, length
            return
        if tag in (_ITEM_END, _SEQUENCE_END):
            explicit, at = outside.pop(), start
        elif length == _UNDEFINED:
            outside.append(explicit)
            explicit, at = explicit and vr != b"UN", start  # PS3.5, 6.2.2
        else:
            if not outside:
                yield tag, start, length
            at = start + length
    raise ValueError("too many elements")


def _value(data: bytes, start: int, length: int) -> bytes:
    if start + length > len(data):
        raise ValueError("a value ends behind the file")
    return data[start : start + length]


def _text(value: bytes) -> str:
    return value.decode("ascii").strip(" \0")


def _check(fields: dict[int, bytes], max_pixels: int) -> _Header:
    """What the header says of the image (PS3.3, C.7.6.3), refused where it cannot be served."""

    def number(tag: int) -> int:
        return int(struct.unpack("<H", fields[tag])[0])

    sop_class = _text(fields[0x00080016])
    if sop_class not in SOP_CLASSES:
        raise FormatNotServed("only VL Photographic, Dermoscopic Photography and Secondary Capture files are served")
    width, height = number(0x00280011), number(0x00280010)
    frames = int(_text(fields.get(0x00280008, b"")) or 1)
    if frames != 1:
        raise FormatNotServed("files with several frames are not served: export the one frame to judge")
    check_size(width, height, max_pixels)
    photometric = _text(fields[0x00280004])
    if photometric.startswith("MONOCHROME"):
        raise FormatNotServed("monochrome files are not served: colour carries diagnostic weight")
    if photometric not in COLOURS or number(0x00280002) != 3:
        raise FormatNotServed("palettes and other colour spaces are not served: export the image as RGB")
    depth = max(number(0x00280100), number(0x00280101))
    if depth != 8 or number(0x00280103):
        raise FormatNotServed("only unsigned 8-bit samples are served: convert to 8 bits per channel")
    warnings = SOP_CLASSES[sop_class]
    if _text(fields.get(0x00280301, b"")) == "YES":
        warnings += ("text is burned into the image",)
    return _Header(width, height, photometric, 0x00280006 in fields and bool(number(0x00280006)), warnings)


def _frame(data: bytes, pixels: _Pixels) -> bytes:
    """The one frame of encapsulated pixel data: its fragments behind the offset table, joined (PS3.5, A.4)."""
    at, parts = pixels.start, list[bytes]()
    for _ in range(MAX_PARTS if pixels.length == _UNDEFINED else 0):
        group, element, length = struct.unpack_from("<HHI", data, at)
        tag, at = group << 16 | element, at + 8 + length
        if tag == _SEQUENCE_END:
            return b"".join(parts[1:])
        if tag != _ITEM:
            break
        parts.append(_value(data, at - length, length))
    raise ValueError("no whole frame")


def _native(value: bytes, header: _Header) -> Image.Image:
    """RGB or YCbCr of uncompressed pixels (PS3.5, 8.1.1)."""
    size = (header.width, header.height)
    if header.photometric == "YBR_FULL_422":  # Y, Y, Cb, Cr of each two pixels
        pairs = np.frombuffer(value, np.uint8, size[0] * size[1] * 2).reshape(-1, 4)
        both = pairs[:, [0, 2, 3, 1, 2, 3]]
        return Image.frombytes("YCbCr", size, both.tobytes())
    mode = "RGB" if header.photometric == "RGB" else "YCbCr"
    area = size[0] * size[1]
    if header.planar:
        return _merged([value[at : at + area] for at in (0, area, 2 * area)], header, "raw")
    return Image.frombytes(mode, size, value[: 3 * area])


def _merged(planes: list[bytes], header: _Header, coding: str) -> Image.Image:
    size = (header.width, header.height)
    mode = "RGB" if header.photometric == "RGB" else "YCbCr"
    return Image.merge(mode, [Image.frombytes("L", size, plane, coding, "L") for plane in planes])


def _rle(frame: bytes, header: _Header) -> Image.Image:
    """Three planes of PackBits (PS3.5, annex G)."""
    count, *offsets = struct.unpack_from("<4I", frame)
    if count != 3:
        raise ValueError("not one segment a channel")
    ends = (*offsets[1:], len(frame))
    return _merged([frame[start:end] for start, end in zip(offsets, ends, strict=True)], header, "packbits")


def _jpeg(frame: bytes, header: _Header) -> bytes:
    """A JPEG file of the frame, its EXIF left out: what a DICOM viewer shows, it turns by nothing in there."""
    picture = read_jpeg(frame)
    if (picture.width, picture.height) != (header.width, header.height):
        raise ValueError("the frame has another size than the file says")
    body = picture.body
    if header.photometric != "RGB" or b"JFIF" in body or b"Adobe" in body:
        return body
    return body[:2] + _ADOBE_RGB + body[2:]


def _jpeg_2000(frame: bytes, header: _Header) -> Image.Image:
    image = Image.open(io.BytesIO(frame), formats=(Jpeg2KImagePlugin.Jpeg2KImageFile.format,))
    if image.size != (header.width, header.height) or image.mode != "RGB":
        raise ValueError("the frame is another than the file says")
    image.load()
    if header.photometric == "YBR_FULL":  # the codestream undoes YBR_ICT and YBR_RCT itself (PS3.5, 8.2.4)
        return Image.frombytes("YCbCr", image.size, image.tobytes())
    return image


def _jpeg_ls(frame: bytes, header: _Header) -> Image.Image:
    pixels, found = _jpeg_ls_decoder()(frame)
    if (found["width"], found["height"], found["components"]) != (header.width, header.height, 3):
        raise ValueError("the frame is another than the file says")
    photometric = "RGB" if header.photometric == "RGB" else "YBR_FULL"
    return _native(bytes(pixels), replace(header, photometric=photometric, planar=found["interleave_mode"] == 0))


def _jpeg_ls_decoder() -> Callable[[bytes], tuple[bytearray, dict[str, int]]]:
    try:
        from jpeg_ls import decode_pixel_data
    except ImportError:
        raise FormatNotServed("JPEG-LS takes pip install '.[clinical]', or send JPEG baseline") from None
    decoder: Callable[[bytes], tuple[bytearray, dict[str, int]]] = decode_pixel_data
    return decoder


_CODECS: dict[str, Callable[[bytes, _Header], Image.Image]] = {
    "1.2.840.10008.1.2.5": _rle,
    "1.2.840.10008.1.2.4.80": _jpeg_ls,
    "1.2.840.10008.1.2.4.81": _jpeg_ls,
    "1.2.840.10008.1.2.4.90": _jpeg_2000,
    "1.2.840.10008.1.2.4.91": _jpeg_2000,
}
