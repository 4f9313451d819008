"""DICOM files as strangers send them: every encoding that is taken, what is refused and why, and damage of any kind."""

import io
import logging
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array

from app.clinical.dicom import decode
from app.isolation import DecodeProcesses
from app.model.preprocess import (
    MAX_PIXELS,
    DecodedImage,
    FormatNotServed,
    ImageError,
    ImageTooLarge,
    ImageTooSmall,
    NotAnImage,
)
from tests.app.clinical.drawn import EXACT, FILES, JPEG_95, PIXELS, SIZE, dermoscopic, encapsulated, native
from tests.conftest import ROOT

DICOM = {"content-type": "application/dicom"}


def whole(data: bytes) -> DecodedImage:
    return decode(data, preview_side=max(SIZE), unbounded=True)


@pytest.mark.parametrize("name", FILES)
def test_every_encoding_gives_the_pixels_that_were_drawn(name: str) -> None:
    data, tolerance = FILES[name]
    image = whole(data)
    assert (image.width, image.height, image.format, image.warnings) == (*SIZE, "DICOM", ())
    assert image.pixels.shape == (3, 224, 224)
    difference = np.abs(np.asarray(image.preview).astype(int) - PIXELS)
    assert difference.max() <= tolerance
    assert tolerance == EXACT or difference.mean() < 2


@pytest.mark.parametrize("name", FILES)
def test_pydicom_reads_the_same(name: str) -> None:
    data, _ = FILES[name]
    theirs = pixel_array(pydicom.dcmread(io.BytesIO(data)), raw=False)
    assert np.abs(np.asarray(whole(data).preview).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("name", ["jpeg-ls", "jpeg-2000"])
def test_a_codec_without_bounds_waits_for_a_process_that_can_be_killed(name: str) -> None:
    with pytest.raises(FormatNotServed, match="DERMLENS_DECODE_ISOLATION=process"):
        decode(FILES[name][0])


def test_a_process_decodes_every_encoding_as_a_thread_does() -> None:
    pool = DecodeProcesses(1, timeout_s=30, memory_bytes=600 << 20)
    try:
        for data, _ in FILES.values():
            theirs = pool.decode(data, size=224, max_pixels=MAX_PIXELS, crop_frame=False, preview_side=0)
            assert np.array_equal(theirs.pixels, decode(data, unbounded=True).pixels)
            assert theirs.format == "DICOM"
    finally:
        pool.close()


def test_a_secondary_capture_and_burned_in_text_are_warned_of() -> None:
    image = whole(native(SOPClassUID=uid.SecondaryCaptureImageStorage, BurnedInAnnotation="YES"))
    assert "Secondary Capture" in image.warnings[0]
    assert "burned" in image.warnings[1]


def test_a_jpeg_is_not_turned_by_its_exif() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    turned = JPEG_95[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + JPEG_95[2:]
    assert whole(turned).width == SIZE[1]  # as a file of its own
    image = whole(encapsulated(uid.JPEGBaseline8Bit, turned, PhotometricInterpretation="YBR_FULL_422"))
    assert (image.width, image.preview.size) == (SIZE[0], SIZE)


def nested(*, depth: int) -> bytes:
    """A file whose header opens sequences in sequences."""
    start = FILES["explicit"][0]
    opened = depth * (b"\x54\0\x10\0SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\0\xe0\xff\xff\xff\xff")
    at = start.index(b"\x28\0\2\0US")
    return start[:at] + opened + start[at:]


def closed(content: bytes) -> bytes:
    """A file with a sequence of undefined length and unknown VR, whose items are implicit (PS3.5, 6.2.2)."""
    start = FILES["explicit"][0]
    item = b"\xfe\xff\0\xe0\xff\xff\xff\xff" + content + b"\xfe\xff\x0d\xe0\0\0\0\0"
    sequence = b"\x09\0\x10\x10UN\0\0\xff\xff\xff\xff" + item + b"\xfe\xff\xdd\xe0\0\0\0\0"
    at = start.index(b"\x10\0\x10\0PN")
    return start[:at] + sequence + start[at:]


def test_private_and_nested_elements_are_passed_over() -> None:
    inside = struct.pack("<HHI", 0x0028, 0x0010, 2) + b"\1\0"  # rows of something else
    assert whole(closed(inside)).height == SIZE[1]


def bomb() -> bytes:
    """A deflated file whose 64 kB become 64 MB."""
    data = FILES["deflated"][0]
    (length,) = struct.unpack_from("<I", data, 140)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return data[: 144 + length] + deflate.compress(bytes(64_000_000)) + deflate.flush()


def contradicting(name: str, **changes: Any) -> bytes:
    """The file with another header round the same frame."""
    image = pydicom.dcmread(io.BytesIO(FILES[name][0]))
    for keyword, value in changes.items():
        setattr(image, keyword, value)
    buffer = io.BytesIO()
    image.save_as(buffer)
    return buffer.getvalue()


REFUSED: dict[str, tuple[bytes, type[ImageError], str]] = {
    "no image": (native(PixelData=None), NotAnImage, "no pixels"),
    "other kind": (native(SOPClassUID=uid.CTImageStorage), FormatNotServed, "Dermoscopic"),
    "grey": (native(PhotometricInterpretation="MONOCHROME2", SamplesPerPixel=1), FormatNotServed, "monochrome"),
    "inverse grey": (native(PhotometricInterpretation="MONOCHROME1", SamplesPerPixel=1), FormatNotServed, "monochrome"),
    "palette": (native(PhotometricInterpretation="PALETTE COLOR", SamplesPerPixel=1), FormatNotServed, "palettes"),
    "16 bits": (native(BitsAllocated=16, BitsStored=12, HighBit=11), FormatNotServed, "8-bit"),
    "signed": (native(PixelRepresentation=1), FormatNotServed, "8-bit"),
    "frames": (native(NumberOfFrames=2, PixelData=2 * PIXELS.tobytes()), FormatNotServed, "several frames"),
    "a billion frames": (native(NumberOfFrames=10**9), FormatNotServed, "several frames"),
    "large": (native(Rows=65535, Columns=65535), ImageTooLarge, "megapixels"),
    "small": (native(Rows=8, Columns=8), ImageTooSmall, "too small"),
    "video": (encapsulated(uid.MPEG4HP41, JPEG_95), FormatNotServed, "transfer syntax"),
    "short pixels": (native(PixelData=PIXELS.tobytes()[:-2]), NotAnImage, "truncated"),
    "cut": (FILES["explicit"][0][:-1000], NotAnImage, "truncated"),
    "cut header": (FILES["explicit"][0][:300], NotAnImage, "truncated"),
    "magic alone": (bytes(128) + b"DICM", NotAnImage, "truncated"),
    "no rows": (native(Rows=None), NotAnImage, "truncated"),
    "deep": (nested(depth=5_000), NotAnImage, "truncated"),
    "very deep": (nested(depth=300_000), NotAnImage, "truncated"),
    "never closed": (nested(depth=1), NotAnImage, "truncated"),
    "bomb": (bomb(), NotAnImage, "truncated"),
    "other jpeg": (contradicting("jpeg", Rows=241), NotAnImage, "truncated"),
    "other jpeg 2000": (contradicting("jpeg-2000", Rows=241), NotAnImage, "truncated"),
    "other jpeg-ls": (contradicting("jpeg-ls", Rows=241), NotAnImage, "truncated"),
    "other rle": (contradicting("rle", Rows=480), NotAnImage, "truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    data, kind, reason = REFUSED[name]
    with pytest.raises(kind, match=reason):
        whole(data)


def test_a_bomb_is_inflated_no_further_than_a_header() -> None:
    """In an interpreter of its own, whose memory nothing else has grown."""
    code = (
        "import resource, sys; from app.clinical.dicom import decode; data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: decode(data)\n"
        "except ValueError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bomb(), capture_output=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 32_000  # kB; all of it takes 64 MB and more


def mutations(count: int) -> Iterator[bytes]:
    """Valid files with bytes changed, cut out, doubled or lost, most of them in the header; always the same."""
    rng = random.Random(7)  # noqa: S311 - to be repeatable
    for _ in range(count):
        data = bytearray(rng.choice([file for file, _ in FILES.values()]))
        for _ in range(rng.choice([1, 1, 2, 5])):
            end = len(data) if rng.random() < 0.2 else min(1400, len(data))
            at = rng.randrange(132, max(133, end))
            match rng.randrange(5):
                case 0:
                    data[at : at + 1] = rng.randbytes(1)
                case 1:
                    data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), rng.randbytes(4)])
                case 2:
                    del data[at : at + rng.randrange(1, 64)]
                case 3:
                    data[at:at] = data[at : at + rng.randrange(1, 200)]
                case 4:
                    del data[rng.randrange(at, max(at + 1, len(data))) :]
        yield bytes(data)


def test_hundreds_of_mutations_are_answered_or_refused_in_time() -> None:
    taken = 0
    for data in mutations(600):
        started = time.process_time()
        try:
            image = whole(data)
        except ImageError:
            pass
        else:
            taken += 1
            assert image.pixels.shape == (3, 224, 224)
        assert time.process_time() - started < 5  # far more than any takes, far less than one without bounds
    assert 30 < taken < 570  # neither is everything refused, nor nothing


def test_the_routes_take_it_by_its_first_bytes_and_by_its_type(client: TestClient) -> None:
    data = FILES["jpeg"][0]
    answer = client.post("/predict", content=data, headers=DICOM)
    assert answer.status_code == 200
    assert answer.json()["image"] == {"width": SIZE[0], "height": SIZE[1], "format": "DICOM", "warnings": []}
    assert client.post("/predict", files={"file": data}).json()["probabilities"] == answer.json()["probabilities"]
    assert client.post("/explain", content=data, headers=DICOM).headers["content-type"] == "image/png"


@pytest.mark.parametrize(("name", "status"), [("grey", 415), ("large", 413), ("small", 422), ("cut", 400)])
def test_a_refusal_is_a_problem(client: TestClient, name: str, status: int) -> None:
    answer = client.post("/predict", content=REFUSED[name][0], headers=DICOM)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")


def test_mutations_never_fail_the_server(client: TestClient) -> None:
    for data in mutations(40):
        answer = client.post("/predict", content=data, headers=DICOM)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500


MARKER = "Zebrastreifen"


def marked(**changes: Any) -> Dataset:
    """The marker in every field of the patient and the study, where it is valid and where it is not."""
    fields = ("PatientName", "PatientID", "AccessionNumber", "StudyID", "StudyDescription", "InstitutionName")
    return dermoscopic(**dict.fromkeys(fields, MARKER), PatientComments=MARKER, **changes)


def test_no_field_of_the_patient_is_answered_or_logged(
    client: TestClient, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    good = io.BytesIO()
    marked().save_as(good, enforce_file_format=True)
    data = good.getvalue()
    spoilt = data.replace(b"1970", b"19" + MARKER[:2].encode()).replace(b"ISO_IR 100", MARKER[:10].encode())
    for sent in (data, spoilt, data.replace(b"RGB ", MARKER[:4].encode()), data[:-40], data[:700]):
        assert MARKER.encode() in sent
        with caplog.at_level(logging.DEBUG):
            for route in ("/predict", "/predict?format=fhir", "/explain"):
                answer = client.post(route, content=sent, headers=DICOM | {"accept": "application/json"})
                assert answer.status_code in (200, 400, 415)
                assert MARKER[:4] not in answer.text + str(answer.headers)
                assert "19700102" not in answer.text
    out = capfd.readouterr()
    assert MARKER[:4] not in caplog.text + out.out + out.err
