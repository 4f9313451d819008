import json
from pathlib import Path

import pytest
from PIL import Image

from app.cli import main
from app.model import store
from app.model.labels import NOTICE
from tests.conftest import make_manifest


@pytest.fixture(autouse=True)
def _serve_the_random_version(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(model_store))


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0) if not isinstance(ended.value.code, str) else 1


@pytest.fixture
def image(tmp_path: Path, lesion: bytes) -> Path:
    path = tmp_path / "lesion.jpg"
    path.write_bytes(lesion)
    return path


def test_predict_prints_a_line_a_file_and_the_notice(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", image, image) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == second
    assert first.startswith(f"{image}: ")
    assert "malignant 0." in first
    assert "2 of 2 files classified" in err
    assert NOTICE in err


def test_predict_as_json_agrees_with_http(image: Path, capsys: pytest.CaptureFixture[str], client: object) -> None:
    from fastapi.testclient import TestClient

    assert isinstance(client, TestClient)
    assert run("predict", "--json", image) == 0
    row = json.loads(capsys.readouterr().out)
    over_http = client.post("/predict", content=image.read_bytes(), headers={"content-type": "image/jpeg"}).json()
    assert row["probabilities"] == pytest.approx(over_http["probabilities"], abs=1e-6)
    assert row["label"] == over_http["label"]


def test_one_bad_file_does_not_stop_the_rest(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert run("predict", text, tmp_path / "absent.png", image) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert f"{text}: the upload is not an image" in err
    assert "1 of 3 files classified" in err


def test_explain_writes_a_picture(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "why.png"
    assert run("explain", image, "-o", out, "--style", "side-by-side", "--target", "benign") == 0
    with Image.open(out) as picture:
        assert picture.size == (640, 240)
    assert "Grad-CAM for benign" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "value"), [("--target", "mole"), ("--alpha", "7")])
def test_explain_names_a_bad_option(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    assert run("explain", image, "-o", tmp_path / "x.png", option, value) == 2
    assert f"dermlens: {option}: give" in capsys.readouterr().err


def test_models_marks_the_served_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    assert capsys.readouterr().out.startswith("* asff-resnet50 1")
    assert run("models", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["version"] == "1"


def test_models_lists_versions_where_none_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    store.publish(tmp_path, make_manifest("3"), {store.WEIGHTS: random_weights})
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(tmp_path))
    assert run("models") == 0
    out, err = capsys.readouterr()
    assert out.startswith("  asff-resnet50 3")
    assert "no version is current" in err


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DERMLENS_MODEL_STORE", "/nowhere", "no version of asff-resnet50 is current in /nowhere"),
        ("DERMLENS_MODEL_VERSION", "9", "no version '9' of asff-resnet50"),
        ("DERMLENS_OPERATING_POINT", "lucky", "this version has balanced, sensitivity-95, specificity-95"),
        ("DERMLENS_PORT", "many", "DERMLENS_PORT: "),
        ("DERMLENS_ENGINE", "cuda", "torch sees no CUDA device"),
    ],
)
def test_serve_fails_with_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("serve") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dermlens: ")
    assert says in line


def test_serve_hands_the_app_and_the_options_to_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr("app.cli.uvicorn.run", lambda app, **options: seen.update(options, title=app.title))
    assert run("serve", "--host", "0.0.0.0", "--port", "9001") == 0  # noqa: S104 - a value, nothing listens
    assert (seen["title"], seen["host"], seen["port"]) == ("dermlens", "0.0.0.0", 9001)  # noqa: S104
