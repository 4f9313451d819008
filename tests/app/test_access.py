"""The whole service as someone with, without or with the wrong key finds it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_app
from app.model import store
from app.security import new_key
from app.settings import Settings
from tests.conftest import JPEG, NAME

ROUTES = [
    ("POST", "/predict"),
    ("POST", "/predict/batch"),
    ("POST", "/explain"),
    ("GET", "/models"),
    ("GET", "/models/1/report/roc.png"),
    ("GET", "/metrics"),
    ("GET", "/v2"),
    ("POST", "/v2/models/asff-resnet50/infer"),
]
OPEN = ["/livez", "/readyz", "/openapi.json", "/docs", "/", "/web/app.js"]


Keys = dict[str, dict[str, str]]  # scope -> header


@pytest.fixture
def guarded(quick_store: Path, tmp_path: Path) -> Iterator[tuple[TestClient, Keys]]:
    made = {scope: new_key(scope, [scope]) for scope in ("predict", "admin", "metrics")}
    path = tmp_path / "keys.toml"
    path.write_text("".join(key.toml for key in made.values()))
    with TestClient(create_app(Settings(model_store=quick_store, api_keys=path, reload_ms=0))) as client:
        yield client, {scope: {"Authorization": f"Bearer {key.secret}"} for scope, key in made.items()}


def test_every_route_but_health_asks_for_a_key_before_it_reads(guarded: tuple[TestClient, Keys]) -> None:
    client, _ = guarded
    for method, route in [*ROUTES, ("POST", "/models/2/promote")]:
        answer = client.request(method, route, content=b"never looked at")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), route
        if not route.startswith("/v2"):  # which has its own form of errors
            assert answer.json()["type"] == "urn:dermlens:problem:unauthorized"
    assert [client.get(route).status_code for route in OPEN] == [200] * len(OPEN)


def test_a_key_opens_what_its_scope_names_and_nothing_else(guarded: tuple[TestClient, Keys], lesion: bytes) -> None:
    client, keys = guarded
    predict = {scope: client.post("/predict", content=lesion, headers=JPEG | key) for scope, key in keys.items()}
    assert {scope: answer.status_code for scope, answer in predict.items()} == {
        "predict": 200,
        "admin": 403,
        "metrics": 403,
    }
    scraped = {scope: client.get("/metrics", headers=key).status_code for scope, key in keys.items()}
    assert scraped == {"predict": 403, "admin": 403, "metrics": 200}


def test_an_admin_promotes_and_the_store_says_so(
    guarded: tuple[TestClient, Keys], quick_store: Path, lesion: bytes
) -> None:
    client, keys = guarded
    assert client.post("/models/2/promote", headers=keys["predict"]).status_code == 403
    assert store.current(quick_store, NAME) == "1"
    answer = client.post("/models/2/promote", headers=keys["admin"])
    assert answer.json() == {"version": "2", "previous": "1"}
    assert store.current(quick_store, NAME) == "2"
    assert client.post("/predict", content=lesion, headers=JPEG | keys["predict"]).json()["model"]["version"] == "2"
    assert store.rollback(quick_store, NAME) == "1"


def test_a_report_is_read_with_the_key_of_a_prediction(guarded: tuple[TestClient, Keys], quick_store: Path) -> None:
    client, keys = guarded
    report = quick_store / NAME / "1" / "report"
    (report / "roc.png").write_bytes(b"png")
    (report / "report.html").write_bytes(b"<p>html")
    route = "/models/1/report"
    assert client.get("/models", headers=keys["predict"]).json()["versions"][0]["report"] == ["report.html", "roc.png"]
    assert client.get(f"{route}/roc.png", headers=keys["admin"]).status_code == 403
    picture = client.get(f"{route}/roc.png", headers=keys["predict"])
    assert (picture.content, picture.headers["content-type"]) == (b"png", "image/png")
    assert picture.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    page = client.get(f"{route}/report.html", headers=keys["predict"])
    assert (page.text, page.headers["content-type"]) == ("<p>html", "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src")
    assert "script" not in policy
    for file in ("a.txt", "..%2fmanifest.json", "%2e%2e%2fmanifest.json", "..", "none.png", "%00.png"):
        answer = client.get(f"{route}/{file}", headers=keys["predict"])
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json"), file
    assert client.get("/models/9/report/roc.png", headers=keys["predict"]).status_code == 404
    assert client.get("/models/..%2f1/report/roc.png", headers=keys["predict"]).status_code == 404


def test_what_cannot_be_promoted_is_told_and_changes_nothing(
    guarded: tuple[TestClient, Keys], quick_store: Path
) -> None:
    client, keys = guarded
    (quick_store / NAME / "2" / store.WEIGHTS).write_bytes(b"damaged")
    for version, status, slug in (("9", 404, "version-missing"), ("2", 409, "version-refused")):
        answer = client.post(f"/models/{version}/promote", headers=keys["admin"])
        assert (answer.status_code, answer.json()["type"].rsplit(":")[-1]) == (status, slug)
    assert client.post("/models/..%2f..%2fetc/promote", headers=keys["admin"]).status_code in (404, 422)
    assert client.post("/models/.hidden/promote", headers=keys["admin"]).status_code == 422
    assert store.current(quick_store, NAME) == "1"
    assert client.get("/models", headers=keys["predict"]).json()["versions"][0]["served"]


def test_a_store_that_cannot_be_written_leaves_the_version_that_it_names(
    guarded: tuple[TestClient, Keys], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, keys = guarded

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("app.main.store.promote", read_only)
    answer = client.post("/models/2/promote", headers=keys["admin"])
    assert answer.status_code == 409
    assert "Read-only" in answer.json()["detail"]
    assert 'version="1"' in client.get("/metrics", headers=keys["metrics"]).text


def test_a_server_that_was_given_one_version_stays_with_it(quick_store: Path, tmp_path: Path) -> None:
    key = new_key("admin", ["admin"])
    (tmp_path / "keys.toml").write_text(key.toml)
    settings = Settings(model_store=quick_store, api_keys=tmp_path / "keys.toml", model_version="2")
    with TestClient(create_app(settings)) as client:
        answer = client.post("/models/1/promote", headers={"Authorization": f"Bearer {key.secret}"})
        assert answer.status_code == 409
    assert store.current(quick_store, NAME) == "1"


def test_without_keys_all_is_open_but_what_changes_the_server(quick_store: Path, lesion: bytes) -> None:
    with TestClient(create_app(Settings(model_store=quick_store))) as client:
        assert client.post("/predict", content=lesion, headers=JPEG).status_code == 200
        answer = client.post("/models/2/promote")
        assert (answer.status_code, "DERMLENS_API_KEYS" in answer.json()["detail"]) == (403, True)
    assert store.current(quick_store, NAME) == "1"


def test_every_answer_carries_the_security_headers(guarded: tuple[TestClient, Keys]) -> None:
    client, _ = guarded
    for route in ("/livez", "/predict", "/nowhere", "/docs", "/", "/web/app.js"):
        headers = client.get(route).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["content-security-policy"].startswith("default-src 'none'")


def test_the_docs_page_loads_nothing_from_elsewhere(quick_store: Path) -> None:
    with TestClient(create_app(Settings(model_store=quick_store))) as client:
        page = client.get("/docs").text
        assert not re.search(r"https?://", page)
        for path in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert client.get(path).status_code == 200


def test_the_description_can_be_switched_off(quick_store: Path) -> None:
    with TestClient(create_app(Settings(model_store=quick_store, docs=False))) as client:
        assert [client.get(route).status_code for route in ("/docs", "/openapi.json", "/redoc")] == [404] * 3
        assert client.get("/livez").status_code == 200
        assert 'href="docs"' not in client.get("/").text


def test_the_web_page_can_be_switched_off_and_then_the_docs_are_the_first_page(quick_store: Path) -> None:
    with TestClient(create_app(Settings(model_store=quick_store))) as client:
        page = client.get("/")
        assert 'href="docs"' in page.text
        assert "unsafe" not in page.headers["content-security-policy"]
        for path in re.findall(r'(?:src|href)="(web/[^"]+)"', page.text):
            assert client.get(path).status_code == 200
        assert client.get("/web/..%2fmain.py").status_code == 404
    with TestClient(create_app(Settings(model_store=quick_store, page=False))) as client:
        assert client.get("/", follow_redirects=False).headers["location"] == "/docs"
        assert client.get("/web/app.js").status_code == 404
    with TestClient(create_app(Settings(model_store=quick_store, page=False, docs=False))) as client:
        assert client.get("/").status_code == 404


def test_other_sites_may_call_only_where_they_are_named(quick_store: Path) -> None:
    ask = {"Origin": "https://ward.example", "Access-Control-Request-Method": "POST"}
    with TestClient(create_app(Settings(model_store=quick_store))) as client:
        assert "access-control-allow-origin" not in client.options("/predict", headers=ask).headers
        assert "access-control-allow-origin" not in client.get("/livez", headers=ask).headers
    with TestClient(create_app(Settings(model_store=quick_store, cors_origins="https://ward.example"))) as client:
        assert client.options("/predict", headers=ask).headers["access-control-allow-origin"] == ask["Origin"]
        other = ask | {"Origin": "https://elsewhere.example"}
        assert "access-control-allow-origin" not in client.options("/predict", headers=other).headers
