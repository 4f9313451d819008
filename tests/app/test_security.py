import asyncio
import hmac
import logging
import os
from hashlib import sha256
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from starlette.types import Message

from app.security import (
    HEADERS,
    PAGE_POLICY,
    BadKeys,
    Forbidden,
    Key,
    KeyRing,
    NewKey,
    RateLimited,
    Unauthorized,
    guard,
    new_key,
    read_keys,
)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def write(folder: Path, *keys: NewKey) -> Path:
    """A key file, replaced as an operator should: by a rename."""
    new = folder / "keys.new"
    new.write_text("\n".join(key.toml for key in keys))
    return new.replace(folder / "keys.toml")


def entry(**changes: object) -> str:
    """One entry of a key file, as TOML."""
    fields: dict[str, object] = {"name": '"ward-3"', "scopes": '["predict"]', "sha256": f'"{"0" * 64}"'}
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in (fields | changes).items())


def test_a_new_key_is_known_by_the_lines_it_came_with(tmp_path: Path) -> None:
    made = new_key("ward-3", ["predict", "metrics"], per_minute=120)
    path = write(tmp_path, made)
    assert made.secret not in path.read_text()
    (read,) = read_keys(path)
    assert (read.name, sorted(read.scopes), read.per_minute) == ("ward-3", ["metrics", "predict"], 120)
    assert KeyRing(path).admit(made.secret, "predict") == read
    assert KeyRing(path).admit(made.secret, "metrics") == read


def test_keys_differ_and_hold_256_bits() -> None:
    secrets = {new_key("a", ["predict"]).secret for _ in range(100)}
    assert len(secrets) == 100
    assert {(secret[:3], len(secret)) for secret in secrets} == {("dl_", 3 + 43)}  # 43 digits of 6 bits


@pytest.mark.parametrize(
    ("name", "scopes", "per_minute", "said"),
    [
        ("two words", ["predict"], None, "name: "),
        ('a"\nb', ["predict"], None, "name: "),
        ("", ["predict"], None, "name: "),
        ("a", ["root"], None, "scopes: "),
        ("a", [], None, "scopes: "),
        ("a", ["predict"], 0, "per_minute: "),
    ],
)
def test_a_key_that_no_file_could_hold_is_not_made(
    name: str, scopes: list[str], per_minute: int | None, said: str
) -> None:
    with pytest.raises(BadKeys, match=f"^{said}[^\n]+$"):
        new_key(name, scopes, per_minute=per_minute)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "keys: Field required"),
        ("keys = []", "keys: "),
        ("[[key", "not TOML: "),
        ("other = 1\n" + entry(), "other: "),
        (entry(scopes='["predict", "root"]'), "key 1: scopes: "),
        (entry(scopes="[]"), "key 1: scopes: "),
        (entry(sha256='"00"'), "key 1: sha256: "),
        (entry(sha256=f'"{"g" * 64}"'), "key 1: sha256: "),
        (entry(per_minute=0), "key 1: per_minute: "),
        (entry(per_minute="true"), "key 1: per_minute: "),
        (entry(scope='"predict"'), "key 1: scope: "),
        (entry() + entry(name='"a b"', sha256=f'"{"1" * 64}"'), "key 2: name: "),
        (entry() + entry(sha256=f'"{"1" * 64}"'), "two keys are named ward-3"),
        (entry() + entry(name='"ward-4"'), "ward-3 and ward-4 have the same sha256"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(BadKeys) as caught:
        KeyRing(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, said in (("missing", "No such file"), (".", "Is a directory"), ("binary", "not TOML")):
        with pytest.raises(BadKeys, match=f"^{tmp_path / name}: {said}[^\n]*$"):
            read_keys(tmp_path / name)


def test_a_file_that_everyone_may_write_is_refused_and_one_that_everyone_may_read_is_not(tmp_path: Path) -> None:
    path = write(tmp_path, new_key("a", ["predict"]))
    path.chmod(0o644)
    assert read_keys(path)
    path.chmod(0o646)
    with pytest.raises(BadKeys, match="everyone may write"):
        read_keys(path)


@pytest.mark.parametrize("field", ["name", "scopes", "sha256", "per_minute"])
def test_a_key_pasted_into_the_wrong_place_is_not_told_back(tmp_path: Path, field: str) -> None:
    secret = new_key("a", ["predict"]).secret
    path = tmp_path / "keys.toml"
    for value in (f'"{secret}="', f'["{secret}"]', secret):
        path.write_text(entry(**{field: value}))
        with pytest.raises(BadKeys) as caught:
            read_keys(path)
        assert secret[3:] not in str(caught.value)
        assert caught.value.__suppress_context__  # nor in a traceback
        assert caught.value.__cause__ is None


def test_who_shows_no_key_or_an_unknown_one_is_not_let_in(tmp_path: Path) -> None:
    made = new_key("a", ["predict"])
    ring = KeyRing(write(tmp_path, made))
    for presented in (None, "", "dl_", made.secret[:-1], made.secret + "=", made.secret.upper(), "é", "🔑"):
        with pytest.raises(Unauthorized):
            ring.admit(presented, "predict")
    with pytest.raises(Unauthorized):  # who has read the file has no key
        ring.admit(sha256(made.secret.encode()).hexdigest(), "predict")


def test_every_key_is_compared_whichever_is_presented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key(f"key-{number}", ["predict"]) for number in range(5)]
    ring = KeyRing(write(tmp_path, *made))
    compared: list[str] = []

    def counting(one: str, other: str) -> bool:
        compared.append(one)
        return real(one, other)

    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", counting)
    for key in made:
        ring.admit(key.secret, "predict")
    with pytest.raises(Unauthorized):
        ring.admit("dl_unknown", "predict")
    assert len(compared) == 6 * 5
    assert set(compared) == {sha256(key.secret.encode()).hexdigest() for key in made}


def test_a_key_opens_its_scopes_alone(tmp_path: Path) -> None:
    made = new_key("a", ["admin"])
    ring = KeyRing(write(tmp_path, made))
    assert ring.admit(made.secret, "admin").name == "a"
    with pytest.raises(Forbidden, match="lacks the scope predict"):  # admin holds no other
        ring.admit(made.secret, "predict")


@pytest.mark.parametrize("per_minute", [1, 7, 60, 333])
def test_a_key_has_its_requests_a_minute_at_once_and_then_steadily(
    tmp_path: Path, clock: Clock, per_minute: int
) -> None:
    made = new_key("a", ["predict"], per_minute=per_minute)
    ring = KeyRing(write(tmp_path, made), clock=clock)
    for _ in range(per_minute):
        ring.admit(made.secret, "predict")
    with pytest.raises(RateLimited) as caught:
        ring.admit(made.secret, "predict")
    assert 0 < caught.value.retry_after_s <= 60 / per_minute + 1
    clock.now += 60 / per_minute  # one more, and no second one
    ring.admit(made.secret, "predict")
    with pytest.raises(RateLimited):
        ring.admit(made.secret, "predict")
    clock.now += 3600  # a long rest saves up no more than one burst
    for _ in range(per_minute):
        ring.admit(made.secret, "predict")
    with pytest.raises(RateLimited) as caught:
        ring.admit(made.secret, "predict")
    clock.now += caught.value.retry_after_s  # who waits as long as he was told gets in
    ring.admit(made.secret, "predict")


def test_one_key_does_not_spend_anothers_requests_and_a_refusal_spends_none(tmp_path: Path, clock: Clock) -> None:
    slow, other, free = (
        new_key("slow", ["predict"], per_minute=1),
        new_key("other", ["predict"], per_minute=1),
        new_key("free", ["predict"]),
    )
    ring = KeyRing(write(tmp_path, slow, other, free), clock=clock)
    with pytest.raises(Forbidden):
        ring.admit(slow.secret, "admin")
    ring.admit(slow.secret, "predict")
    for _ in range(10):
        with pytest.raises(RateLimited):
            ring.admit(slow.secret, "predict")
        ring.admit(free.secret, "predict")
    ring.admit(other.secret, "predict")
    clock.now += 60
    ring.admit(slow.secret, "predict")


def test_a_changed_file_counts_at_the_next_look(tmp_path: Path, clock: Clock) -> None:
    old, new = new_key("old", ["predict"]), new_key("new", ["predict"])
    ring = KeyRing(write(tmp_path, old), clock=clock)
    write(tmp_path, new)
    assert ring.admit(old.secret, "predict").name == "old"  # not looked at yet
    clock.now += 1
    assert ring.admit(new.secret, "predict").name == "new"
    with pytest.raises(Unauthorized):
        ring.admit(old.secret, "predict")


def test_a_change_of_the_same_size_and_time_is_seen(tmp_path: Path, clock: Clock) -> None:
    old, new = new_key("a", ["predict"]), new_key("a", ["predict"])
    path = write(tmp_path, old)
    before = path.stat()
    ring = KeyRing(path, clock=clock)
    write(tmp_path, new)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    clock.now += 1
    assert ring.admit(new.secret, "predict").name == "a"


def test_a_file_is_read_only_when_it_changed(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    made = new_key("a", ["predict"])
    ring = KeyRing(write(tmp_path, made), clock=clock)
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            clock.now += 1
            ring.admit(made.secret, "predict")
        assert not caplog.records
        write(tmp_path, made, new_key("b", ["predict"]))
        for _ in range(5):
            clock.now += 1
            ring.admit(made.secret, "predict")
    (record,) = caplog.records
    assert record.getMessage().endswith("read again, keys: 2")


def test_a_file_that_became_bad_or_went_leaves_the_keys_and_one_line(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    made = new_key("a", ["predict"])
    path = write(tmp_path, made)
    ring = KeyRing(path, clock=clock)
    for spoil in (lambda: path.write_text("[[keys]"), path.unlink):
        caplog.clear()
        spoil()
        for _ in range(5):
            clock.now += 1
            assert ring.admit(made.secret, "predict").name == "a"
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        assert str(path) in record.getMessage()
        assert "\n" not in record.getMessage()
    write(tmp_path, new_key("b", ["predict"]))
    clock.now += 1
    with pytest.raises(Unauthorized):
        ring.admit(made.secret, "predict")


def test_a_key_that_stays_or_is_replaced_under_its_name_keeps_its_bucket(tmp_path: Path, clock: Clock) -> None:
    first, second = (new_key("ward-3", ["predict"], per_minute=1) for _ in range(2))
    ring = KeyRing(write(tmp_path, first), clock=clock)
    ring.admit(first.secret, "predict")
    write(tmp_path, second)
    clock.now += 1
    with pytest.raises(RateLimited):
        ring.admit(second.secret, "predict")


def serve(keys: KeyRing | None) -> TestClient:
    """An app of our own: a route of each scope, whose body a route reads itself, and our errors told plainly."""
    app = FastAPI()
    statuses: dict[type[Exception], int] = {Unauthorized: 401, Forbidden: 403, RateLimited: 429}

    async def tell(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(str(error), statuses[type(error)])

    async def predict(request: Request, number: int = 0) -> object:
        return [number, len(await request.body()), request.scope.get("key_name")]

    for kind in statuses:
        app.add_exception_handler(kind, tell)
    app.add_api_route("/predict", predict, methods=["POST"], dependencies=guard(keys, "predict"))
    app.add_api_route("/metrics", lambda: "m", dependencies=guard(keys, "metrics"))
    app.add_api_route("/promote", lambda: "p", methods=["POST"], dependencies=guard(keys, "admin"))
    return TestClient(app)


def bearing(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_without_a_key_file_all_is_open_but_admin_which_is_off() -> None:
    client = serve(None)
    assert client.post("/predict", content=b"abc").json() == [0, 3, None]
    assert client.get("/metrics").json() == "m"
    refused = client.post("/promote", headers=bearing("dl_any"))
    assert (refused.status_code, refused.json()) == (403, "admin routes are off: set DERMLENS_API_KEYS")
    described = client.get("/openapi.json").json()["paths"]
    assert "security" not in described["/predict"]["post"]  # who needs no key is not told to send one


def test_with_a_key_file_each_route_wants_its_scope(tmp_path: Path) -> None:
    made = {scope: new_key(f"{scope}-key", [scope]) for scope in ("predict", "admin", "metrics")}
    client = serve(KeyRing(write(tmp_path, *made.values())))
    routes = (("predict", "POST", "/predict"), ("admin", "POST", "/promote"), ("metrics", "GET", "/metrics"))
    for scope, method, path in routes:
        for shown, key in made.items():
            answer = client.request(method, path, headers=bearing(key.secret))
            assert answer.status_code == (200 if shown == scope else 403)
        for headers in ({}, bearing("dl_wrong"), {"Authorization": f"Basic {made[scope].secret}"}):
            assert client.request(method, path, headers=headers).status_code == 401
        assert client.get("/openapi.json").json()["paths"][path][method.lower()]["security"] == [{"HTTPBearer": []}]
    assert client.post("/predict", headers=bearing(made["predict"].secret)).json()[2] == "predict-key"


def test_a_stranger_is_refused_before_his_parameters_and_his_body_are_read(tmp_path: Path) -> None:
    client = serve(KeyRing(write(tmp_path, new_key("a", ["predict"]))))
    assert client.post("/predict?number=x").status_code == 401
    scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
    sent: list[Message] = []

    async def receive() -> Message:
        raise AssertionError("the body was read")

    async def send(message: Message) -> None:
        sent.append(message)

    async def call() -> None:
        await client.app(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 401


def test_neither_a_key_nor_its_hash_is_told_or_logged(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    made, wrong = new_key("a", ["predict"], per_minute=1), new_key("b", ["predict"])
    ring = KeyRing(write(tmp_path, made), clock=clock)
    client = serve(ring)
    with caplog.at_level(logging.DEBUG):
        write(tmp_path, made)
        clock.now += 1
        told = [
            client.request(method, path, headers=bearing(key.secret)).text
            for key in (made, wrong, made)
            for method, path in (("POST", "/predict"), ("POST", "/promote"))
        ]
        (tmp_path / "keys.toml").write_text(entry(sha256=f'"{made.secret}"'))
        clock.now += 1
        told.append(client.post("/predict", headers=bearing(made.secret)).text)
    told += [record.getMessage() for record in caplog.records]
    told += [repr(made), str(read_keys(write(tmp_path, made))), repr(ring), str(ring)]
    assert any("stay" in line for line in told)
    for key in (made, wrong):
        for line in told:
            assert key.secret not in line
            assert sha256(key.secret.encode()).hexdigest() not in line


def test_a_key_is_frozen() -> None:
    key = Key(name="a", scopes=frozenset({"predict"}), sha256="0" * 64)
    with pytest.raises(ValueError, match="frozen"):
        key.scopes = frozenset({"admin"})  # type: ignore[misc]


def test_every_answer_is_closed_to_other_sites_and_a_page_takes_nothing_from_them() -> None:
    for policy in (HEADERS["Content-Security-Policy"], PAGE_POLICY):
        directives = dict(part.split(" ", 1) for part in policy.split("; "))
        assert directives["default-src"] == "'none'"
        assert directives["frame-ancestors"] == "'none'"
        assert "unsafe" not in policy
        assert "http" not in policy
        assert "*" not in policy
