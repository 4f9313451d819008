"""A server that knows when not to answer, and what it says then."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from PIL import Image

from app.cli import main as cli
from app.engines.openvino_engine import OpenVinoEngine
from app.main import create_app
from app.model import out_of_distribution, store
from app.model.manifest import OutOfDistribution, Preprocessing
from app.model.out_of_distribution import Familiar
from app.model.preprocess import decode
from app.settings import Settings
from tests.conftest import JPEG, NAME, encode, make_manifest, make_rule

SIDE = 64
STRIPES = np.zeros((240, 320, 3), np.uint8)
STRIPES[:, ::16, 2] = 255  # blue lines on black
FOREIGN = encode(Image.fromarray(STRIPES), "PNG")


@pytest.fixture(scope="module")
def wary_store(tmp_path_factory: pytest.TempPathFactory, random_weights: bytes, lesion: bytes) -> Path:
    """At 64 pixels; what lies nearer to stripes than to the drawn lesion is out of distribution."""
    root = tmp_path_factory.mktemp("wary_store")
    small = Preprocessing(size=SIDE, resize="squash-bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    manifest = make_manifest(preprocessing=small, abstention={"0.95": make_rule(0, 1), "0.90": make_rule(0, 0)})
    files = {store.WEIGHTS: random_weights}
    store.publish(root, manifest, files)
    engine = OpenVinoEngine(store.load(root, NAME, "1"), precision="float32")
    features = engine.run(np.stack([decode(data, size=SIDE).pixels for data in (lesion, FOREIGN)])).features
    assert features is not None
    one = np.eye(1024, 1, dtype=np.float32)
    familiar = Familiar(features[0], one, np.ones(1, np.float32), 1.0)
    limits = OutOfDistribution(
        method="ppca-mahalanobis",
        threshold=float(familiar.score(features[1])) / 2,
        fitted_on="one image",
        flagged={},
        auroc={},
    )
    files[out_of_distribution.FILE] = safetensors.numpy.save(familiar.arrays())
    store.publish(root, manifest.model_copy(update={"version": "2", "out_of_distribution": limits}), files)
    store.promote(root, NAME, "2")
    return root


@pytest.fixture(scope="module")
def client(wary_store: Path) -> Iterator[TestClient]:
    settings = Settings(model_store=wary_store, precision="float32", max_batch=4, max_queue=8)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def decisions(client: TestClient, image: bytes, **query: str) -> Iterator[dict[str, Any]]:
    """What each route decides."""
    yield client.post("/predict", params=query, content=image).json()["decision"]
    (item,) = client.post("/predict/batch", params=query, files=[("files", ("a", image, "image/jpeg"))]).json()
    yield item["prediction"]["decision"]
    yield client.post("/explain", params=query, content=image, headers={"accept": "application/json"}).json()[
        "decision"
    ]


def counted(client: TestClient, reason: str) -> float:
    name = f'dermlens_refer_reasons_total{{reason="{reason}",version="2"}} '
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


@pytest.mark.parametrize("coverage", ["0.95", "off"])
def test_a_foreign_image_is_referred_whatever_the_coverage(client: TestClient, coverage: str) -> None:
    before = counted(client, "out_of_distribution")
    for decision in decisions(client, FOREIGN, coverage=coverage):
        assert decision["refer"]
        assert "out_of_distribution" in decision["refer_because"]
        assert any("unlike the dermoscopic images" in reason for reason in decision["reasons"])
        novelty = decision["out_of_distribution"]
        assert novelty["flagged"]
        assert novelty["score"] == pytest.approx(2 * novelty["threshold"], rel=1e-3)
    assert counted(client, "out_of_distribution") == before + 3


def test_a_familiar_image_is_scored_and_answered(client: TestClient, lesion: bytes) -> None:
    for decision in decisions(client, lesion):
        assert decision["refer_because"] == []
        assert not decision["refer"]
        assert not decision["out_of_distribution"]["flagged"]


def test_every_reason_is_given(client: TestClient) -> None:
    for decision in decisions(client, FOREIGN, coverage="0.90"):
        assert decision["refer_because"][:2] == ["conformal", "out_of_distribution"]
        assert len(decision["reasons"]) >= 2


def test_a_spoilt_image_is_referred_and_one_with_a_flaw_is_only_warned_of(client: TestClient, lesion: bytes) -> None:
    flat = client.post("/predict", params={"coverage": "off"}, content=encode(Image.new("RGB", (99, 99), "#a86")))
    spoilt = flat.json()
    assert "quality" in spoilt["decision"]["refer_because"]
    assert any(reason.startswith("blurred") for reason in spoilt["decision"]["reasons"])
    assert any(warning.startswith("blurred") for warning in spoilt["image"]["warnings"])
    dark = Image.open(io.BytesIO(lesion)).point(lambda value: value * 0.35)
    flawed = client.post("/predict", params={"coverage": "off"}, content=encode(dark)).json()
    assert any(warning.startswith("too dark") for warning in flawed["image"]["warnings"])
    assert "quality" not in flawed["decision"]["refer_because"]


def test_v2_says_why(client: TestClient) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(FOREIGN).decode()]}
    body = {"inputs": [tensor], "parameters": {"coverage": "off"}}
    outputs = {o["name"]: o["data"] for o in client.post(f"/v2/models/{NAME}/infer", json=body).json()["outputs"]}
    assert outputs["refer"] == [True]
    assert "out_of_distribution" in outputs["refer_because"][0].split(",")


def test_the_command_line_says_why(
    wary_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(wary_store))
    monkeypatch.setenv("DERMLENS_PRECISION", "float32")
    path = tmp_path / "stripes.png"
    path.write_bytes(FOREIGN)
    with pytest.raises(SystemExit) as ended:
        cli(["predict", "--json", "--tta", "flips", str(path)])
    assert ended.value.code == 0
    row = json.loads(capsys.readouterr().out)
    assert row["refer"]
    assert "out_of_distribution" in row["refer_because"]


def test_a_version_without_statistics_flags_nothing(wary_store: Path, lesion: bytes) -> None:
    settings = Settings(model_store=wary_store, model_version="1", precision="float32", max_batch=1)
    with TestClient(create_app(settings)) as client:
        decision = client.post("/predict", content=lesion, headers=JPEG).json()["decision"]
    assert decision["out_of_distribution"] is None
    assert decision["refer_because"] == []


def test_statistics_that_are_missing_stop_a_version(wary_store: Path) -> None:
    path = wary_store / NAME / "2" / out_of_distribution.FILE
    kept = path.read_bytes()
    path.unlink()
    try:
        with pytest.raises(store.VersionDamaged, match="missing"):
            store.load(wary_store, NAME, "2")
    finally:
        path.write_bytes(kept)


def test_flips_are_averaged_in_one_batch_and_a_mirrored_image_gets_the_same_answer(
    client: TestClient, lesion: bytes
) -> None:
    pixels = decode(lesion, size=SIDE).pixels.transpose(1, 2, 0)
    image, mirrored = (encode(Image.fromarray(np.ascontiguousarray(p)), "PNG") for p in (pixels, pixels[:, ::-1]))
    headers = {"accept": "application/json"}
    answers = [
        client.post("/explain", params={"tta": "flips", "target": "malignant"}, content=data, headers=headers).json()
        for data in (image, mirrored)
    ]
    assert answers[0]["probabilities"] == pytest.approx(answers[1]["probabilities"], abs=1e-5)
    ours, theirs = (np.array(answer["map"]) for answer in answers)
    assert np.allclose(ours, theirs[:, ::-1], atol=1e-4 * np.abs(ours).max())
    plain = [client.post("/predict", content=data).json()["probabilities"]["malignant"] for data in (image, mirrored)]
    assert plain[0] != pytest.approx(plain[1], abs=1e-6)


def test_flips_take_four_places(client: TestClient, lesion: bytes) -> None:
    files = [("files", ("a", lesion, "image/jpeg"))] * 3
    assert client.post("/predict/batch", files=files).status_code == 200
    refused = client.post("/predict/batch", params={"tta": "flips"}, files=files)  # 12 of 8 places
    assert refused.status_code == 503
    assert client.post("/predict", params={"tta": "twice"}, content=lesion, headers=JPEG).status_code == 422
