import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uvicorn
from PIL import Image

from app.cli import main
from app.model import store
from app.model.labels import NOTICE
from tests.conftest import NAME, make_manifest


@pytest.fixture(autouse=True)
def _serve_the_random_version(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(model_store))
    monkeypatch.setenv("DERMLENS_PRECISION", "float32")


@pytest.fixture
def careful(careful_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve the version that abstains."""
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))


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
    other = image.with_name("other.jpg")
    other.write_bytes(image.read_bytes())
    assert run("predict", image, other, image) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith(f"{image}: ")
    assert second == first.replace(str(image), str(other))
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


def test_explain_never_overwrites_the_image(image: Path, lesion: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", image, "-o", image.parent / "." / image.name) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert image.read_bytes() == lesion


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion"])
@pytest.mark.usefixtures("careful")
def test_explain_draws_by_other_methods(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert run("explain", image, "-o", tmp_path / "a.png") == 0
    assert run("explain", image, "-o", tmp_path / "b.png", "--method", method, "--target", "malignant") == 0
    assert f"{method.capitalize().replace('-', ' ')} for malignant 0." in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--target", "mole", "no target 'mole': this version has predicted, benign, malignant"),
        ("--alpha", "7", "--alpha: give a number"),
        ("--coverage", "0.95", "no coverage '0.95': this version has off"),
        ("--operating-point", "lucky", "no operating point 'lucky': this version has balanced"),
    ],
)
def test_explain_names_a_bad_option(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, says: str
) -> None:
    assert run("explain", image, "-o", tmp_path / "x.png", option, value) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dermlens: {says}")


@pytest.mark.parametrize(
    ("options", "label", "says"),
    [
        ((), None, "refer: neither benign nor malignant is plausible at 95% coverage"),
        (("--coverage", "0.90"), None, "refer: both benign and malignant are plausible at 90% coverage"),
        (("--coverage", "0.99", "--operating-point", "specificity-95"), "benign", None),
        (
            ("--coverage", "0.99", "--operating-point", "sensitivity-95"),
            "malignant",
            "note: only benign is plausible at 99% coverage, but the operating point sensitivity-95 says malignant",
        ),
        (("--coverage", "off"), None, None),
    ],
)
@pytest.mark.usefixtures("careful")
def test_predict_says_when_to_refer_and_why(
    image: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    label: str | None,
    says: str | None,
) -> None:
    assert run("predict", image, *options) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{image}: {label or ''}")
    assert says in line if says else "coverage" not in line


@pytest.mark.usefixtures("careful")
def test_predict_as_json_says_it_too(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("predict", "--json", image, "--coverage", "0.90") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["refer"], row["coverage"], row["prediction_set"]) == (True, "0.90", ["benign", "malignant"])
    assert row["reasons"] == ["both benign and malignant are plausible at 90% coverage"]


@pytest.mark.parametrize("command", ["predict", "explain"])
@pytest.mark.usefixtures("careful")
def test_a_coverage_that_the_version_does_not_have_is_named(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    output = ["-o", str(tmp_path / "x.png")] if command == "explain" else []
    assert run(command, image, *output, "--coverage", "0.80") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "dermlens: no coverage '0.80': this version has off, 0.90, 0.95, 0.99"


def test_models_marks_the_served_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("models") == 0
    assert capsys.readouterr().out.startswith("* asff-resnet50 1")
    assert run("models", "--json") == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["version"] == "1"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("models", "verify", "1"), {"name": "asff-resnet50", "version": "1", "files": 2}),
        (("models", "promote", "2"), {"name": "asff-resnet50", "version": "2"}),
        (("models", "prune", "--keep", "1"), {"name": "asff-resnet50", "removed": []}),
    ],
)
@pytest.mark.parametrize("place", [1, None])
def test_every_action_speaks_json(
    quick_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    says: dict[str, object],
    place: int | None,
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(quick_store))
    assert run(*command[:place], "--json", *(command[place:] if place else ())) == 0
    assert json.loads(capsys.readouterr().out) == says


def test_a_rollback_speaks_json(
    quick_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(quick_store))
    store.promote(quick_store, NAME, "2")
    assert run("models", "rollback", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": NAME, "version": "1"}
    assert store.current(quick_store, NAME) == "1"


@pytest.mark.parametrize("variable", ["DERMLENS_SHADOW_VERSION", "DERMLENS_MODEL_VERSION"])
def test_prune_keeps_the_version_that_a_setting_names(
    small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    root = small_store("1", "2", "3")
    store.promote(root, NAME, "3")
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(root))
    monkeypatch.setenv(variable, "1")
    assert run("models", "prune", "--keep", "1") == 0
    assert capsys.readouterr().out == "removed: 2\n"
    assert store.versions(root, NAME) == ["1", "3"]


def test_explain_and_keys_speak_json(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", image, "-o", tmp_path / "x.png", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == str(tmp_path / "x.png")
    assert told["target"] == told["label"]
    assert run("keys", "new", "ward", "--scope", "predict", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["secret"].startswith("dl_")
    assert not err


def test_models_lists_versions_where_none_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_weights: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    store.publish(tmp_path, make_manifest("3"), {store.WEIGHTS: random_weights})
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(tmp_path))
    assert run("models") == 0
    out, err = capsys.readouterr()
    assert out.startswith("  asff-resnet50 3")
    assert "no version of asff-resnet50 is current" in err


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DERMLENS_MODEL_STORE", "/nowhere", "no version of asff-resnet50 is current in /nowhere"),
        ("DERMLENS_MODEL_VERSION", "9", "no version '9' of asff-resnet50"),
        ("DERMLENS_OPERATING_POINT", "lucky", "this version has balanced, sensitivity-95, specificity-95"),
        ("DERMLENS_COVERAGE", "0.80", "DERMLENS_COVERAGE: "),
        ("DERMLENS_PORT", "many", "DERMLENS_PORT: "),
        ("DERMLENS_ENGINE", "cuda", "torch sees no CUDA device"),
    ],
)
def test_serve_fails_with_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("app.logs.configure", lambda *_: None)  # it would take over the suite's own logging
    assert run("serve") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dermlens: ")
    assert says in line


def test_serve_hands_the_app_and_the_options_to_uvicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[uvicorn.Config] = []
    monkeypatch.setattr("app.cli.serve._Server.run", lambda server: seen.append(server.config))
    monkeypatch.setattr("app.logs.configure", lambda *_: None)
    monkeypatch.setattr("os._exit", sys.exit)
    assert run("serve", "--host", "0.0.0.0", "--port", "9001") == 0  # noqa: S104 - a value, nothing listens
    (config,) = seen
    assert (config.app.title, config.host, config.port) == ("dermlens", "0.0.0.0", 9001)  # type: ignore[union-attr]  # noqa: S104
    assert config.timeout_graceful_shutdown == 30
