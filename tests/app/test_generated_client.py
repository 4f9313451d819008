"""A client that a generator makes from the OpenAPI description asks the server."""

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings
from tests.conftest import running


def test_a_generated_client_reads_typed_answers(
    careful_store: Path, lesion: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(model_store=careful_store, precision="float32"))
    (tmp_path / "openapi.json").write_text(json.dumps(app.openapi()))
    (tmp_path / "config.yaml").write_text("post_hooks: []\n")  # no formatting
    command = [
        *(sys.executable, "-m", "openapi_python_client", "generate", "--path", str(tmp_path / "openapi.json")),
        *("--output-path", str(tmp_path / "dermlens_made"), "--meta", "none", "--fail-on-warning"),
        *("--config", str(tmp_path / "config.yaml")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("dermlens_made")
    types = importlib.import_module("dermlens_made.types")
    bodies = importlib.import_module("dermlens_made.models")
    predict = importlib.import_module("dermlens_made.api.inference.predict")
    predict_batch = importlib.import_module("dermlens_made.api.inference.predict_batch")
    explain = importlib.import_module("dermlens_made.api.inference.explain")
    models = importlib.import_module("dermlens_made.api.model.models")

    def file(data: bytes) -> object:
        return types.File(payload=io.BytesIO(data), file_name="image")

    with running(app) as port, made.Client(f"http://127.0.0.1:{port}") as client:
        raw = predict.sync(client=client, body=types.File(payload=lesion))
        form = predict.sync(client=client, body=bodies.PredictFilesBody(file=file(lesion)))
        refused = predict.sync(client=client, body=types.File(payload=b"no image"))
        files = bodies.PredictBatchBody(files=[file(lesion), file(b"no image")])
        first, second = predict_batch.sync(client=client, body=files)
        listed = models.sync(client=client)
        explanation = explain.sync(client=client, body=types.File(payload=lesion), accept="application/json")
    assert isinstance(raw, bodies.Prediction)
    assert raw.probabilities.to_dict() == form.probabilities.to_dict()
    assert raw.decision.coverage == "0.95"
    assert raw.image.width == 320
    assert isinstance(refused, bodies.Problem)
    assert refused.type_ == "urn:dermlens:problem:not-an-image"
    assert first.prediction.label == raw.label
    assert second.problem.status == 400
    assert [version.served for version in listed.versions] == [True]
    assert len(explanation.map_) == 4
