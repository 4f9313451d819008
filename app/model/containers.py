"""JPEG, PNG and WebP files taken apart: what their headers say, and the bytes that decoding needs, before any decoding.

The rest of a file (colour profiles, XMP, thumbnails, further pictures, comments, what follows the end) never reaches
Pillow, which inflates and parses it. One pass over the markers or chunks; it inflates at most `MAX_TEXT` bytes.
"""

import re
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass

MAX_PARTS = 20_000  # segments or chunks of a file; libpng's usual 8 kB chunks come to 2,500 in 20 MB
MAX_TEXT = 1_000_000  # bytes inflated of a PNG's text


@dataclass(frozen=True)
class Picture:
    """A file before it is decoded."""

    kind: str  # JPEG, PNG or WEBP
    width: int  # pixels, as stored
    height: int
    depth: int  # bits per channel
    coding: int  # low byte of a JPEG's frame marker: 0xC0 and 0xC1 are sequential, 0xC2 is progressive; else 0
    scans: int  # of a JPEG; else 1
    animated: bool
    turned: int  # EXIF orientation, 1..8
    body: bytes  # a file of the same kind: header and pixels alone


# ITU T.81, table B.1
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_ALONE = {*range(0xD0, 0xD8), 0x01}  # restarts and TEM have no length
_DECODED = {*_FRAMES, 0xC4, _SOS, 0xDB, 0xDD, 0xE0, 0xEE}  # tables; APP0 and APP14 say which colours they are
_LEFT_OUT = {*range(0xE1, 0xF0), 0xCC, 0xDC, 0xFE}  # what libjpeg skips; it takes any other marker for damage
_MARKER = re.compile(rb"\xff[^\x00\xff]")  # 0 is stuffing and 0xFF is fill
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"


def read_jpeg(data: bytes) -> Picture:
    """Follow the markers to the end of the first image (ITU T.81, annex B).

    Raises:
        ValueError: no such file, or one cut short.
        struct.error, IndexError: its frame header is too short.
    """
    kept, exif, xmp, frame, coding, scans, at = [memoryview(data)[:2]], b"", b"", b"", 0, 0, 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None:
            break
        marker = found[0][1]
        if marker == _EOI:
            depth, height, width = struct.unpack_from(">BHH", frame)
            turned = orientation(exif, xmp)
            body = b"".join([*kept, found[0]])
            return Picture("JPEG", width, height, depth, coding, scans, animated=False, turned=turned, body=body)
        start, at = found.span()
        if marker in _ALONE:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        content, at = data[at + 2 : at + length], at + length
        if length < 2 or at > len(data) or marker not in _DECODED | _LEFT_OUT:
            break
        if marker in _FRAMES:
            if frame:
                break
            frame, coding = content, marker
        elif marker == _SOS:
            scans += 1
            following = _AFTER_SCAN.search(data, at)
            at = following.start() if following else len(data)
        elif marker == _APP1 and content.startswith(_EXIF):
            exif = exif or content
        elif marker == _APP1 and content.startswith(_XMP):
            xmp = content
        if marker in _DECODED:
            kept.append(memoryview(data)[start:at])
    raise ValueError("no whole JPEG")


def read_png(data: bytes) -> Picture:
    """Follow the chunks to IEND, and verify those that are kept (PNG, third edition).

    Raises:
        ValueError, struct.error: no such file, or one cut short or changed.
    """
    view = memoryview(data)
    kept, text, exif, animated, at = [view[:8]], {}, b"", False, 8
    for number in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", data, at)
        start, at = at, at + 12 + length
        if at > len(data) or (kind == b"IHDR") != (number == 0):
            break
        content = view[start + 8 : at - 4]
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            if zlib.crc32(content, zlib.crc32(kind)) != int.from_bytes(data[at - 4 : at]):
                break
            kept.append(view[start:at])
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = bytes(content[:80]).partition(b"\0")[0]
            text[key] = (kind, content[len(key) + 1 :])
        elif kind == b"eXIf":
            exif = bytes(content)
        animated |= kind == b"fdAT"  # the first frame is IDAT
        if kind == b"IEND":
            width, height, depth = struct.unpack_from(">IIB", data, 16)
            exif = exif or _raw_profile(_inflated(*text.get(b"Raw profile type exif", (b"", b""))))
            turned = orientation(exif, _inflated(*text.get(b"XML:com.adobe.xmp", (b"", b""))))
            return Picture("PNG", width, height, depth, 0, 1, animated=animated, turned=turned, body=b"".join(kept))
    raise ValueError("no whole PNG")


def _inflated(kind: bytes, content: bytes | memoryview) -> bytes:
    """Text of a tEXt, zTXt or iTXt chunk, from behind its keyword and the 0."""
    content = bytes(content)
    packed = kind == b"zTXt" or (kind == b"iTXt" and content[:1] == b"\1")
    if kind == b"iTXt":
        content = content[2:].split(b"\0", 2)[-1]  # behind language and translated keyword
    elif packed:
        content = content[1:]
    with suppress(zlib.error):
        return zlib.decompressobj().decompress(content, MAX_TEXT) if packed else content
    return b""


def _raw_profile(text: bytes) -> bytes:
    """EXIF as ImageMagick 6 writes it: an empty line, name, length, then lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def read_webp(data: bytes) -> Picture:
    """Follow the RIFF chunks (RFC 9649).

    Raises:
        ValueError, IndexError, struct.error: no such file, or one cut short.
    """
    end = 8 + int.from_bytes(data[4:8], "little")
    if end > len(data):
        raise ValueError("no whole WebP")
    view = memoryview(data)
    found: dict[bytes, memoryview] = {}
    kept, at = [], 12
    for _ in range(MAX_PARTS):
        if at + 8 > end:
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        start, at = at, at + 8 + length + length % 2
        if start + 8 + length > end:
            raise ValueError("no whole WebP")
        found.setdefault(kind, view[start + 8 : start + 8 + length])
        if kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH"):
            kept.append(view[start:at])
    width, height = _webp_size(*next(iter(found.items()), (b"", view[:0])))
    turned = orientation(bytes(found.get(b"EXIF", b"")), bytes(found.get(b"XMP ", b"")))
    chunks = b"".join(kept)
    body = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    return Picture("WEBP", width, height, 8, 0, 1, animated=b"ANMF" in found, turned=turned, body=body)


def _webp_size(kind: bytes, content: memoryview) -> tuple[int, int]:
    """Width and height from the first chunk."""
    if kind == b"VP8X":
        return int.from_bytes(content[4:7], "little") + 1, int.from_bytes(content[7:10], "little") + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no WebP")


def orientation(exif: bytes, xmp: bytes) -> int:
    """1..8 by the EXIF (2.3, tag 0x0112), or where that has none by the XMP; broken metadata is no broken image."""
    try:
        turned = _exif_orientation(re.sub(rb"^(Exif\0\0){1,2}", b"", exif))
    except (struct.error, KeyError):
        turned = 1 if exif else None
    if turned is None:
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)
        turned = int(found[1]) if found else 1
    return turned if 1 <= turned <= 8 else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """The tag in the first directory alone: no offset but that is followed, and no other value is read."""
    if not tiff:
        return None
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (at,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, at)
    for entry in range(at + 2, min(at + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind = struct.unpack_from(order + "HH", tiff, entry)
        if tag == 0x0112:
            value: int = struct.unpack_from(order + {3: "H", 4: "I"}[kind], tiff, entry + 8)[0]
            return value
    return None
