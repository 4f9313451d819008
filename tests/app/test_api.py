import base64
import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx2
import numpy as np
import pytest
import safetensors.numpy
from fastapi.testclient import TestClient
from PIL import Image

from app.main import create_app, open_model
from app.model import store
from app.model.labels import NOTICE
from app.settings import Settings
from tests.app.model.test_preprocess import png_header
from tests.conftest import JPEG, encode, make_manifest, make_rule, running
from training.drawn import draw_lesion


def check_problem(response: httpx2.Response, status: int, slug: str) -> dict[str, Any]:
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:dermlens:problem:{slug}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    return problem


def test_predict_takes_multipart_and_the_raw_body_alike(client: TestClient, lesion: bytes) -> None:
    answers = [
        client.post("/predict", files={"file": ("a.jpg", lesion, "image/jpeg")}),
        client.post("/predict", content=lesion, headers=JPEG),
        client.post("/predict", content=lesion, headers={"content-type": "application/octet-stream"}),
        client.post("/predict", content=lesion),
    ]
    first = answers[0].json()
    assert first["request_id"] == answers[0].headers["x-request-id"]
    assert answers[0].headers["x-model-version"] == "1"
    assert first["model"] == {"name": "asff-resnet50", "version": "1"}
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert first["decision"]["operating_point"] == "balanced"
    assert first["decision"]["threshold"] == 0.4
    assert first["decision"]["positive"] == (first["probabilities"]["malignant"] >= 0.4)
    nothing: dict[str, Any] = {"refer": False, "reasons": [], "prediction_set": None, "coverage": None}
    assert first["decision"] | nothing == first["decision"]  # this version has no abstention rule
    assert first["label"] == ("malignant" if first["decision"]["positive"] else "benign")
    assert first["image"] == {"width": 320, "height": 240, "format": "JPEG", "warnings": []}
    assert first["notice"] == NOTICE
    for answer in answers:
        assert answer.status_code == 200
        assert answer.json()["probabilities"] == pytest.approx(first["probabilities"])


def test_concurrent_requests_share_batches_and_keep_their_own_answers(client: TestClient) -> None:
    files = [encode(draw_lesion(n % 2, n)) for n in range(12)]

    def ask(data: bytes) -> float:
        answer = client.post("/predict", content=data, headers={"content-type": "image/png"})
        return float(answer.json()["probabilities"]["malignant"])

    alone = [ask(data) for data in files]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(ask, files))
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(p, 6) for p in alone}) > 6


def test_a_bad_file_in_a_batch_fails_alone_and_keeps_its_place(client: TestClient, lesion: bytes) -> None:
    parts = [("files", ("a", data, "image/jpeg")) for data in (lesion, b"text", lesion[:500], lesion)]
    items = client.post("/predict/batch", files=parts).json()
    assert [item["index"] for item in items] == [0, 1, 2, 3]
    assert [item["problem"] and item["problem"]["status"] for item in items] == [None, 400, 400, None]
    assert items[0]["prediction"]["probabilities"] == pytest.approx(items[3]["prediction"]["probabilities"])


def test_too_many_files_are_refused(client: TestClient, lesion: bytes) -> None:
    parts = [("files", ("a", lesion, "image/jpeg"))] * 5
    check_problem(client.post("/predict/batch", files=parts), 400, "malformed-upload")


def test_explain_draws_a_png_of_the_uploads_shape(client: TestClient, lesion: bytes) -> None:
    answer = client.post("/explain", content=lesion, headers=JPEG)
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).size == (320, 240)
    predicted = client.post("/predict", content=lesion, headers=JPEG).json()
    assert float(answer.headers["x-probability-malignant"]) == pytest.approx(
        predicted["probabilities"]["malignant"], abs=1e-5
    )
    assert answer.headers["x-model-version"] == "1"
    assert answer.headers["x-cam-empty"] == str(float(answer.headers["x-cam-peak"]) <= 0).lower()


def test_explain_as_json_carries_the_map_and_the_same_picture(client: TestClient, lesion: bytes) -> None:
    headers = JPEG | {"accept": "application/json"}
    by_target = {
        target: client.post("/explain", params={"target": target}, content=lesion, headers=headers).json()
        for target in ("benign", "malignant", "predicted")
    }
    for target in ("benign", "malignant"):
        raw = np.array(by_target[target]["map"])
        assert raw.shape == (14, 14)
        assert by_target[target]["target"] == target
        assert by_target[target]["peak"] == pytest.approx(raw.max())
        assert by_target[target]["empty"] == (raw.max() <= 0)
    assert np.allclose(by_target["benign"]["map"], -np.array(by_target["malignant"]["map"]), atol=1e-6)
    assert by_target["predicted"]["target"] == by_target["predicted"]["label"]
    png = client.post("/explain", content=lesion, headers=JPEG).content
    assert base64.b64decode(by_target["predicted"]["overlay_png"]) == png


@pytest.mark.parametrize(("style", "width"), [("overlay", 320), ("heatmap", 320), ("side-by-side", 640)])
def test_explain_styles(client: TestClient, lesion: bytes, style: str, width: int) -> None:
    answer = client.post("/explain", params={"style": style, "alpha": 1}, content=lesion, headers=JPEG)
    assert Image.open(io.BytesIO(answer.content)).size == (width, 240)


@pytest.mark.parametrize(
    "query", ["target=mole", "method=guess", "style=cubist", "alpha=2", "alpha=x", "alpha=nan", "coverage=0.95"]
)
def test_a_bad_parameter_is_named(client: TestClient, lesion: bytes, query: str) -> None:
    problem = check_problem(client.post(f"/explain?{query}", content=lesion, headers=JPEG), 422, "invalid-parameter")
    assert query.split("=", maxsplit=1)[0] in problem["detail"]


ANIMATED = encode(draw_lesion(0, 1), "WEBP", save_all=True, append_images=[draw_lesion(0, 2)])
BAD_IMAGES = {
    "empty": (b"", 400, "not-an-image"),
    "text": (b"hello, this is no image", 400, "not-an-image"),
    "truncated-jpeg": (encode(draw_lesion(0, 1), "JPEG")[:1500], 400, "not-an-image"),
    "bomb": (png_header(40_000, 40_000), 413, "image-too-large"),
    "cmyk": (encode(Image.new("CMYK", (64, 64)), "JPEG"), 415, "format-not-served"),
    "16-bit": (png_header(64, 64, depth=16), 415, "format-not-served"),
    "animated-gif": (
        encode(draw_lesion(0, 1), "GIF", save_all=True, append_images=[draw_lesion(0, 2)]),
        415,
        "format-not-served",
    ),
    "animated-webp": (ANIMATED, 415, "format-not-served"),
    "tiny": (encode(Image.new("RGB", (4, 4))), 422, "image-too-small"),
    "too-many-bytes": (b"\xff\xd8\xff" + b"\0" * 2_000_000, 413, "body-too-large"),
}


@pytest.mark.parametrize("route", ["/predict", "/explain"])
@pytest.mark.parametrize("multipart", [False, True], ids=["raw", "multipart"])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_input_is_told_what_is_wrong_and_the_server_serves_on(
    client: TestClient, lesion: bytes, name: str, multipart: bool, route: str
) -> None:
    data, status, slug = BAD_IMAGES[name]
    started = time.perf_counter()
    if multipart:
        answer = client.post(route, files={"file": ("x.jpg", data, "image/jpeg")})
    else:
        answer = client.post(route, content=data, headers=JPEG)
    assert time.perf_counter() - started < 1  # the contract of issue 2, not a benchmark
    check_problem(answer, status, slug)
    assert client.post("/predict", content=lesion, headers=JPEG).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded"])
def test_a_wrong_content_type_is_refused(client: TestClient, lesion: bytes, kind: str) -> None:
    check_problem(client.post("/predict", content=lesion, headers={"content-type": kind}), 415, "unsupported-body")
    check_problem(client.post("/predict/batch", content=lesion, headers=JPEG), 415, "unsupported-body")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"no boundary here", "multipart/form-data; boundary=x"),
        (
            b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\n1\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
        (
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
            "multipart/form-data; boundary=x",
        ),
    ],
    ids=["no-boundary", "not-multipart", "no-file", "cut-off"],
)
def test_malformed_multipart_is_refused(client: TestClient, body: bytes, kind: str) -> None:
    check_problem(client.post("/predict", content=body, headers={"content-type": kind}), 400, "malformed-upload")


def test_a_body_without_a_length_is_bounded_as_it_arrives(client: TestClient) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"\0" * 100_000

    check_problem(client.post("/predict", content=endless(), headers=JPEG), 413, "body-too-large")


def test_uploads_never_reach_a_temporary_file(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an upload went to disk")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # what SpooledTemporaryFile rolls over to
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise))
    assert 1_100_000 < len(data) < 2_000_000  # above Starlette's spooling limit, below ours
    answer = client.post("/predict", files={"file": ("a.png", data, "image/png")})
    assert answer.status_code == 200, answer.text


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    check_problem(client.get("/nope"), 404, "http-404")
    check_problem(client.get("/predict"), 405, "http-405")


def test_health(client: TestClient) -> None:
    assert client.get("/livez").json()["status"] == "ok"
    assert client.get("/readyz").json() == {"status": "ok", "reason": None}


def test_not_ready_before_start_and_work_is_refused(model_store: Path, lesion: bytes) -> None:
    stopped = TestClient(create_app(Settings(model_store=model_store)))  # lifespan not entered
    assert stopped.get("/livez").status_code == 200
    ready = stopped.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["reason"]
    problem = stopped.post("/predict", content=lesion, headers=JPEG)
    check_problem(problem, 503, "not-ready")
    assert problem.headers["retry-after"] == "1"


def test_models_lists_the_versions_and_marks_the_served_one(client: TestClient) -> None:
    models = client.get("/models").json()
    assert models["name"] == "asff-resnet50"
    assert [(m["version"], m["served"]) for m in models["versions"]] == [("1", True)]
    assert models["versions"][0]["manifest"]["classes"] == ["benign", "malignant"]


def test_request_ids_are_taken_over_only_where_they_are_plain(client: TestClient) -> None:
    assert client.get("/livez", headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "x" * 65, "a/b", "<script>"):
        made = client.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9A-HJKMNP-TV-Z]{26}", made)
    a, b = (client.get("/livez").headers["x-request-id"] for _ in range(2))
    assert a != b


def series(client: TestClient, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_count_what_happened(client: TestClient, lesion: bytes) -> None:
    ok = 'dermlens_requests_total{route="/predict",status="200"}'
    bad = 'dermlens_rejected_total{reason="not-an-image"}'
    stages = [f'dermlens_stage_seconds_count{{stage="{s}"}}' for s in ("read", "decode", "queue", "forward", "render")]
    names = [ok, bad, *stages]
    before = {name: series(client, name) for name in names}
    client.post("/predict", content=lesion, headers=JPEG)
    client.post("/predict", content=b"text", headers=JPEG)
    client.post("/explain", content=lesion, headers=JPEG)
    grown = {name: series(client, name) - before[name] for name in names}
    assert [grown[name] for name in names] == [1, 1, 3, 3, 2, 2, 1]
    model = 'dermlens_model_info{device="cpu",engine="openvino",name="asff-resnet50",precision="float32",version="1"}'
    assert series(client, model) == 1


def test_a_failing_engine_is_a_500_that_tells_nothing_of_itself(
    model_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(model_store=model_store, engine="torch"))
    with TestClient(app, raise_server_exceptions=False) as client:

        def fail(*_: object) -> None:
            raise RuntimeError("secret detail")

        monkeypatch.setattr("app.engines.torch_engine.torch.from_numpy", fail)
        problem = check_problem(client.post("/predict", content=lesion, headers=JPEG), 500, "internal-error")
        assert "secret" not in str(problem)
        assert "the request failed" in caplog.text
        items = client.post("/predict/batch", files=[("files", ("a", d, "image/jpeg")) for d in (lesion, b"x")]).json()
        assert [item["problem"]["status"] for item in items] == [500, 400]
        monkeypatch.undo()
        assert client.post("/predict", content=lesion, headers=JPEG).status_code == 200


def test_openapi_describes_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    of_models = {"/models", "/models/{version}/promote", "/models/{version}/report/{file}"}
    own = {"/predict", "/predict/batch", "/explain", "/livez", "/readyz", "/metrics"} | of_models
    assert {path for path in paths if not path.startswith("/v2")} == own
    assert len(paths) > len(own)
    content = paths["/predict"]["post"]["requestBody"]["content"]
    assert set(content) == {"multipart/form-data", "application/octet-stream"}
    assert "image/png" in paths["/explain"]["post"]["responses"]["200"]["content"]
    assert client.get("/docs").status_code == 200


@pytest.fixture(scope="module")
def careful(careful_store: Path) -> Iterator[TestClient]:
    with TestClient(create_app(Settings(model_store=careful_store)), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    ("query", "coverage", "plausible", "words"),
    [
        ("", "0.95", [], "neither benign nor malignant is plausible at 95% coverage"),
        ("coverage=0.95", "0.95", [], "neither benign nor malignant is plausible at 95% coverage"),
        ("coverage=0.90", "0.90", ["benign", "malignant"], "both benign and malignant are plausible at 90% coverage"),
        ("coverage=0.99&operating_point=specificity-95", "0.99", ["benign"], None),
        (
            "coverage=0.99&operating_point=sensitivity-95",
            "0.99",
            ["benign"],
            "only benign is plausible at 99% coverage, but the operating point sensitivity-95 says malignant",
        ),
        ("coverage=off", None, None, None),
    ],
)
def test_a_request_chooses_how_it_is_judged(
    careful: TestClient, lesion: bytes, query: str, coverage: str | None, plausible: list[str] | None, words: str | None
) -> None:
    explained = careful.post(f"/explain?{query}", content=lesion, headers=JPEG | {"accept": "application/json"})
    (item,) = careful.post(f"/predict/batch?{query}", files=[("files", ("a", lesion, "image/jpeg"))]).json()
    for answer in (
        careful.post(f"/predict?{query}", content=lesion, headers=JPEG).json(),
        item["prediction"],
        explained.json(),
    ):
        decision = answer["decision"]
        assert (decision["coverage"], decision["prediction_set"]) == (coverage, plausible)
        assert decision["refer"] == (plausible is not None and len(plausible) != 1)
        assert [reason.split(": ")[0] for reason in decision["reasons"]] == ([words] if words else [])
        if "operating_point" in query:
            assert decision["operating_point"] == query.rsplit("=", 1)[1]
            assert answer["label"] == ("malignant" if "sensitivity" in query else "benign")


@pytest.mark.parametrize(
    ("query", "known"),
    [
        ("operating_point=lucky", "this version has balanced, sensitivity-95, specificity-95"),
        ("operating_point=", "this version has balanced, sensitivity-95, specificity-95"),
        ("coverage=0.50", "this version has off, 0.90, 0.95, 0.99"),
    ],
)
def test_an_unknown_rule_is_refused_and_the_known_ones_named(
    careful: TestClient, lesion: bytes, query: str, known: str
) -> None:
    files = {"file": ("a", lesion, "image/jpeg"), "files": ("a", lesion, "image/jpeg")}
    for route in ("/predict", "/predict/batch", "/explain"):
        problem = check_problem(careful.post(f"{route}?{query}", files=files), 422, "invalid-parameter")
        assert known in problem["detail"]


def test_referrals_are_counted(careful: TestClient, lesion: bytes) -> None:
    name = 'dermlens_referred_total{version="1"}'
    before = series(careful, name)
    for coverage in ("off", "0.99", "0.95", "0.90"):
        careful.post("/predict", params={"coverage": coverage}, content=lesion, headers=JPEG)
    assert series(careful, name) - before == 2


@pytest.mark.parametrize(("method", "size"), [("gradcam", 4), ("integrated-gradients", 8), ("occlusion", 4)])
def test_each_method_draws_its_own_map(careful: TestClient, lesion: bytes, method: str, size: int) -> None:
    headers, query = JPEG | {"accept": "application/json"}, {"method": method, "target": "malignant"}
    before = series(careful, 'dermlens_stage_seconds_count{stage="attribute"}')
    answer = careful.post("/explain", params=query, content=lesion, headers=headers)
    explained, raw = answer.json(), np.array(answer.json()["map"])
    assert raw.shape == (size, size)
    assert (explained["method"], explained["target"]) == (method, "malignant")
    assert explained["peak"] == pytest.approx(raw.max())
    assert float(answer.headers["x-cam-peak"]) == pytest.approx(raw.max(), rel=1e-4)
    assert answer.headers["x-cam-empty"] == str(raw.max() <= 0).lower()
    picture = Image.open(io.BytesIO(base64.b64decode(explained["overlay_png"])))
    name = {"gradcam": "Grad-CAM", "integrated-gradients": "Integrated gradients", "occlusion": "Occlusion"}[method]
    assert str(picture.info["Description"]).startswith(f"{name} for malignant 0.")
    grown = series(careful, 'dermlens_stage_seconds_count{stage="attribute"}') - before
    assert grown == (method != "gradcam")


def test_a_request_may_wait_less_than_the_server_lets_it(
    careful_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr("app.engines.torch_engine.TorchEngine.attribute", lambda *_, **__: let_go.wait(10))
    settings = Settings(model_store=careful_store, engine="torch", timeout_ms=20_000)
    with TestClient(create_app(settings)) as client:
        answer = client.post("/explain?method=occlusion", content=lesion, headers=JPEG | {"X-Timeout-Ms": "1500"})
        let_go.set()
        check_problem(answer, 504, "deadline-exceeded")
        answer = client.post("/predict", content=lesion, headers=JPEG | {"X-Timeout-Ms": "999999"})
        assert answer.status_code == 200
        for value in ("0", "-5", "soon"):
            answer = client.post("/predict", content=lesion, headers=JPEG | {"X-Timeout-Ms": value})
            assert "x-timeout-ms" in check_problem(answer, 422, "invalid-parameter")["detail"]


def test_a_request_says_whether_it_can_wait(client: TestClient, lesion: bytes) -> None:
    answers = [
        client.post("/predict", content=lesion, headers=JPEG | {"X-Priority": priority})
        for priority in ("interactive", "batch")
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["probabilities"] == answers[1].json()["probabilities"]
    wrong = client.post("/predict", content=lesion, headers=JPEG | {"X-Priority": "urgent"})
    assert "x-priority" in check_problem(wrong, 422, "invalid-parameter")["detail"]


def test_the_work_of_a_client_that_leaves_is_dropped_before_it_runs(
    careful_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server: one client holds the device, a second one waits behind it and hangs up."""
    let_go, began = threading.Event(), threading.Event()

    def hold(*_: object, **__: object) -> np.ndarray:
        began.set()
        let_go.wait(10)
        return np.zeros((4, 4), dtype=np.float32)

    monkeypatch.setattr("app.engines.torch_engine.TorchEngine.attribute", hold)
    app = create_app(Settings(model_store=careful_store, engine="torch"))
    with running(app) as port, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}"
        try:
            slow = pool.submit(httpx2.post, f"{url}/explain?method=occlusion", content=lesion, headers=JPEG, timeout=20)
            assert began.wait(10)
            with socket.create_connection(("127.0.0.1", port)) as leaver:
                head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/jpeg\r\ncontent-length: {len(lesion)}"
                leaver.sendall(f"{head}\r\n\r\n".encode() + lesion)
                wait_for(url, "dermlens_queue_depth 1.0")
            wait_for(url, 'dermlens_dropped_total{reason="client_gone"} 1.0')
            let_go.set()
            assert slow.result().status_code == 200
            wait_for(url, 'dermlens_stage_seconds_count{stage="forward"} 1.0')  # of the slow one, and of no other
        finally:
            let_go.set()


def wait_for(url: str, line: str) -> None:
    """Until the server's metrics hold a line."""
    for _ in range(500):
        if line in httpx2.get(f"{url}/metrics").text:
            return
        time.sleep(0.01)
    raise AssertionError(f"never saw {line}")


def test_a_method_that_takes_longer_than_the_deadline_is_a_504(
    careful_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    monkeypatch.setattr("app.engines.openvino_engine.OpenVinoEngine.attribute", lambda *_, **__: let_go.wait(10))
    with TestClient(create_app(Settings(model_store=careful_store, timeout_ms=2_000))) as client:
        answer = client.post("/explain?method=occlusion", content=lesion, headers=JPEG)
        let_go.set()
        check_problem(answer, 504, "deadline-exceeded")
        assert client.post("/predict", content=lesion, headers=JPEG).status_code == 200


def test_the_coverage_must_be_one_that_the_version_has_unless_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.main.build_engine", lambda *_, **__: "an engine")
    weights = {store.WEIGHTS: safetensors.numpy.save({"w": np.zeros(1)})}
    store.publish(tmp_path, make_manifest("1"), weights)
    store.publish(tmp_path, make_manifest("2", abstention={"0.90": make_rule(0, 0)}), weights)

    def started(version: str, coverage: Literal["off", "0.90", "0.95"]) -> bool:
        settings = Settings(model_store=tmp_path, model_version=version, coverage=coverage)
        return open_model(settings).manifest.version == version

    assert all([started("1", "off"), started("1", "0.90"), started("1", "0.95"), started("2", "off")])
    assert started("2", "0.90")
    with pytest.raises(ValueError, match=r"no coverage '0\.95': this version has off, 0\.90"):
        started("2", "0.95")
