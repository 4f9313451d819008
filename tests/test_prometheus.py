"""A real Prometheus scrapes a real server, and has every series that the alerts and the dashboard ask for."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest
from dashboard import ask, queries, scraping
from numpy.typing import NDArray

from app.engines.base import DeviceLost, Output
from app.main import create_app
from app.security import new_key
from app.settings import Settings
from tests.app.test_metrics import WithMemory
from tests.conftest import JPEG, running
from tests.test_deploy import QUERIES, RULES

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus (Debian: prometheus)")

SELECTOR = re.compile(r"(?<![\w:])(?:dermlens[_:][\w:]+|process_\w+|up\b)(?:\{[^}]*\})?")
NEEDS_A_DAY = re.compile(r"dermlens:drift:\w+")  # compares with the week before; drift_test.yml shows it at work
PATIENCE_S = 30  # on a busy machine; 3 is usual


class Mortal(WithMemory):
    """Its device is lost when a test says so."""

    lost = False

    def run(self, images: NDArray[np.uint8]) -> Output:
        if Mortal.lost:
            raise DeviceLost("as the test says")
        return super().run(images)


@pytest.fixture
def scraped(
    quick_store: Path, tmp_path: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, str]]:
    """A Prometheus by its address, after some seconds of every kind of answer, and the server's metrics."""
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Mortal(version))
    monkeypatch.setattr(Mortal, "lost", False)
    caller, scraper = new_key("ward", ["predict"]), new_key("prometheus", ["metrics"])
    (tmp_path / "keys.toml").write_text(caller.toml + scraper.toml)
    (tmp_path / "key").write_text(scraper.secret)
    app = create_app(Settings(model_store=quick_store, api_keys=tmp_path / "keys.toml", shadow_version="2"))
    with running(app) as port, scraping(f"127.0.0.1:{port}", key=tmp_path / "key") as address:
        url, key = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {caller.secret}"}
        with httpx2.Client(base_url=url) as client:

            def post(path: str, **more: object) -> int:
                headers = JPEG | key | {name.replace("_", "-"): str(value) for name, value in more.items()}
                return client.post(path, content=lesion, headers=headers).status_code

            for _ in range(4):
                assert post("/predict") == post("/explain") == 200
                assert client.post("/predict", content=lesion).status_code == 401
                time.sleep(1)
            Mortal.lost = True
            assert post("/predict") == 503
            assert client.get("/readyz").status_code == 503
            metrics = client.get("/metrics", headers={"Authorization": f"Bearer {scraper.secret}"}).text
            yield address, metrics


def test_prometheus_has_what_the_alerts_and_the_dashboard_ask_for(scraped: tuple[str, str]) -> None:
    address, metrics = scraped
    asked = {found for query in QUERIES.values() for found in SELECTOR.findall(query)}
    asked |= {query for _, query in queries()}
    assert any("_bucket" in query for query in asked)
    asked = {query for query in asked if not NEEDS_A_DAY.search(query)}
    deadline = time.monotonic() + PATIENCE_S
    while (missing := {query for query in asked if not answered(address, query)}) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not missing

    groups = ask(address, "rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert sorted(rule["name"] for rule in rules) == sorted(rule.get("alert") or rule["record"] for rule in RULES)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}

    done = subprocess.run(["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False)  # noqa: S607
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def answered(address: str, query: str) -> bool:
    """Whether there was a number in the last two minutes, since when the server runs."""
    now = time.time()
    found = ask(address, "query_range", query=query, start=now - 120, end=now, step=1)["result"]
    return any(value != "NaN" for series in found for _, value in series["values"])
