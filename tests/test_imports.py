"""The arrows of ../shared/DESIGN.md, section 2, each in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WEB = {"fastapi", "starlette", "uvicorn"}
TRACING = {"app.tracing", "opentelemetry.sdk"}
CLINICAL = {"pydicom", "highdicom", "jpeg_ls", "fhir"}  # of an extra


def loaded_by(module: str) -> set[str]:
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("training.train", {*WEB, "app.main", "app.api", "app.batcher", "app.settings"}),
        ("training.export", {*WEB, "app.main", "app.engines"}),
        ("app.model.store", {*WEB, "torch", "app.engines", "training"}),
        ("app.model.preprocess", {*WEB, "torch", "app.engines", "training"}),
        ("app.model.overlay", {*WEB, "torch", "app.engines", "training"}),
        ("app.model.architecture", {*WEB, "app.engines", "training"}),
        ("app.model.onnx_graph", {*WEB, "torch", "app.engines", "training"}),
        ("app.decode_worker", {*WEB, "torch", "pydantic", "app.engines", "training"}),
        ("app.isolation", {*WEB, "torch", "app.engines", "training"}),
        ("app.clinical.dicom", {*WEB, *CLINICAL, "torch", "pydantic", "app.engines", "app.service", "training"}),
        ("app.clinical.dicom_out", {*WEB, "torch", "app.engines", "app.service", "app.settings", "training"}),
        ("app.clinical.fhir", {*WEB, *CLINICAL, "torch", "app.engines", "app.service", "training"}),
        ("app.batcher", {*WEB, "torch", "PIL", "pydantic", "app.model", "training"}),
        ("app.engines.base", {*WEB, "torch", "openvino", "training"}),
        ("app.engines.buckets", {*WEB, "torch", "openvino", "training"}),
        ("app.engines.openvino_engine", {*WEB, "torch", "training"}),
        ("app.engines.torch_engine", {*WEB, "captum", "training"}),
        ("app.api", {"torch", "app.settings", "app.model.store", "training"}),
        ("app.oip", {"torch", "app.settings", "app.model.store", "training"}),
        ("app.shadow", {"torch", "app.settings", "app.model.store", "training"}),
        ("app.service", {"torch", "app.settings", "app.model.store", "training"}),
        ("app.model.quality", {*WEB, "torch", "PIL", "pydantic", "app.engines", "training"}),
        ("app.metrics", {*WEB, "torch", "openvino", "training"}),
        ("app.main", {*CLINICAL, *TRACING, "torch", "openvino", "training"}),
        ("app.cli", {*CLINICAL, *TRACING, "torch", "openvino", "onnx", "training", "httpx2", "tqdm", "shtab"}),
        ("app.client", {*WEB, "torch", "openvino", "app.engines", "app.settings", "training"}),
    ],
)
def test_a_module_does_not_pull_in_what_it_must_not(module: str, never: set[str]) -> None:
    assert not loaded_by(module) & never


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_stays_in_four_files_and_app_never_knows_training(path: Path) -> None:
    allowed = path.name in ("architecture.py", "torch_engine.py", "cuda_engine.py", "nvjpeg.py")
    assert allowed or not imports(path) & {"torch", "torchvision", "captum"}
    assert not imports(path) & {"training", "tests", "benchmarks", "pickle"}


def test_nothing_is_unpickled() -> None:
    for folder in ("app", "training"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text()
            assert "torch.load(" not in source, path
            assert "allow_pickle=True" not in source, path
