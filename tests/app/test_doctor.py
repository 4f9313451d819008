import json
from pathlib import Path

import pytest

from app.cli import build_parser, main


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_doctor_looks_at_everything(
    careful_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    monkeypatch.setenv("DERMLENS_MAX_BACH", "4")
    monkeypatch.setenv("DERMLENS_MAX_BATCH", "3")
    monkeypatch.setattr("app.cli.doctor.REPEATS", 3)
    assert run("doctor", "--json") == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(finding.keys() == {"check", "status", "detail"} for finding in findings)
    told = {finding["check"]: finding for finding in findings}
    assert told["settings"]["status"] == "advice"
    assert "DERMLENS_MAX_BACH" in told["settings"]["detail"]
    assert told["model"]["status"] == "ok"
    assert told["engine"]["detail"].startswith("openvino, since ")
    assert "median" in told["decode of a 1024×768 JPEG"]["detail"]
    assert "10th to 90th percentile" in told["forward pass of 3 images"]["detail"]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        (
            "DERMLENS_MODEL_STORE",
            "/nowhere",
            "problem  DERMLENS_MODEL_STORE: no version of asff-resnet50 is current",
        ),
        ("DERMLENS_API_KEYS", "/nowhere", "problem  DERMLENS_API_KEYS: /nowhere: No such file"),
        ("DERMLENS_HOST", "0.0.0.0", "advice   keys: everybody who reaches 0.0.0.0 may call"),  # noqa: S104
        ("DERMLENS_ENGINE", "cuda", "problem  DERMLENS_ENGINE: DERMLENS_ENGINE=cuda, but "),
    ],
)
def test_doctor_names_what_is_wrong(
    careful_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variable: str,
    value: str,
    says: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("DERMLENS_ENGINE", "cuda")  # which ends it before it measures speed
    monkeypatch.setenv("DERMLENS_MODEL_STORE", str(careful_store))
    monkeypatch.setenv(variable, value)
    assert run("doctor") == 1
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_learns_every_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    for command in ("predict", "explain", "promote", "doctor", "operating-point", "overlays"):
        assert command in script
    assert build_parser().parse_args(["doctor"]).json is False
