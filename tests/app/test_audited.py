"""The whole service with an audit log: no answer without its record."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.audit import Secret, verify
from app.cli import main
from app.main import create_app
from app.settings import Settings
from tests.conftest import JPEG


@pytest.fixture
def settings(quick_store: Path, tmp_path: Path) -> Settings:
    (tmp_path / "audit.key").write_bytes(os.urandom(32))
    return Settings(model_store=quick_store, audit_log=tmp_path / "audit.log", audit_key_file=tmp_path / "audit.key")


@pytest.fixture
def audited(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def records(settings: Settings) -> list[dict[str, object]]:
    assert settings.audit_log is not None
    return [json.loads(line) for line in settings.audit_log.read_text().splitlines()]


def test_each_answer_has_its_record(audited: TestClient, settings: Settings, lesion: bytes) -> None:
    answer = audited.post("/predict", content=lesion, headers=JPEG).json()
    audited.post("/explain", content=lesion, headers=JPEG)
    audited.post("/predict/batch", files=[("files", ("a", lesion)), ("files", ("b", b"no image"))])
    assert audited.post("/predict", content=b"no image", headers=JPEG).status_code == 400
    written = records(settings)
    assert [record["route"] for record in written] == ["/predict", "/explain", "/predict/batch"]
    assert written[0]["request_id"] == answer["request_id"]
    assert written[0]["probabilities"] == answer["probabilities"]
    assert len({record["image"] for record in written}) == 1  # one image, one keyed hash
    assert lesion[:8].hex() not in json.dumps(written)


def test_without_its_record_there_is_no_answer_until_the_disk_has_room_again(
    audited: TestClient, settings: Settings, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("app.audit.os.pwrite", full)
        answer = audited.post("/predict", content=lesion, headers=JPEG)
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:dermlens:problem:audit-failed")
        assert "probabilities" not in answer.text
        ready = audited.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the audit log cannot be written")
    assert audited.get("/readyz").status_code == 200
    assert audited.post("/predict", content=lesion, headers=JPEG).status_code == 200
    assert [record["event"] for record in records(settings)] == ["resumed", "prediction"]


def test_the_log_goes_on_after_a_restart_and_is_checked_by_command(
    settings: Settings, lesion: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with TestClient(create_app(settings)) as client:
            client.post("/predict", content=lesion, headers=JPEG)
    log, key = str(settings.audit_log), str(settings.audit_key_file)
    assert settings.audit_key_file is not None
    assert verify(Path(log), Secret(settings.audit_key_file.read_bytes())).records == 2

    def run(*arguments: str) -> object:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return ended.value.code

    assert run("audit", "verify", log, "--key-file", key) == 0
    assert "2 records in 1 files" in capsys.readouterr().out
    assert run("audit", "verify", log, "--key-file", key, "--json") == 0
    sound = json.loads(capsys.readouterr().out)
    first, last = (record["time"] for record in records(settings))
    assert sound == {
        **{"log": log, "sound": True, "problem": None},
        **{"records": 2, "files": 1, "first": first, "last": last},
    }
    (tmp_path / "a.jpg").write_bytes(lesion)
    assert run("audit", "find", str(tmp_path / "a.jpg"), "--log", log, "--key-file", key) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    Path(log).write_text(Path(log).read_text().replace("malignant", "benign", 1))
    assert run("audit", "verify", log, "--key-file", key) == 1
    assert "line 1" in capsys.readouterr().err
    assert run("audit", "verify", log, "--key-file", key, "--json") == 1
    out, err = capsys.readouterr()
    broken = json.loads(out)
    assert broken == dict.fromkeys(sound) | {"log": log, "sound": False, "problem": broken["problem"]}
    assert err == f"dermlens: {broken['problem']}\n"
    assert "line 1" in broken["problem"]


def test_a_second_server_on_one_log_and_a_log_without_a_secret_are_refused(
    audited: TestClient, settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited.get("/readyz").status_code == 200
    monkeypatch.setattr("app.logs.configure", lambda *_: None)
    for name in ("model_store", "audit_log", "audit_key_file"):
        monkeypatch.setenv(f"DERMLENS_{name.upper()}", str(getattr(settings, name)))
    for says in ("another server writes this audit log", "set DERMLENS_AUDIT_KEY_FILE"):
        with pytest.raises(SystemExit) as ended:
            main(["serve"])
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
        monkeypatch.delenv("DERMLENS_AUDIT_KEY_FILE", raising=False)
