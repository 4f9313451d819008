import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.model import preprocess
from app.model.preprocess import FormatNotServed, ImageTooLarge, ImageTooSmall, NotAnImage, decode
from tests.conftest import SHARED_DATA, encode, framed
from training.drawn import draw_lesion


def png_header(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that announces a size and carries next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_an_image_of_the_models_size_passes_through_untouched() -> None:
    image = draw_lesion(0, 1)
    decoded = decode(encode(image, "PNG"))
    assert decoded.pixels.dtype == np.uint8
    assert np.array_equal(decoded.pixels.transpose(1, 2, 0), np.asarray(image))
    assert (decoded.width, decoded.height, decoded.format, decoded.warnings) == (224, 224, "PNG", ())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_each_served_format_decodes(kind: str) -> None:
    decoded = decode(encode(draw_lesion(1, 1, size=(300, 260)), kind))
    assert decoded.pixels.shape == (3, 224, 224)
    assert (decoded.width, decoded.height, decoded.format) == (300, 260, kind)


def test_a_phones_jpeg_with_a_second_picture_is_its_first_picture() -> None:
    first = draw_lesion(1, 1, size=(300, 260))
    data = encode(first, "MPO", save_all=True, append_images=[draw_lesion(0, 2, size=(150, 130))])
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.format == "MPO"
    decoded = decode(data)
    assert (decoded.width, decoded.height, decoded.format) == (300, 260, "JPEG")
    assert np.abs(decoded.pixels.astype(int) - decode(encode(first)).pixels.astype(int)).mean() < 3


def test_a_scaled_jpeg_decode_stays_close_to_the_full_one() -> None:
    image = draw_lesion(1, 5, size=(2400, 1800))
    scaled = decode(encode(image, "JPEG", quality=95), preview_side=1024)
    full = decode(encode(image, "PNG"))
    assert (scaled.width, scaled.height) == (2400, 1800)
    assert scaled.preview.size[0] < 1100
    assert np.abs(scaled.pixels.astype(int) - full.pixels.astype(int)).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(300, 200), (1800, 1200), (240, 240), (2003, 2001)])
def test_exif_orientation_is_undone(orientation: int, size: tuple[int, int]) -> None:
    upright = draw_lesion(1, 7, size=size)
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(stored, "JPEG", quality=98, exif=exif), preview_side=1024)
    assert (decoded.width, decoded.height) == size
    assert decoded.preview.size[0] * size[1] == pytest.approx(decoded.preview.size[1] * size[0], rel=0.02)
    expected = decode(encode(upright, "JPEG", quality=98)).pixels.astype(int)
    assert np.abs(decoded.pixels.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("tag", [0x0100, 0x011A], ids=["width", "resolution"])
def test_odd_exif_beside_the_orientation_harms_nothing(tag: int) -> None:
    entries = [(tag, 2, 4, b"abc\0"), (0x0112, 3, 1, struct.pack("<HH", 6, 0))]  # text where a number belongs
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", 0)
    decoded = decode(encode(draw_lesion(1, 2, size=(300, 200)), "JPEG", exif=exif))
    assert (decoded.width, decoded.height) == (200, 300)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_another_jpeg_decoder_takes_pillows_place_and_no_more(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(draw_lesion(1, 7, size=(300, 200)), "JPEG", quality=98, exif=exif)
    expected = decode(data)
    seen = []

    def other(data: bytes, size: int) -> np.ndarray:
        seen.append(len(data))
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(picture).transpose(2, 0, 1)

    found = decode(data, jpeg=other)
    assert (found.width, found.height, found.format) == (expected.width, expected.height, "JPEG")
    assert np.abs(found.pixels.astype(int) - expected.pixels.astype(int)).mean() < 1
    assert len(seen) == 1
    for untouched in (encode(draw_lesion(1, 7), "PNG"), encode(draw_lesion(1, 7).convert("L"), "JPEG")):
        decode(untouched, jpeg=other)
    decode(data, jpeg=other, preview_side=1024)  # a person wants to see more than the square
    decode(data, jpeg=other, crop_frame=True)  # of a part there would be too few pixels
    assert len(seen) == 1


def test_pillow_decodes_what_another_jpeg_decoder_cannot() -> None:
    def broken(data: bytes, size: int) -> np.ndarray:
        raise ValueError(f"{len(data)} {size}")

    data = encode(draw_lesion(1, 7), "JPEG")
    assert np.array_equal(decode(data, jpeg=broken).pixels, decode(data).pixels)
    with pytest.raises(NotAnImage, match="truncated or damaged"):
        decode(data[: len(data) // 2], jpeg=broken)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_preview_changes_nothing_of_what_the_model_sees(kind: str) -> None:
    data = encode(framed(draw_lesion(1, 7, size=(1500, 1100))), kind)
    seen, shown = (decode(data, crop_frame=True, preview_side=side) for side in (0, 256))
    assert seen.lit is not None
    assert seen.lit == shown.lit
    assert max(shown.preview.size) == 256
    assert np.array_equal(seen.pixels, shown.pixels)


def test_the_preview_keeps_the_aspect_ratio_within_its_bound() -> None:
    data = encode(draw_lesion(0, 2, size=(3000, 1500)), "PNG")
    assert decode(data, preview_side=1024).preview.size == (1024, 512)
    assert decode(data, preview_side=4000).preview.size == (3000, 1500)
    assert decode(data).preview.size == (224, 224)  # nobody will look


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"just some text",
        b"\xff\xd8\xff\xe0" + b"\0" * 40,
        b"\x89PNG\r\n\x1a\n" + b"\0" * 8,
        b"RIFF\x24\0\0\0WEBPVP8 " + b"\0" * 24,
        png_header(64, 64),
    ],
    ids=["empty", "text", "jpeg-magic", "png-magic", "webp-magic", "png-without-pixels"],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused(kind: str, keep: float) -> None:
    data = encode(draw_lesion(1, 2, size=(400, 300)), kind)
    with pytest.raises(NotAnImage, match=r"again|not an image"):
        decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize(("width", "height"), [(40_000, 40_000), (10_000, 10_000), (9_000, 8_000)])
def test_too_many_pixels_are_refused_from_the_header(width: int, height: int) -> None:
    with pytest.raises(ImageTooLarge):
        decode(png_header(width, height))


def test_too_few_pixels_are_refused() -> None:
    with pytest.raises(ImageTooSmall):
        decode(encode(Image.new("RGB", (300, 8))))


def frames() -> list[Image.Image]:
    return [draw_lesion(0, n, size=(64, 64)) for n in range(3)]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (encode(Image.new("CMYK", (64, 64)), "JPEG"), "CMYK"),
        (encode(Image.fromarray(np.zeros((64, 64), dtype=np.uint16))), "16-bit"),
        (png_header(64, 64, depth=16), "16-bit"),
        (encode(frames()[0], "GIF"), "GIF"),
        (encode(frames()[0], "GIF", save_all=True, append_images=frames()[1:]), "GIF"),
        (encode(frames()[0], "WEBP", save_all=True, append_images=frames()[1:]), "animated"),
        (encode(frames()[0], "PNG", save_all=True, append_images=frames()[1:]), "animated"),
        (encode(frames()[0], "BMP"), "BMP"),
        (encode(frames()[0], "TIFF"), "TIFF"),
    ],
    ids=["cmyk", "grey-16", "rgb-16", "gif", "animated-gif", "animated-webp", "animated-png", "bmp", "tiff"],
)
def test_formats_that_the_model_was_not_made_for_are_refused_by_name(data: bytes, word: str) -> None:
    with pytest.raises(FormatNotServed, match=word):
        decode(data)


GREY = "greyscale image: the model was trained on colour"
TRANSPARENT = "transparency was ignored"


@pytest.mark.parametrize(
    ("image", "warnings"),
    [
        (draw_lesion(0, 1), ()),
        (draw_lesion(0, 1).convert("L"), (GREY,)),
        (draw_lesion(0, 1).convert("1"), (GREY,)),
        (draw_lesion(0, 1).convert("LA"), (GREY, TRANSPARENT)),
        (draw_lesion(0, 1).convert("RGBA"), (TRANSPARENT,)),
        (draw_lesion(0, 1, size=(200, 224)), ()),
        (
            draw_lesion(0, 1, size=(199, 224)),
            ("low resolution: the shorter side has 199 pixels, 224 or more is better",),
        ),
        (draw_lesion(0, 1, size=(560, 224)), ()),
        (draw_lesion(0, 1, size=(900, 224)), ("extreme aspect ratio 4.0:1: crop to the lesion",)),
        (draw_lesion(0, 1, size=(224, 561)), ("extreme aspect ratio 2.5:1: crop to the lesion",)),
    ],
)
def test_what_makes_an_answer_worse_is_said(image: Image.Image, warnings: tuple[str, ...]) -> None:
    decoded = decode(encode(image))
    assert decoded.warnings == warnings
    assert np.array_equal(np.asarray(decoded.preview), decoded.pixels.transpose(1, 2, 0))


def test_the_limits_themselves_are_served() -> None:
    data = encode(draw_lesion(0, 1, size=(64, 48)))
    assert decode(data, max_pixels=64 * 48).width == 64
    with pytest.raises(ImageTooLarge, match=r"64×48 is over the limit of 0\.003071 megapixels: scale it down"):
        decode(data, max_pixels=64 * 48 - 1)
    assert decode(encode(Image.new("RGB", (16, 300)))).width == 16
    with pytest.raises(ImageTooSmall, match="15×300 is too small to judge: each side needs 16 pixels or more"):
        decode(encode(Image.new("RGB", (15, 300))))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [False, True])
def test_a_webp_of_each_coding_has_its_own_size_and_pixels(mode: str, lossless: bool) -> None:
    image = draw_lesion(1, 1, size=(421, 260)).convert(mode)
    decoded = decode(encode(image, "WEBP", lossless=lossless))
    assert (decoded.width, decoded.height) == (421, 260)
    expected = decode(encode(image.convert("RGB"))).pixels.astype(int)
    assert np.abs(decoded.pixels.astype(int) - expected).mean() <= (0 if lossless else 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the upload is empty: send the bytes of a JPEG, PNG or WebP file"),
        (b"text", "the upload is not an image: send a JPEG, PNG or WebP file"),
        (b"RIFF\x04\0\0\0WAVE", "the upload is not an image: send a JPEG, PNG or WebP file"),
        (b"\xff\xd8\xff\xe0", "the image file is truncated or damaged: export it again"),
        (png_header(64, 64), "the PNG file is truncated or damaged: export it again"),
    ],
)
def test_a_refusal_says_what_to_do(data: bytes, message: str) -> None:
    with pytest.raises(NotAnImage) as refused:
        decode(data)
    assert str(refused.value) == message


def test_palette_images_keep_their_colours() -> None:
    image = draw_lesion(1, 1).quantize(64)
    assert np.array_equal(decode(encode(image)).pixels.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.skipif(not (SHARED_DATA / "full_size").is_dir(), reason=f"no full-size images in {SHARED_DATA}")
def test_a_clinics_photographs_decode() -> None:
    for path in sorted(Path(SHARED_DATA / "full_size").iterdir()):
        decoded = decode(path.read_bytes())
        assert decoded.pixels.shape == (3, 224, 224)
        assert decoded.width * decoded.height <= preprocess.MAX_PIXELS
