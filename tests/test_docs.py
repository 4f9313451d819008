"""A setting, route, metric or command without a line in the docs is a failure."""

import pytest
from fastapi.testclient import TestClient

from app.cli import build_parser
from app.metrics import Metrics
from app.settings import Settings
from tests.conftest import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented_with_its_default(name: str) -> None:
    field = Settings.model_fields[name]
    line = f"| `DERMLENS_{name.upper()}` | `{field.default}` | {field.description} |"
    assert line in (DOCS / "settings.md").read_text()


def test_every_metric_is_documented() -> None:
    text = (DOCS / "metrics.md").read_text()
    kinds = {"counter": "_total", "info": "_info"}
    for family in Metrics().registry.collect():
        assert f"`{family.name}{kinds.get(family.type, '')}`" in text


def test_every_route_is_in_the_readme(client: TestClient) -> None:
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in README, path


def test_every_command_is_in_the_readme() -> None:
    for command in ("serve", "predict", "explain", "models", "export", "keys", "audit", "doctor", "completion"):
        assert f"dermlens {command}" in README
        assert command in build_parser().format_help()


def test_decisions_stay_short() -> None:
    for page in (DOCS / "decisions").iterdir():
        assert len(page.read_text().splitlines()) <= 60, page.name
