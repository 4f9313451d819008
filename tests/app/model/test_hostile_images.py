"""Every hostile file is one of the four errors or a harmless image, and costs little time and memory."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from app.model import containers
from app.model.preprocess import (
    MAX_SCANS,
    FormatNotServed,
    ImageError,
    ImageTooLarge,
    ImageTooSmall,
    NotAnImage,
    decode,
)
from tests.conftest import ROOT, encode
from training.drawn import draw_lesion

LESION = draw_lesion(1, 3, size=(320, 240))
JPEG = encode(LESION, "JPEG")
PNG = encode(LESION)
WEBP = encode(LESION, "WEBP")
PIXELS = {"JPEG": decode(JPEG).pixels, "PNG": decode(PNG).pixels, "WEBP": decode(WEBP).pixels}
MB = 1 << 20


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segments(*segments: bytes, data: bytes = JPEG) -> bytes:
    """A JPEG with more segments behind its first two bytes."""
    return data[:2] + b"".join(segments) + data[2:]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunks(*chunks: bytes, data: bytes = PNG) -> bytes:
    """A PNG with more chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 2, packed: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = rows if packed else zlib.compress(rows, 1)
    return PNG[:8] + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int, *, depth: int = 8, marker: int = 0xC0) -> bytes:
    """The lesion's JPEG with another size, depth or coding in its frame header."""
    at = JPEG.index(b"\xff\xc0")
    return JPEG[:at] + struct.pack(">BBHBHH", 0xFF, marker, 17, depth, height, width) + JPEG[at + 9 :]


@cache
def zeros(size: int) -> bytes:
    """Zlib stream of so many zeros, a thousandth of their size."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(min(MB, size - at))) for at in range(0, size, MB)) + deflate.flush()


def ifd(*entries: tuple[int, int, int, bytes], order: str = "<", count: int | None = None, at: int = 8) -> bytes:
    """EXIF of one directory whose successor is itself."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    table = b"".join(struct.pack(order + "HHI", tag, kind, number) + value for tag, kind, number, value in entries)
    count = len(entries) if count is None else count
    return b"Exif\0\0" + head + struct.pack(order + "H", count) + table + struct.pack(order + "I", 8)


@contextmanager
def allocating_at_most(size: int) -> Iterator[None]:
    """Of Python's own memory, what zlib inflates to and EXIF values among it."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def bomb(scans: int, *, side: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(Image.new("RGB", (side, side), (120, 90, 80)), "JPEG", progressive=True)
    assert data.count(b"\xff\xda") == 10
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * (scans - 10) + data[-2:]


@pytest.mark.parametrize(
    "data",
    [
        png(100_000, 100_000, b""),
        png(2**31 - 1, 2**31 - 1, b""),
        png(64_000_001, 1, b""),
        png(1, 64_000_001, b""),
        jpeg_header(65_535, 65_535),
        jpeg_header(9_000, 8_000),
        riff((b"VP8X", bytes(4) + b"\xff\xff\xff\xff\xff\xff"), (b"VP8 ", b"")),
        riff((b"VP8 ", b"\x30\x01\x00\x9d\x01\x2a\xff\x3f\xff\x3f")),
        riff((b"VP8L", b"\x2f\xff\xff\xff\x0f")),
    ],
    ids=["png", "png-max", "png-row", "png-column", "jpeg", "jpeg-72-mp", "webp-canvas", "webp-lossy", "webp-lossless"],
)
def test_a_header_that_announces_too_many_pixels_is_refused_before_decoding(data: bytes) -> None:
    with pytest.raises(ImageTooLarge):
        decode(data)


def test_above_pillows_own_limit_the_servers_limit_does_not_count() -> None:
    with pytest.raises(ImageTooLarge, match=r"89\."):
        decode(png(10_000, 10_000, b""), max_pixels=1_000_000_000)


@pytest.mark.parametrize(
    "data",
    [png(64_000_000, 1, b""), png(1, 64_000_000, b""), png(15, 4_000_000, b""), png(0, 0, b""), jpeg_header(0, 0)],
)
def test_no_side_is_too_short(data: bytes) -> None:
    with pytest.raises(ImageTooSmall):
        decode(data)


# What is around the pixels


TEXT = b"Comment\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
ICC = b"ICC_PROFILE\0"
HARMLESS: dict[str, Callable[[], bytes]] = {
    "png-icc-bomb": lambda: with_chunks(chunk(b"iCCP", b"icc\0\0" + zeros(150 * MB))),
    "png-1000-icc-bombs": lambda: with_chunks(chunk(b"iCCP", b"icc\0\0" + zeros(MB - 1)) * 1000),
    "png-icc-broken": lambda: with_chunks(chunk(b"iCCP", b"icc\0\7nothing")),
    "png-icc-empty": lambda: with_chunks(chunk(b"iCCP", b"")),
    "png-ztxt-bomb": lambda: with_chunks(chunk(b"zTXt", TEXT + b"\0" + zeros(150 * MB))),
    "png-itxt-bomb": lambda: with_chunks(chunk(b"iTXt", TEXT + b"\1\0\0\0" + zeros(150 * MB))),
    "png-exif-bomb": lambda: with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0" + zeros(150 * MB)) * 3),
    "png-xmp-bomb": lambda: with_chunks(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros(150 * MB)) * 3),
    "png-text-broken": lambda: with_chunks(chunk(b"iTXt", b""), chunk(b"zTXt", b"x"), chunk(b"tEXt", b"\0")),
    "png-xmp-broken": lambda: with_chunks(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1"), chunk(b"zTXt", b"Raw profile type exif\0\0\1\2\3")
    ),
    "png-exif-not-hex": lambda: with_chunks(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  4\n\xff\xffzz\n")),
    "png-short-chunks": lambda: with_chunks(*(chunk(k, b"") for k in (b"gAMA", b"cHRM", b"pHYs", b"acTL", b"fcTL"))),
    "png-exif-huge": lambda: with_chunks(chunk(b"eXIf", ifd(count=65_535)[6:] + bytes(5 * MB))),
    "jpeg-icc-broken": lambda: with_segments(segment(0xE2, ICC), segment(0xE2, ICC + b"\xff\x01junk") * 200),
    "jpeg-xmp-huge": lambda: with_segments(segment(0xE1, XMP + b'tiff:Orientation="' * 3000) * 50),
    "jpeg-photoshop": lambda: with_segments(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\0\0\0\xff\xff\xff\xff" * 99)),
    "jpeg-mpf-broken": lambda: with_segments(segment(0xE2, b"MPF\0" + os.urandom(60))),
    "jpeg-trailing": lambda: JPEG + bytes(5 * MB),
    "jpeg-trailing-scans": lambda: JPEG + b"\xff\xda" * MB,
    "jpeg-zip": lambda: JPEG + b"PK\3\4" + bytes(100) + b"PK\5\6" + bytes(18),
    "png-html": lambda: with_chunks(chunk(b"tEXt", b"Comment\0<script>alert(1)</script>")) + b"<html></html>",
    "webp-trailing": lambda: WEBP + b"%PDF-1.7",
}
HARMLESS |= {
    f"jpeg-exif-{name}": partial(with_segments, segment(0xE1, exif))
    for name, exif in {
        "empty": b"Exif\0\0",
        "cyclic": ifd((0x8769, 4, 1, struct.pack("<I", 8)), (0x8825, 4, 1, struct.pack("<I", 8))),
        "huge-count": ifd((0x010F, 2, 0xFFFFFFFF, b"\0\0\0\0"), count=65_535),
        "bad-offset": ifd(at=0xFFFFFFFF),
        "overlapping": ifd(*((tag, 2, 30_000, struct.pack("<I", 8)) for tag in range(0x200, 0xC00))) + bytes(30_000),
        "short": b"Exif\0\0II*",
        "other-order": b"Exif\0\0XX*\0" + bytes(20),
        "text-orientation": ifd((0x0112, 2, 4, b"six\0")),
        "odd-type": ifd((0x0112, 77, 1, b"\6\0\0\0")),
        "rational": ifd((0x0112, 5, 1, struct.pack("<I", 8))),
        "9": ifd((0x0112, 3, 1, b"\x09\0\0\0")),
        "big": ifd((0x0112, 4, 1, b"\xff\xff\xff\xff")),
    }.items()
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_around_the_pixels_changes_nothing_and_is_never_inflated_whole(name: str) -> None:
    data = HARMLESS[name]()
    with allocating_at_most(15 * MB + 2 * len(data)):  # the bombs hold 150 MB
        assert np.array_equal(decode(data).pixels, PIXELS[name.partition("-")[0].upper()])


@pytest.mark.parametrize("name", [name for name in HARMLESS if "trailing" not in name and "html" not in name])
def test_none_of_it_reaches_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    real = Image.open

    def spy(file: io.BytesIO, **options: Any) -> Image.Image:
        seen.append(file.getvalue())
        return real(file, **options)

    monkeypatch.setattr(Image, "open", spy)
    decode(HARMLESS[name]())
    (body,) = seen
    assert len(body) <= len({"jpeg": JPEG, "png": PNG}[name.partition("-")[0]])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("wide", [False, True])
def test_the_orientation_is_found_in_either_byte_order_and_width(order: str, wide: bool) -> None:
    value = struct.pack(order + "I", 6) if wide else struct.pack(order + "HH", 6, 0)
    exif = ifd((0x0100, 3, 1, bytes(4)), (0x0112, 4 if wide else 3, 1, value), order=order)
    assert decode(with_segments(segment(0xE1, exif))).width == 240
    assert decode(with_chunks(chunk(b"eXIf", exif[6:]))).width == 240


@pytest.mark.parametrize("packed", [False, True])
def test_where_exif_is_silent_xmp_and_imagemagicks_profile_tell_the_orientation(packed: bool) -> None:
    xmp, info = '<rdf:Description tiff:Orientation="6"/>', PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=packed)
    assert decode(encode(LESION, pnginfo=info)).width == 240
    exif = ifd((0x0112, 3, 1, b"\6\0\0\0"))
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=packed)
    assert decode(encode(LESION, pnginfo=info)).width == 240
    assert decode(encode(LESION, "JPEG", xmp=xmp.encode())).width == 240
    assert decode(encode(LESION, "WEBP", xmp=xmp.encode())).width == 240
    assert decode(encode(LESION, "JPEG", xmp=xmp.encode(), exif=ifd((0x0112, 3, 1, b"\1\0\0\0")))).width == 320


def test_a_text_about_the_orientation_that_is_no_xmp_turns_nothing() -> None:
    text = b'tiff:Orientation="6"'
    xmp = segment(0xE1, XMP + b'tiff:Orientation="8"')
    assert decode(with_segments(segment(0xE1, text), segment(0xFE, XMP + text))).width == 320
    assert decode(with_segments(xmp, segment(0xE1, b"other"), segment(0xFE, XMP))).width == 240
    assert decode(with_chunks(chunk(b"tEXt", b"Comment\0" + text))).width == 320


def test_a_phones_second_picture_may_be_broken() -> None:
    data = encode(LESION, "MPO", save_all=True, append_images=[LESION])
    second = data.index(b"\xff\xd8", len(JPEG) // 2)
    for broken in (data[: second + 40], data[:second] + os.urandom(500), data[:second]):
        assert decode(broken).format == "JPEG"


# The pixels themselves


def test_more_pixel_data_than_the_header_says_is_not_inflated() -> None:
    data = png(64, 64, zeros(150 * MB), packed=True)
    with allocating_at_most(15 * MB):
        assert decode(data).width == 64


@pytest.mark.parametrize(
    ("scans", "side"), [(MAX_SCANS + 1, 64), (10_000, 64), (24, 7_900)], ids=["many", "very-many", "large"]
)
def test_a_jpeg_of_far_too_many_scans_is_refused_before_decoding(scans: int, side: int) -> None:
    data = bomb(scans, side=side)
    with pytest.raises(NotAnImage, match="scans"):
        decode(data)


def test_the_scans_of_usual_files_are_served() -> None:
    assert decode(bomb(MAX_SCANS, side=64)).width == 64
    assert decode(encode(LESION, "JPEG", progressive=True)).width == 320


@pytest.mark.parametrize(("scans", "kind"), [(20, FormatNotServed), (21, NotAnImage)])
def test_the_limit_of_all_scans_together_is_20_of_the_largest_image(scans: int, kind: type[ImageError]) -> None:
    frame = jpeg_header(8_000, 8_000, marker=0xC3)  # whose coding is looked at after its scans, and never decoded
    with pytest.raises(kind):
        decode(frame[:-2] + segment(0xDA, b"") * (scans - 1) + frame[-2:])


@pytest.mark.parametrize("marker", [0x02, 0xBF, 0xF0, 0xFD], ids=hex)
def test_a_marker_that_no_usual_jpeg_has_is_refused(marker: int) -> None:
    with pytest.raises(NotAnImage):
        decode(with_segments(segment(marker, b"")))


@pytest.mark.parametrize("length", [0, 1])
def test_a_segment_shorter_than_its_own_length_field_is_refused(length: int) -> None:
    with pytest.raises(NotAnImage):
        decode(with_segments(struct.pack(">BBH", 0xFF, 0xFE, length)))


@pytest.mark.parametrize("marker", [*range(0xC3, 0xD0)], ids=hex)
def test_a_jpeg_of_another_coding_is_refused_before_decoding(marker: int) -> None:
    no_frame = marker in (0xC4, 0xC8, 0xCC)  # tables, reserved
    kind, message = (NotAnImage, "the image") if no_frame else (FormatNotServed, "lossless and arithmetic-coded JPEGs")
    with pytest.raises(kind, match=f"^{message}"):
        decode(jpeg_header(320, 240, marker=marker))


def test_a_12_bit_jpeg_is_refused_by_name() -> None:
    with pytest.raises(FormatNotServed, match="12-bit"):
        decode(jpeg_header(320, 240, depth=12, marker=0xC1))


def test_a_second_header_cannot_change_the_size_that_was_checked() -> None:
    frame = jpeg_header(60_000, 60_000)
    at = frame.index(b"\xff\xc0")
    for data in (
        with_segments(frame[at : at + 19]),
        with_chunks(png(50_000, 50_000, b"")[8:33]),
        riff((b"VP8X", bytes(4) + b"\x3f\0\0\x3f\0\0"), (b"VP8L", b"\x2f\xff\xff\xff\x0f" + bytes(40))),
    ):
        with pytest.raises(ImageError):
            decode(data)
    assert decode(riff((b"VP8 ", WEBP[20:]), (b"VP8X", bytes(4) + b"\xff\x1f\0\xff\x1f\0"))).width == 320


def test_restart_markers_out_of_place_are_an_error_or_an_image() -> None:
    data = encode(LESION, "JPEG", restart_marker_blocks=4)
    rng = np.random.default_rng(0)
    start = data.index(b"\xff\xda") + 14
    for _ in range(100):
        at = int(rng.integers(start, len(data) - 2))
        served_or_refused(data[:at] + bytes([0xFF, 0xD0 + int(rng.integers(0, 8))]) * 3 + data[at:])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (encode(LESION, "GIF") + JPEG, "GIF"),
        (encode(LESION, "BMP"), "BMP"),
        (encode(LESION, "TIFF"), "TIFF"),
        (b"MM\0*" + JPEG, "TIFF"),
        (encode(LESION, "ICO"), "ICO"),
        (encode(LESION, "EPS"), "EPS"),
        (b"\xc5\xd0\xd3\xc6" + bytes(30), "EPS"),
        (encode(LESION, "PDF"), "PDF"),
        (encode(LESION, "AVIF"), "AVIF"),
        (encode(LESION, "JPEG2000"), "JPEG 2000"),
        (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC"),
        (b"8BPS\0\1" + bytes(30), "PSD"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (bytes(128) + b"DICM" + bytes(30), "DICOM"),
    ],
)
def test_another_format_is_named_and_no_parser_of_it_runs(
    data: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    monkeypatch.setattr(Image, "open", never)
    with pytest.raises(FormatNotServed, match=name):
        decode(data)


def test_no_other_plugin_is_even_loaded() -> None:
    code = "import app.model.preprocess, sys; print(*(m for m in sys.modules if m.startswith('PIL.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"PIL.EpsImagePlugin", "PIL.AvifImagePlugin", "PIL.Jpeg2KImagePlugin"} & set(done.stdout.split())


# Damage


def served_or_refused(data: bytes) -> None:
    """One of the four errors or a whole answer, and nothing else: warnings are errors here."""
    with suppress(NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed):
        assert decode(data).pixels.shape == (3, 224, 224)


@pytest.mark.parametrize("data", [JPEG, encode(LESION, "JPEG", progressive=True), PNG, WEBP])
def test_a_file_cut_short_anywhere_is_refused(data: bytes) -> None:
    for part in range(1, 50):
        with pytest.raises(NotAnImage):
            decode(data[: len(data) * part // 50])
    with pytest.raises(NotAnImage):
        decode(data[:-1])


@pytest.mark.parametrize("magic", [b"\xff\xd8\xff", b"\xff\xd8\xff\xe0", PNG[:8], PNG[:33], WEBP[:12], WEBP[:16]])
def test_random_bytes_behind_the_right_magic_are_refused(magic: bytes) -> None:
    rng = np.random.default_rng(1)
    for size in (0, 1, 10, 100, 1_000, 100_000):
        with pytest.raises(ImageError):
            decode(magic + rng.bytes(size))


def mutations(data: bytes, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(2)
    for _ in range(count):
        changed = bytearray(data)
        for at in rng.integers(0, min(len(data), int(rng.choice([64, 700, len(data)]))), int(rng.integers(1, 6))):
            changed[at] = int(rng.choice([0, 0xFF, int(rng.integers(0, 256))]))
        yield bytes(changed)


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "palette", "WEBP", "webp-alpha"])
def test_changed_bytes_give_an_error_or_an_image(kind: str) -> None:
    small = draw_lesion(1, 4, size=(64, 48))
    data = {
        "JPEG": lambda: encode(small, "JPEG", exif=ifd((0x0112, 3, 1, b"\6\0\0\0"))),
        "progressive": lambda: encode(small, "JPEG", progressive=True),
        "PNG": lambda: encode(small),
        "palette": lambda: encode(small.quantize(9)),
        "WEBP": lambda: encode(small, "WEBP"),
        "webp-alpha": lambda: encode(small.convert("RGBA"), "WEBP", lossless=True),
    }[kind]()
    for changed in mutations(data, 300):
        served_or_refused(changed)


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT"])
def test_a_png_whose_checksum_is_wrong_is_refused(kind: bytes) -> None:
    at = PNG.index(kind)
    end = at + 4 + int.from_bytes(PNG[at - 4 : at])
    with pytest.raises(NotAnImage):
        decode(PNG[:end] + bytes([PNG[end] ^ 1]) + PNG[end + 1 :])


def test_palette_indices_out_of_range_are_an_error_or_an_image() -> None:
    rows = (b"\0" + bytes(range(64))) * 64
    header = chunk(b"PLTE", bytes(range(6)))
    served_or_refused(with_chunks(header, data=png(64, 64, rows, colour=3)))
    served_or_refused(png(64, 64, rows, colour=3))
    served_or_refused(with_chunks(chunk(b"PLTE", bytes(3000)), data=png(64, 64, rows, colour=3)))


def test_transparency_of_a_palette_is_ignored_without_a_warning() -> None:
    image = LESION.quantize(20)
    plain = decode(encode(image)).pixels
    assert np.array_equal(decode(encode(image, transparency=bytes(range(20)))).pixels, plain)


def test_more_parts_than_a_usual_file_has_are_refused() -> None:
    for data in (
        with_chunks(chunk(b"teSt", b"") * containers.MAX_PARTS),
        with_segments(segment(0xFE, b"") * containers.MAX_PARTS),
        JPEG[:2] + b"\xff\xd0" * containers.MAX_PARTS + JPEG[2:],
    ):
        with pytest.raises(NotAnImage):
            decode(data)


def test_what_pillow_raises_is_told_as_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        raise error

    for error, kind in ((struct.error(), NotAnImage), (AttributeError(), NotAnImage), (MemoryError(), ImageTooLarge)):
        monkeypatch.setattr(Image.Image, "load", lambda _, error=error: fail(error))
        with pytest.raises(kind):
            decode(WEBP)
