"""dermlens serve --check, and the warnings of a start."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from app.cli import main
from app.cli.check import describe
from app.model import store
from app.settings import Settings, unknown_variables
from tests.conftest import NAME


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--check", *arguments])
    return int(str(ended.value.code))


@pytest.fixture(autouse=True)
def _environment(model_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(model_store))
    monkeypatch.setattr("app.engines.base.nvidia_driver", lambda: False)


def test_a_good_start_is_told_with_its_engine_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  DERMLENS_PORT=8000" in lines
    assert any(line.startswith("* DERMLENS_MODEL_STORE=") for line in lines)
    assert "engine: openvino, since there is no NVIDIA driver" in lines
    assert "model: asff-resnet50 1, every file verified" in lines
    assert lines[-1] == "it would start"


def test_json_holds_every_setting_and_the_options_go_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_PORT", "7000")
    assert run("--json", "--port", "7001") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"].keys() == {f"DERMLENS_{name.upper()}" for name in Settings.model_fields}
    assert found["settings"]["DERMLENS_PORT"] == {"value": 7001, "set": True}
    assert found["settings"]["DERMLENS_HOST"]["set"] is False
    assert found["versions"].keys() == {"python", "dermlens", "openvino", "torch"}
    assert found["devices"]
    assert found["problems"] == []


@pytest.mark.parametrize(
    ("changes", "setting", "says"),
    [
        ({"model_store": Path("/nowhere")}, "DERMLENS_MODEL_STORE", "set DERMLENS_MODEL_STORE"),
        ({"model_version": "9"}, "DERMLENS_MODEL_VERSION", "there: 1"),
        ({"operating_point": "lucky"}, "DERMLENS_OPERATING_POINT", "balanced, sensitivity-95"),
        ({"engine": "cuda"}, "DERMLENS_ENGINE", "use auto"),
        ({"engine": "torch", "precision": "int8"}, "DERMLENS_PRECISION", "float32: use auto"),
        ({"precision": "int8"}, "DERMLENS_PRECISION", "no int8 graph: use auto"),
        ({"api_keys": Path("/nowhere")}, "DERMLENS_API_KEYS", "/nowhere"),
        ({"audit_log": Path("/tmp/audit")}, "DERMLENS_AUDIT_KEY_FILE", "set DERMLENS_AUDIT_KEY_FILE"),  # noqa: S108 - not made
        ({"decode_isolation": "process", "decoder": "nvjpeg"}, "DERMLENS_DECODE_ISOLATION", "set DERMLENS_DECODER"),
        ({"decoder": "nvjpeg"}, "DERMLENS_DECODER", "CUDA"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], setting: str, says: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    problems = {p["setting"]: p["problem"] for p in describe(Settings().model_copy(update=changes))["problems"]}
    assert says in problems[setting]


def test_one_problem_hides_no_other_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DERMLENS_API_KEYS", str(tmp_path / "none.toml"))
    monkeypatch.setenv("DERMLENS_AUDIT_LOG", str(tmp_path / "no-folder" / "audit"))
    monkeypatch.setenv("DERMLENS_MODEL_VERSION", "9")
    assert run() == 2
    lines = capsys.readouterr().out.splitlines()
    told = [line.split(": ")[1] for line in lines if line.startswith("problem: ")]
    assert told == ["DERMLENS_API_KEYS", "DERMLENS_AUDIT_KEY_FILE", "DERMLENS_AUDIT_LOG", "DERMLENS_MODEL_VERSION"]
    assert lines[-1] == "4 to put right before it starts"


def test_a_damaged_version_is_no_model(tmp_path: Path, random_weights: bytes, model_store: Path) -> None:
    manifest = store.read_manifest(model_store, NAME, "1")
    store.publish(tmp_path, manifest, {store.WEIGHTS: random_weights})
    store.promote(tmp_path, NAME, "1")
    (tmp_path / NAME / "1" / store.WEIGHTS).write_bytes(b"other")
    found = describe(Settings(model_store=tmp_path))
    assert found["model"] is None
    (problem,) = found["problems"]
    assert "restore it" in problem["problem"]


def test_every_bad_value_is_named_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("DERMLENS_DOCS", "perhaps")
    assert run() == 2
    port, docs = capsys.readouterr().err.splitlines()
    assert port.startswith("dermlens: DERMLENS_PORT: ")
    assert port.endswith("unset it for 8000")
    assert docs.startswith("dermlens: DERMLENS_DOCS: ")


def test_secrets_are_told_by_their_path_alone(tmp_path: Path) -> None:
    secret = tmp_path / "audit.key"
    secret.write_text("the very secret content of this file, long enough")
    keys = tmp_path / "keys.toml"
    keys.write_text('[[keys]]\nname = "ward"\nscopes = ["predict"]\nsha256 = "not-a-hash-but-a-key"\n')
    found = describe(Settings(audit_log=tmp_path / "audit", audit_key_file=secret, api_keys=keys))
    told = json.dumps(found)
    assert str(secret) in told
    assert [p["setting"] for p in found["problems"]] == ["DERMLENS_API_KEYS"]
    assert "very secret" not in told
    assert "not-a-hash" not in told


def test_a_misspelt_variable_is_told_with_the_nearest_setting() -> None:
    names = ["PATH", "DERMLENS_PORT", "DERMLENS_DATA_DIR", "DERMLENS_TIMEOUT", "DERMLENS_CAT"]
    assert unknown_variables(names) == [
        "DERMLENS_CAT is no setting: unset it",
        "DERMLENS_TIMEOUT is no setting: did you mean DERMLENS_TIMEOUT_MS?",
    ]


def test_a_start_warns_of_a_misspelt_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DERMLENS_MAX_QUEU", "9")
    monkeypatch.setattr("app.cli.serve._Server.run", lambda _: None)
    monkeypatch.setattr("app.logs.configure", lambda *_: None)
    monkeypatch.setattr("os._exit", sys.exit)
    with caplog.at_level(logging.WARNING), pytest.raises(SystemExit):
        main(["serve", "--port", "0"])
    assert "DERMLENS_MAX_QUEU is no setting: did you mean DERMLENS_MAX_QUEUE?" in caplog.messages


def test_a_cuda_device_is_chosen_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.engines.base.nvidia_driver", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: f"card {number}")
    found = describe(Settings())
    assert found["devices"][1:] == ["card 0", "card 1"]
    assert found["engine"]["engine"] == "cuda"
    assert found["engine"]["precision"]["precision"] == "float16"


@pytest.mark.parametrize("engine", ["torch", "cuda"])
def test_an_engine_without_its_library_is_a_problem(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "app.engines.torch_engine", raising=False)
    (problem,) = describe(Settings().model_copy(update={"engine": engine}))["problems"]
    assert problem["setting"] == "DERMLENS_ENGINE"
    assert "torch is not installed: use auto" in problem["problem"]
