"""DICOM files out: a structured report of one answer, and its picture as a Secondary Capture; `clinical` is the extra.

Both stand in the study of the photograph they are about, each in a series of its own. Nothing is signed: a report is
partial, unverified and preliminary.
"""

import io
from typing import Any

import highdicom as hd
import numpy as np
import pydicom
from highdicom import sr
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from app.clinical.dicom import is_dicom
from app.model.labels import NOTICE, Judgement
from app.model.manifest import Manifest

# SNOMED CT's qualifiers, which DICOM uses too (CID 6063): they name no disease, as the model does not
FINDINGS = {"benign": codes.SCT.Benign, "malignant": codes.SCT.Malignant}
MAKER = "dermlens"
SERIES_NUMBER = 1  # of our own series; there is no way to know which are taken
_KEYS = ("StudyInstanceUID", "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
# What the standard lets be empty (type 2), and highdicom reads all the same
_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
_STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime", "ReferringPhysicianName")
_KEPT = (  # of the photograph, true of its overlay too
    "BurnedInAnnotation",
    "RecognizableVisualFeatures",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)


def structured_report(source: bytes, judgement: Judgement, manifest: Manifest) -> bytes:
    """A Measurement Report (PS3.16, TID 1500) as a Comprehensive SR file.

    Args:
        source: the DICOM file that was judged.

    Raises:
        ValueError: no DICOM file, one without the identifiers of its study, or a version of other classes.
    """
    if set(judgement.probabilities) != set(FINDINGS):
        raise ValueError("a structured report takes a version with the classes benign and malignant")
    image = _photograph(source)
    algorithm = sr.AlgorithmIdentification(name=manifest.name, version=manifest.version)
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=hd.UID(), identifier="lesion"),
        finding_type=FINDINGS[judgement.label],
        finding_sites=[sr.FindingSite(codes.SCT.Skin)],
        algorithm_id=algorithm,
        measurements=[
            sr.Measurement(
                name=codes.DCM.ProbabilityOfCancer,
                value=round(100 * judgement.probabilities["malignant"], 4),
                unit=codes.UCUM.Percent,
            )
        ],
        source_images=[sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)],
    )
    decision = f"{judgement.label} at the operating point {judgement.operating_point}"
    words = [decision, *(f"{'refer' if judgement.refer else 'note'}: {reason}" for reason in judgement.reasons), NOTICE]
    comment = sr.TextContentItem(
        name=codes.DCM.Comment, value=". ".join(words), relationship_type=sr.RelationshipTypeValues.CONTAINS
    )
    group[0].ContentSequence.append(comment)
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[MAKER, manifest.name, manifest.version]),  # the same for every report
        name=f"{manifest.name} {manifest.version}",
        manufacturer_name=MAKER,
        model_name=manifest.name,
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=codes.SCT.DermoscopicPhotography,
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = sr.ComprehensiveSR(
        evidence=[image], content=content[0], **_instance(manifest, series=f"{decision}, preliminary. {NOTICE}")
    )
    return _file(report)


def secondary_capture(source: bytes, png: bytes, manifest: Manifest, *, description: str) -> bytes:
    """The picture of the evidence as a Secondary Capture file.

    Args:
        source: the DICOM file that was explained.
        png: RGB, `overlay.Overlay.png`.
        description: `overlay.Aim.description`.

    Raises:
        ValueError: no DICOM file, or one without the identifiers of its study.
    """
    image = _photograph(source)
    capture = hd.sc.SCImage.from_ref_dataset(
        image,
        pixel_array=np.asarray(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGB")),
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "F"),
        transfer_syntax_uid=pydicom.uid.ExplicitVRLittleEndian,
        **_instance(manifest, series=f"{description}. {NOTICE}"),
    )
    for unknown in ("PatientOrientation", "Laterality"):  # highdicom wants the first
        setattr(capture, unknown, None)
    capture.DerivationDescription = f"{description}. {NOTICE}"
    origin = Dataset()
    origin.ReferencedSOPClassUID, origin.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    purpose = codes.DCM.SourceImageForImageProcessingOperation
    origin.PurposeOfReferenceCodeSequence = [sr.CodedConcept.from_code(purpose)]
    capture.SourceImageSequence = [origin]
    for keyword in _KEPT:
        if keyword in image:
            setattr(capture, keyword, image[keyword].value)
    return _file(capture)


def _photograph(source: bytes) -> Dataset:
    """The header of the file, with every identifier that what is derived from it needs."""
    if not is_dicom(source):
        raise ValueError("only of a DICOM file can DICOM be made: give one, or write another format")
    image = pydicom.dcmread(io.BytesIO(source), stop_before_pixels=True)
    for keyword in _KEYS:
        if not image.get(keyword):
            raise ValueError(f"the DICOM file has no {keyword}: what is made of it could not be filed")
    for keyword in (*_PATIENT, *_STUDY):
        if keyword not in image:
            setattr(image, keyword, None)
    return image


def _instance(manifest: Manifest, *, series: str) -> dict[str, Any]:
    """What highdicom wants to know of each new instance."""
    return {
        "series_instance_uid": hd.UID(),
        "sop_instance_uid": hd.UID(),
        "series_number": SERIES_NUMBER,
        "instance_number": 1,
        "series_description": series[:64],  # LO
        "manufacturer": MAKER,
        "manufacturer_model_name": manifest.name,
        "software_versions": manifest.version,
        "specific_character_set": "ISO_IR 192",  # UTF-8
    }


def _file(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
