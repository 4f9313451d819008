"""A setting, route, problem, metric or command without a line in the docs is a failure."""

import argparse
import re

from fastapi.testclient import TestClient

from app.cli import build_parser
from app.errors import INTERNAL, KINDS
from app.metrics import Metrics
from app.settings import table
from tests.conftest import JPEG, ROOT

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


def test_every_route_is_documented(client: TestClient) -> None:
    text = (DOCS / "api.md").read_text()
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"`{path}`" in text or re.search(rf"`(GET|POST) {re.escape(path)}`", text), path


def test_every_problem_is_documented_with_its_status() -> None:
    text = (DOCS / "api.md").read_text()
    for kind in (*KINDS.values(), INTERNAL):
        assert re.search(rf"^\| {kind.status} \|.*`{kind.slug}`", text, re.MULTILINE), kind


def test_every_header_of_an_answer_is_shown_or_told(client: TestClient, lesion: bytes) -> None:
    text = (DOCS / "api.md").read_text().lower()
    for header in client.post("/explain", content=lesion, headers=JPEG).headers:
        assert header in text, header


def test_every_command_is_documented() -> None:
    text = (DOCS / "cli.md").read_text()
    [commands] = [a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert "serve" in commands
    for command in commands:
        assert f"`dermlens {command}" in text, command


def test_the_readme_shows_where_to_begin() -> None:
    for each in ("make serve", "make test", "/predict", "/explain", "dermlens predict", "docs/api.md", "docs/cli.md"):
        assert each in README
    for tutorial in (DOCS / "tutorials").iterdir():
        assert f"(docs/tutorials/{tutorial.name})" in README


def test_every_link_leads_somewhere() -> None:
    pages = (ROOT / "README.md", *DOCS.rglob("*.md"))
    for page in pages:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_decisions_stay_short() -> None:
    for page in (DOCS / "decisions").iterdir():
        assert len(page.read_text().splitlines()) <= 60, page.name
