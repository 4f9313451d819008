"""A setting, route, metric or command without a line in the docs is a failure."""

from fastapi.testclient import TestClient

from app.cli import build_parser
from app.metrics import Metrics
from app.settings import table
from tests.conftest import ROOT

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


def test_the_table_of_settings_is_the_one_that_the_code_gives() -> None:
    """`make docs` writes it."""
    found = (DOCS / "settings.md").read_text().split("<!-- make docs -->\n")[1].split("\n<!-- end -->")[0]
    assert found == table()


def test_every_metric_is_documented() -> None:
    text = (DOCS / "metrics.md").read_text()
    kinds = {"counter": "_total", "info": "_info"}
    for family in Metrics().registry.collect():
        assert f"`{family.name}{kinds.get(family.type, '')}`" in text


def test_every_route_is_in_the_readme(client: TestClient) -> None:
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in README, path


def test_every_command_is_in_the_readme() -> None:
    for command in (
        "serve",
        "predict",
        "explain",
        "dicom",
        "models",
        "export",
        "keys",
        "audit",
        "doctor",
        "completion",
    ):
        assert f"dermlens {command}" in README
        assert command in build_parser().format_help()


def test_decisions_stay_short() -> None:
    for page in (DOCS / "decisions").iterdir():
        assert len(page.read_text().splitlines()) <= 60, page.name
