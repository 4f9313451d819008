"""`dermlens predict` over folders: the CSV file, what it goes on from, overlays, and a server in place of the model."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from app.cli import main
from app.engines.base import Engine, EngineName, Output, build_engine
from app.engines.openvino_engine import OpenVinoEngine
from app.main import create_app
from app.model.labels import NOTICE
from app.model.store import LoadedVersion
from app.security import new_key
from app.settings import Settings
from tests.conftest import ROOT, running

BATCHES: list[int] = []
ENGINES: list[Engine] = []


def engine(name: EngineName, loaded: LoadedVersion, how: dict[str, Any]) -> Engine:
    """One for every run of this file, since they take the same version: compiling it is most of a run."""
    if not ENGINES:
        ENGINES.append(build_engine(name, loaded, **how))
    return ENGINES[0]


@pytest.fixture(autouse=True)
def _serve_the_version_that_abstains(careful_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches are counted; Ctrl-C after the second where a test says so."""
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    monkeypatch.setenv("DERMLENS_PRECISION", "float32")
    monkeypatch.setenv("DERMLENS_MAX_BATCH", "2")
    monkeypatch.setattr("app.main.build_engine", lambda name, loaded, **how: engine(name, loaded, how))
    BATCHES.clear()
    run = OpenVinoEngine.run

    def counted(engine: OpenVinoEngine, images: NDArray[np.uint8]) -> Output:
        BATCHES.append(len(images))
        return run(engine, images)

    monkeypatch.setattr(OpenVinoEngine, "run", counted)


@pytest.fixture
def folder(tmp_path: Path, lesion: bytes) -> Path:
    """Five images in two folders, one of them bad, and a file that is none."""
    top = tmp_path / "images"
    (top / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/a.jpg", "sub/=1+1.jpg"):
        (top / name).write_bytes(lesion)
    (top / "sub" / "bad.jpg").write_bytes(b"no image")
    (top / "notes.txt").write_text("hello")
    return top


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, arguments)])
    return int(ended.value.code or 0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_becomes_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.csv"
    assert run(folder, "--recursive", "--csv", out, "--coverage", "0.90", "--operating-point", "sensitivity-95") == 1
    told = {Path(row["file"]).relative_to(folder).as_posix(): row for row in rows(out)}
    assert list(told) == ["a.jpg", "b.png", "sub/=1+1.jpg", "sub/a.jpg", "sub/bad.jpg"]
    assert told["sub/bad.jpg"]["error"] == "the upload is not an image: send a JPEG, PNG or WebP file"
    row = told["b.png"]
    assert float(row["probability_benign"]) + float(row["probability_malignant"]) == pytest.approx(1)
    assert (row["label"], row["positive"], row["refer"]) == ("malignant", "true", "true")
    assert (row["version"], row["operating_point"], row["coverage"]) == ("1", "sensitivity-95", "0.90")
    assert row["prediction_set"] == "benign; malignant"
    assert (row["width"], row["format"], row["error"]) == ("320", "JPEG", "")
    assert BATCHES == [2, 2]  # not one by one
    stdout, err = capsys.readouterr()
    assert not stdout
    assert f"4 of 5 files classified, 1 failed, 1 files of other kinds left out. {NOTICE}" in err


def test_a_folder_alone_is_not_looked_into_further(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(row["file"]).name for row in told] == ["a.jpg", "b.png"]
    shutil.rmtree(folder / "sub")
    for name in ("a.jpg", "b.png"):
        (folder / name).unlink()
    assert run(folder) == 2
    assert "no image in" in capsys.readouterr().err


def test_a_run_goes_on_where_another_stopped(folder: Path, tmp_path: Path, lesion: bytes) -> None:
    out = tmp_path / "out.csv"
    command = (folder, "-r", "--csv", out)
    assert run(*command) == 1
    first = out.read_text().splitlines(keepends=True)
    out.write_text("".join(first[:3]) + first[3][:20])  # what a kill may leave
    BATCHES.clear()
    (folder / "sub" / "bad.jpg").write_bytes(lesion)
    assert run(*command) == 0
    assert sum(BATCHES) == 3
    assert out.read_text().splitlines(keepends=True)[:5] == first[:5]
    BATCHES.clear()
    assert run(*command) == 0
    os.utime(folder / "a.jpg", (1, 1))
    assert (run(*command), BATCHES) == (0, [1])  # the file was changed
    assert run(*command, "--operating-point", "specificity-95") == 0
    assert run(*command, "--coverage", "off") == 0
    assert sum(BATCHES) == 1 + 5 + 5
    assert len(rows(out)) == 5 + 1 + 5 + 5
    assert run(*command, "--restart") == 0
    assert len(rows(out)) == 5


def test_what_failed_is_tried_again_and_has_one_row(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    assert run(folder / "sub" / "bad.jpg", tmp_path / "absent.jpg", "--csv", out) == 1
    assert run(folder / "sub" / "bad.jpg", tmp_path / "absent.jpg", "--csv", out) == 1
    assert ["No such file" in row["error"] for row in rows(out)] == [False, True]


def test_ctrl_c_keeps_what_came(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"
    counted = OpenVinoEngine.run

    def interrupted(engine: OpenVinoEngine, images: NDArray[np.uint8]) -> Output:
        if BATCHES:
            raise KeyboardInterrupt
        return counted(engine, images)

    monkeypatch.setattr(OpenVinoEngine, "run", interrupted)
    assert run(folder, "-r", "--csv", out) == 130
    assert "interrupted, 2 of 5 files classified" in capsys.readouterr().err
    monkeypatch.setattr(OpenVinoEngine, "run", counted)
    assert run(folder, "-r", "--csv", out) == 1
    assert len(rows(out)) == 5
    assert BATCHES == [2, 2]


def test_kill_9_keeps_what_came(folder: Path, tmp_path: Path, lesion: bytes) -> None:
    for n in range(80):
        (folder / f"{n:02}.jpg").write_bytes(lesion)
    out = tmp_path / "out.csv"
    command = [sys.executable, "-m", "app.cli", "predict", str(folder), "--csv", str(out)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 5:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(before) >= 5
    assert run(folder, "--csv", out) == 0
    assert out.read_text().splitlines(keepends=True)[: len(before)] == before
    assert len({row["file"] for row in rows(out)}) == len(rows(out)) == 82


def test_overlays_lie_as_the_images_do(folder: Path, tmp_path: Path) -> None:
    overlays, out = folder / "sub" / "overlays", tmp_path / "out.csv"
    command = (folder, folder / "sub", "-r", "--csv", out, "--overlays", overlays)
    (folder / "a.png").write_bytes((folder / "a.jpg").read_bytes())
    assert run(*command) == 1
    drawn = sorted(path.relative_to(overlays).as_posix() for path in overlays.rglob("*") if path.is_file())
    assert drawn == ["a.jpg.png", "a.png.png", "b.png.png", "sub/=1+1.jpg.png", "sub/a.jpg.png"]
    with Image.open(overlays / "sub" / "a.jpg.png") as picture:
        assert 3 * picture.width == 4 * picture.height
    (named,) = [row for row in rows(out) if row["file"].endswith("sub/a.jpg")]
    assert named["overlay"] == str(overlays / "sub" / "a.jpg.png")
    BATCHES.clear()
    (overlays / "a.jpg.png").unlink()
    assert run(*command) == 1
    assert BATCHES == [1]  # the picture that is missing; none of the pictures was taken for an image
    assert (overlays / "a.jpg.png").is_file()


def test_the_inputs_are_never_written_over(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(folder, "--overlays", folder) == 2
    assert run(folder, "-r", "--overlays", folder.parent) == 2
    assert run(folder / "a.jpg", "--csv", folder / "a.jpg", "--restart") == 2
    assert run(folder / "a.jpg", "--csv", folder / "notes.txt", "--restart") == 2
    assert "has other columns than this run's results" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_server_gives_the_same_rows(
    folder: Path,
    tmp_path: Path,
    careful_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here, there = tmp_path / "here.csv", tmp_path / "there.csv"
    key = new_key("ward", ["predict"])
    (tmp_path / "keys.toml").write_text(key.toml)
    (tmp_path / "key.txt").write_text(key.secret + "\n")
    options = ("-r", "--coverage", "0.90")
    assert run(folder, *options, "--csv", here, "--overlays", tmp_path / "here") == 1
    settings = Settings(model_store=careful_store, precision="float32", api_keys=tmp_path / "keys.toml")
    BATCHES.clear()
    with running(create_app(settings)) as port:
        warm = len(BATCHES)
        url = ("--url", f"http://127.0.0.1:{port}", "--workers", "2")
        assert run(folder, *url) == 2
        assert "dermlens: An API key is needed" in capsys.readouterr().err
        command = (folder, *options, *url, "--api-key-file", tmp_path / "key.txt")
        assert run(*command, "--csv", there, "--overlays", tmp_path / "there") == 1
        asked = len(BATCHES) - warm
        assert run(*command, "--csv", there, "--overlays", tmp_path / "there") == 1
        assert len(BATCHES) - warm == asked  # goes on from the same rows
        assert run(*command, "--operating-point", "lucky") == 2
        assert "no operating point 'lucky'" in capsys.readouterr().err
    for ours, theirs in zip(*(sorted(rows(path), key=lambda row: row["file"]) for path in (here, there)), strict=True):
        differing = {name for name in ours if ours[name] != theirs[name]}
        assert differing <= {"overlay", "request_id", "error", "probability_benign", "probability_malignant"}
    pictures = [{path.name for path in (tmp_path / name).rglob("*.png")} for name in ("here", "there")]
    assert pictures[0] == pictures[1]
    monkeypatch.setenv("DERMLENS_TIMEOUT_MS", "300")
    assert run(folder, *url) == 2  # it has gone
