"""DICOM files of a drawn lesion, in each encoding; pydicom writes them."""

import io
from typing import Any

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from app.model.labels import Judgement
from tests.conftest import encode
from training.drawn import draw_lesion

SIZE = (320, 240)
LESION = draw_lesion(1, 3, size=SIZE)
PIXELS = np.asarray(LESION)
PATIENT = "Grün^Ända"


def judgement(**changes: Any) -> Judgement:
    """A malignant lesion, as `labels.judge` would say it."""
    fields: dict[str, Any] = {
        "label": "malignant",
        "probabilities": {"benign": 0.3, "malignant": 0.7},
        "operating_point": "balanced",
        "threshold": 0.4,
        "positive": True,
    }
    return Judgement(**(fields | changes))


def dermoscopic(**changes: Any) -> Dataset:
    """A Dermoscopic Photography data set of `LESION`, uncompressed; None leaves an attribute out."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    attributes = {
        "SpecificCharacterSet": "ISO_IR 100",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "SOPClassUID": uid.DermoscopicPhotographyImageStorage,
        "SOPInstanceUID": uid.generate_uid(),
        "StudyDate": "20260102",
        "StudyTime": "030405",
        "AccessionNumber": "A1",
        "Modality": "DMS",
        "PatientName": PATIENT,
        "PatientID": "P1",
        "PatientBirthDate": "19700102",
        "PatientSex": "F",
        "StudyInstanceUID": uid.generate_uid(),
        "SeriesInstanceUID": uid.generate_uid(),
        "StudyID": "S1",
        "ReferringPhysicianName": "",
        "BurnedInAnnotation": "NO",
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
        "Rows": SIZE[1],
        "Columns": SIZE[0],
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": PIXELS.tobytes(),
    }
    for keyword, value in (attributes | changes).items():
        if value is not None:
            setattr(image, keyword, value)
    return image


def file(image: Dataset) -> bytes:
    """The data set as a DICOM file."""
    buffer = io.BytesIO()
    image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def native(syntax: str = uid.ExplicitVRLittleEndian, **changes: Any) -> bytes:
    image = dermoscopic(**changes)
    image.file_meta.TransferSyntaxUID = uid.UID(syntax)
    return file(image)


def compressed(syntax: str) -> bytes:
    """By one of pydicom's encoders."""
    image = dermoscopic()
    image.compress(syntax, encoding_plugin="pydicom" if syntax == uid.RLELossless else "pyjpegls")
    return file(image)


def encapsulated(syntax: str, frame: bytes, **changes: Any) -> bytes:
    """Round a frame that is compressed already."""
    image = dermoscopic(**changes, PixelData=encapsulate([frame]))
    image.file_meta.TransferSyntaxUID = uid.UID(syntax)
    image["PixelData"].is_undefined_length = True
    return file(image)


def ycbcr(image: Image.Image = LESION) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(image.convert("YCbCr"))


def ycbcr_422() -> bytes:
    """Y, Y, Cb, Cr of each two pixels."""
    pairs = ycbcr().reshape(-1, 2, 3)
    chroma = pairs[:, 0, 1:]
    return np.concatenate([pairs[:, :, 0], chroma], axis=1).tobytes()


def markerless_rgb() -> bytes:
    """A JPEG of three components that are RGB, which nothing in it says."""
    data = encode(LESION, "JPEG", quality=95, keep_rgb=True)
    at = data.index(b"\xff\xee")
    data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :]
    frame, scan = data.index(b"\xff\xc0") + 10, data.index(b"\xff\xda") + 5
    named = bytearray(data)
    for number in range(3):
        named[frame + 3 * number] = named[scan + 2 * number] = number + 1
    return bytes(named)


JPEG_95 = encode(LESION, "JPEG", quality=95)
CODESTREAM = encode(LESION, "JPEG2000", no_jp2=True, mct=1)
# name -> file, and how far its pixels may be from those that were drawn
EXACT, LOSSY = 0, 8
FILES: dict[str, tuple[bytes, int]] = {
    "explicit": (native(), EXACT),
    "implicit": (native(uid.ImplicitVRLittleEndian), EXACT),
    "deflated": (native(uid.DeflatedExplicitVRLittleEndian), EXACT),
    "planar": (native(PlanarConfiguration=1, PixelData=PIXELS.transpose(2, 0, 1).tobytes()), EXACT),
    "photograph": (native(SOPClassUID=uid.VLPhotographicImageStorage), EXACT),
    "ycbcr": (native(PhotometricInterpretation="YBR_FULL", PixelData=ycbcr().tobytes()), LOSSY),
    "ycbcr-422": (native(PhotometricInterpretation="YBR_FULL_422", PixelData=ycbcr_422()), LOSSY),
    "rle": (compressed(uid.RLELossless), EXACT),
    "jpeg": (encapsulated(uid.JPEGBaseline8Bit, JPEG_95, PhotometricInterpretation="YBR_FULL_422"), LOSSY),
    "jpeg-extended": (encapsulated(uid.JPEGExtended12Bit, JPEG_95, PhotometricInterpretation="YBR_FULL_422"), LOSSY),
    "jpeg-rgb": (encapsulated(uid.JPEGBaseline8Bit, markerless_rgb()), LOSSY),
    "jpeg-ls": (compressed(uid.JPEGLSLossless), EXACT),
    "jpeg-2000": (encapsulated(uid.JPEG2000Lossless, CODESTREAM, PhotometricInterpretation="YBR_RCT"), EXACT),
}
