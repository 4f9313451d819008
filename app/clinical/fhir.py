"""FHIR R4 out: an answer as a DiagnosticReport that holds its Observation and the Device that made it.

No subject is named, and nothing of the image or its patient: whoever files the report knows them.
"""

from datetime import datetime
from typing import Any

from app.model.labels import NOTICE, Judgement
from app.model.manifest import Manifest

MEDIA_TYPE = "application/fhir+json"
REQUEST_SYSTEM = "urn:dermlens:request"  # of the identifier
# SNOMED CT's qualifiers, as in the DICOM report; other classes are told by name alone
SNOMED = {"benign": ("30807003", "Benign"), "malignant": ("21594007", "Malignant")}
_UCUM, _SNOMED = "http://unitsofmeasure.org", "http://snomed.info/sct"
_INTERPRETATION = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
_SKIN = {"coding": [{"system": _SNOMED, "code": "39937001", "display": "Skin structure"}]}


def diagnostic_report(
    judgement: Judgement, manifest: Manifest, *, request_id: str, warnings: tuple[str, ...], issued: datetime
) -> dict[str, Any]:
    """The JSON of a preliminary DiagnosticReport (https://hl7.org/fhir/R4/diagnosticreport.html).

    The Observation's value is the label, and each component the calibrated probability of a class, of unit 1.

    Args:
        issued: with its time zone.
        warnings: of the image, in words; notes beside the reasons to refer.
    """
    device = {
        "resourceType": "Device",
        "id": "model",
        "manufacturer": "dermlens",
        "deviceName": [{"name": manifest.name, "type": "model-name"}],
        "version": [{"value": manifest.version}],
    }
    notes = [f"{'refer' if judgement.refer else 'note'}: {reason}" for reason in judgement.reasons]
    if judgement.threshold is not None:
        notes.append(f"operating point {judgement.operating_point}, threshold {judgement.threshold:.6g}")
    if judgement.coverage is not None:
        notes.append(f"prediction set at coverage {judgement.coverage}: {', '.join(judgement.prediction_set or ())}")
    observation: dict[str, Any] = {
        "resourceType": "Observation",
        "id": "answer",
        "status": "preliminary",
        "code": {"text": "Class of the skin lesion in a dermoscopic image, by a model"},
        "issued": issued.isoformat(timespec="milliseconds"),
        "valueCodeableConcept": _concept(judgement.label),
        "bodySite": _SKIN,
        "device": {"reference": "#model"},
        "component": [
            {
                "code": {"text": f"Probability of {name}"},
                "valueQuantity": {"value": round(probability, 6), "unit": "1", "system": _UCUM, "code": "1"},
            }
            for name, probability in judgement.probabilities.items()
        ],
        "note": [{"text": text} for text in (*notes, *warnings, NOTICE)],
    }
    if judgement.refer:
        observation["interpretation"] = [_interpretation("IND", "Indeterminate")]
    elif judgement.positive is not None:
        observation["interpretation"] = [
            _interpretation("POS", "Positive") if judgement.positive else _interpretation("NEG", "Negative")
        ]
    return {
        "resourceType": "DiagnosticReport",
        "contained": [device, observation],
        "identifier": [{"system": REQUEST_SYSTEM, "value": request_id}],
        "status": "preliminary",
        "code": {"text": "Classification of a dermoscopic image"},
        "issued": issued.isoformat(timespec="milliseconds"),
        "result": [{"reference": "#answer"}],
        "conclusion": NOTICE,
    }


def _concept(label: str) -> dict[str, Any]:
    concept: dict[str, Any] = {"text": label}
    if label in SNOMED:
        code, display = SNOMED[label]
        concept["coding"] = [{"system": _SNOMED, "code": code, "display": display}]
    return concept


def _interpretation(code: str, display: str) -> dict[str, Any]:
    return {"coding": [{"system": _INTERPRETATION, "code": code, "display": display}]}
