"""The FHIR answer, held against the R4B models of fhir.resources, which has none of R4 any more."""

from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from fhir.resources.R4B.device import Device
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from fhir.resources.R4B.observation import Observation
from pydicom.sr.codedict import codes

from app.clinical.fhir import SNOMED, diagnostic_report
from app.model.labels import NOTICE
from tests.app.clinical.drawn import judgement
from tests.conftest import JPEG, make_manifest

FHIR = "application/fhir+json"


def report(**changes: Any) -> dict[str, Any]:
    return diagnostic_report(
        judgement(**changes), make_manifest(), request_id="01X", warnings=("low resolution",), issued=datetime.now(UTC)
    )


def check(found: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The report, its device and its observation, each by its model."""
    device, observation = found["contained"]
    return DiagnosticReport(**found), Device(**device), Observation(**observation)


@pytest.mark.parametrize("ask", [{"params": {"format": "fhir"}}, {"headers": JPEG | {"accept": FHIR}}])
def test_the_route_answers_in_fhir(client: TestClient, lesion: bytes, ask: dict[str, Any]) -> None:
    answer = client.post("/predict", content=lesion, **({"headers": JPEG} | ask))
    assert (answer.status_code, answer.headers["content-type"]) == (200, FHIR)
    assert answer.headers["x-model-version"] == "1"
    found, device, observation = check(answer.json())
    plain = client.post("/predict", content=lesion, headers=JPEG).json()
    assert {c.code.text: float(c.valueQuantity.value) for c in observation.component} == {
        f"Probability of {name}": pytest.approx(p, abs=1e-6) for name, p in plain["probabilities"].items()
    }
    assert observation.valueCodeableConcept.text == plain["label"]
    assert found.identifier[0].value == answer.headers["x-request-id"]
    assert device.version[0].value == plain["model"]["version"]


def test_nothing_is_final_and_nobody_is_named() -> None:
    found, device, observation = check(report())
    assert (found.status, observation.status) == ("preliminary", "preliminary")
    assert found.conclusion == NOTICE
    assert found.subject is None
    assert observation.subject is None
    assert found.result[0].reference == f"#{observation.id}"
    assert observation.device.reference == f"#{device.id}"
    assert {(c.valueQuantity.system, c.valueQuantity.code) for c in observation.component} == {
        ("http://unitsofmeasure.org", "1")
    }


REFERRED = {
    "refer_because": ("conformal",),
    "reasons": ("both are plausible",),
    "prediction_set": ("benign", "malignant"),
}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, "POS"),
        ({"positive": False, "label": "benign"}, "NEG"),
        (REFERRED, "IND"),
    ],
)
def test_the_decision_is_interpreted_and_its_reasons_are_notes(changes: dict[str, Any], code: str) -> None:
    _, _, observation = check(report(**changes))
    assert observation.interpretation[0].coding[0].code == code
    notes = [note.text for note in observation.note]
    assert notes[-2:] == ["low resolution", NOTICE]
    assert all(any(reason in note for note in notes) for reason in changes.get("reasons", ()))


def test_other_classes_are_told_by_name() -> None:
    several = {"label": "nevus", "probabilities": {"nevus": 0.8, "wart": 0.1, "scar": 0.1}}
    _, _, observation = check(report(**several, positive=None, threshold=None))
    assert observation.valueCodeableConcept.coding is None
    assert observation.interpretation is None
    assert len(observation.component) == 3


def test_the_codes_are_those_of_pydicoms_dictionary() -> None:
    known = {"benign": codes.SCT.Benign, "malignant": codes.SCT.Malignant}
    assert {name: (code.value, code.meaning) for name, code in known.items()} == SNOMED
