"""A version that takes age, sex and site beside the image, from its training to its answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.client import BadRequest, Client
from app.main import create_app
from app.model import metadata, store
from app.settings import Settings
from tests.app.test_served import series, until
from tests.conftest import JPEG, NAME, careful_manifest, running
from training.metadata import main as train

JSON = JPEG | {"accept": "application/json"}
OLD = {"age": "85", "site": "head/neck"}  # what `draw_cases` leans towards malignant
YOUNG = {"age": "25", "site": "anterior torso"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes) -> Path:
    """Version 1 answers from the image alone; version 2, which is current, was trained from it on drawn cases."""
    root = tmp_path_factory.mktemp("metadata")
    store.publish(root, careful_manifest(), {store.WEIGHTS: random_weights})
    source, out = str(root / NAME / "1"), str(root / "evidence")
    train(["--version", source, "--drawn", "200", "--out", out, "--publish", str(root)])
    store.promote(root, NAME, "2")
    return root


def serve(root: Path, **settings: Any) -> TestClient:
    fields: dict[str, Any] = {"model_store": root, "precision": "float32", "max_batch": 4, "coverage": "0.90"}
    return TestClient(create_app(Settings(**fields | settings)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[TestClient]:
    with serve(root) as client:
        yield client


@pytest.fixture(scope="module")
def plain(root: Path) -> Iterator[TestClient]:
    """A server of version 1."""
    with serve(root, model_version="1") as client:
        yield client


def said(client: TestClient, path: str, image: bytes, **params: str) -> dict[str, Any]:
    """The answer less what differs between versions and requests."""
    answer = client.post(path, params=params, content=image, headers=JSON)
    assert answer.status_code == 200, answer.text
    fields: dict[str, Any] = answer.json()
    del fields["request_id"], fields["model"]
    fields.pop("overlay_png", None)  # names the version and the probability
    return fields


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_without_metadata_the_answer_is_that_of_the_version_without_the_head(
    client: TestClient, plain: TestClient, lesion: bytes, path: str
) -> None:
    alone = said(client, path, lesion)
    assert alone == said(plain, path, lesion)
    assert alone["metadata"] == []
    assert not [reason for reason in alone["decision"]["reasons"] if "beside the image" in reason]


def test_metadata_moves_the_answer_and_is_named_in_it(client: TestClient, lesion: bytes) -> None:
    answers = {name: said(client, "/predict", lesion, **known) for name, known in (("old", OLD), ("young", YOUNG))}
    alone = said(client, "/predict", lesion)["probabilities"]["malignant"]
    old, young = (answers[name]["probabilities"]["malignant"] for name in ("old", "young"))
    assert old > young  # as the cases were drawn
    assert alone not in (old, young)
    assert {tuple(answer["metadata"]) for answer in answers.values()} == {("age", "site")}
    assert any(
        reason.startswith("used beside the image: age and site (experimental") and "fitted without" in reason
        for reason in answers["old"]["decision"]["reasons"]
    )
    assert said(client, "/predict", lesion, sex="female")["metadata"] == ["sex"]


def test_it_moves_the_mean_of_four_flips_too(client: TestClient, lesion: bytes) -> None:
    young, old = (said(client, "/predict", lesion, tta="flips", **known) for known in (YOUNG, OLD))
    assert old["probabilities"]["malignant"] > young["probabilities"]["malignant"] + 0.01
    assert old["metadata"] == ["age", "site"]


def test_the_evidence_is_of_the_image_alone(client: TestClient, lesion: bytes) -> None:
    alone, told = (said(client, "/explain", lesion, target="malignant", **known) for known in ({}, OLD))
    assert told["probabilities"] == said(client, "/predict", lesion, **OLD)["probabilities"] != alone["probabilities"]
    assert told["metadata"] == ["age", "site"]
    assert (told["map"], told["peak"]) == (alone["map"], alone["peak"])


def test_a_fhir_report_says_what_was_used(client: TestClient, lesion: bytes) -> None:
    report = client.post("/predict", params=OLD | {"format": "fhir"}, content=lesion, headers=JPEG).json()
    notes = [note["text"] for resource in report["contained"] for note in resource.get("note", [])]
    assert any("used beside the image: age and site (experimental" in note for note in notes)


def test_a_batch_takes_none(client: TestClient, lesion: bytes) -> None:
    (item,) = client.post("/predict/batch", params=OLD, files=[("files", ("a", lesion, "image/jpeg"))]).json()
    assert item["prediction"]["metadata"] == []
    assert item["prediction"]["probabilities"] == said(client, "/predict", lesion)["probabilities"]


@pytest.mark.parametrize("path", ["/predict", "/explain"])
def test_a_version_without_the_head_refuses_what_it_cannot_use(plain: TestClient, lesion: bytes, path: str) -> None:
    answer = plain.post(path, params=OLD, content=lesion, headers=JPEG)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:dermlens:problem:invalid-parameter")
    assert answer.json()["detail"] == "no use for age and site: this version answers from the image alone"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("age", value) for value in ("-1", "120.5", "nan", "inf", "ripe", "")),
        ("sex", "Female"),
        ("site", "elbow"),
    ],
)
def test_what_is_not_valid_is_refused_without_quoting_it(
    client: TestClient, lesion: bytes, field: str, value: str
) -> None:
    answer = client.post("/predict", params=OLD | {field: value}, content=lesion, headers=JPEG)
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:dermlens:problem:invalid-parameter")
    assert answer.json()["detail"].startswith(f"query.{field}: ")
    assert not value or value not in answer.json()["detail"]


@pytest.mark.parametrize("age", ["0", "120"])
def test_the_ends_of_life_are_ages(client: TestClient, lesion: bytes, age: str) -> None:
    assert said(client, "/predict", lesion, age=age)["metadata"] == ["age"]


def test_only_a_version_that_takes_metadata_describes_it(client: TestClient, plain: TestClient) -> None:
    for path in ("/predict", "/explain"):
        operations = [server.get("/openapi.json").json()["paths"][path]["post"] for server in (client, plain)]
        told, untold = ({p["name"]: p["schema"] for p in operation["parameters"]} for operation in operations)
        assert set(told) - set(untold) == {"age", "sex", "site"}
        assert (told["age"]["minimum"], told["age"]["maximum"]) == (0, 120)
        assert told["sex"]["enum"] == list(metadata.SEXES)
        assert told["site"]["enum"] == list(metadata.SITES)


def test_no_metric_holds_a_value(client: TestClient, lesion: bytes) -> None:
    said(client, "/predict", lesion, age="47.190625", sex="female", site="oral/genital")
    page = client.get("/metrics").text
    assert "dermlens_predictions_total" in page
    assert not [value for value in ("47.190625", "female", "oral/genital") if value in page]


def test_a_shadow_is_not_compared_with_an_answer_that_it_could_not_give(root: Path, lesion: bytes) -> None:
    with serve(root, shadow_version="1", shadow_share=1) as client:
        said(client, "/predict", lesion, **OLD)
        assert series(client, 'dermlens_shadow_dropped_total{reason="incomparable"}') == 1
        said(client, "/predict", lesion)
        until(lambda: series(client, "dermlens_shadow_pairs_total") == 1, "scored")


def test_the_client_passes_it_on(root: Path, lesion: bytes) -> None:
    app = create_app(Settings(model_store=root, precision="float32", max_batch=1))
    with running(app) as port, Client(f"http://127.0.0.1:{port}") as client:
        alone, told = client.predict(lesion), client.predict(lesion, age=85, sex="male", site="head/neck")
        explained = client.explain(lesion, target="malignant", age=85, sex="male", site="head/neck")
        with pytest.raises(BadRequest, match=r"query\.age"):
            client.predict(lesion, age=-1)
    assert alone.metadata == []
    assert told.metadata == explained.metadata == ["age", "sex", "site"]
    assert told.probabilities != alone.probabilities
    assert explained.probabilities == pytest.approx(told.probabilities)


def test_a_manifest_says_what_it_is_and_what_it_gained(client: TestClient) -> None:
    listed = {version["version"]: version["manifest"] for version in client.get("/models").json()["versions"]}
    assert listed["1"]["metadata"] is None
    about = listed["2"]["metadata"]
    assert about["experimental"] is True
    assert about["fields"] == ["age", "sex", "site"]
    assert "drawn" in about["trained_on"]
    assert set(about["gain"]) == {"image alone", "all fields", "no age", "no sex", "no site"}
    assert about["gain"]["all fields"]["low"] < about["gain"]["all fields"]["value"] != 0


def test_a_head_that_is_missing_or_damaged_stops_a_version(root: Path) -> None:
    path = root / NAME / "2" / metadata.FILE
    kept = path.read_bytes()
    try:
        for damaged, word in ((kept[:-1] + bytes([kept[-1] ^ 1]), "not the published file"), (None, "missing")):
            path.unlink()
            if damaged:
                path.write_bytes(damaged)
            with pytest.raises(store.VersionDamaged, match=word):
                store.load(root, NAME, "2")
    finally:
        path.write_bytes(kept)
