"""The V2 routes as `tritonclient` finds them, against a real server; and as somebody finds them who means harm."""

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import tritonclient.http as triton
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient
from tritonclient.utils import InferenceServerException

from app.engines.base import Output
from app.main import create_app
from app.model import store
from app.security import new_key
from app.settings import Settings
from app.tensors import parse
from app.upload import BodyTooLarge, MalformedUpload
from tests.app.test_serve import serving
from tests.conftest import NAME, Quick, encode
from training.drawn import draw_lesion

INFER = f"/v2/models/{NAME}/infer"


@pytest.fixture(scope="module")
def server(careful_store: Path) -> Iterator[str]:
    """The address of a real server with small limits."""
    limits = {"MAX_BATCH_FILES": "4", "MAX_QUEUE": "3", "MAX_UPLOAD_BYTES": "100000", "MAX_BATCH_BYTES": "300000"}
    with serving(careful_store, **{f"DERMLENS_{name}": value for name, value in limits.items()}) as (_, url):
        yield url


@pytest.fixture
def client(server: str) -> Iterator[InferenceServerClient]:
    with InferenceServerClient(urlsplit(server).netloc) as client:
        yield client


@pytest.fixture(scope="module")
def lesions(lesion: bytes) -> list[bytes]:
    return [lesion, encode(draw_lesion(0, 5, size=(200, 160)), "PNG")]


def tensor(images: list[bytes], *, binary: bool = True, shape: list[int] | None = None) -> triton.InferInput:
    """The client's own form of them; in JSON the client takes text, so base64."""
    given = images if binary else [base64.b64encode(image) for image in images]
    array = np.array(given, dtype=np.object_).reshape(shape or [len(images)])
    made = triton.InferInput("image", list(array.shape), "BYTES")
    return made.set_data_from_numpy(array, binary_data=binary)


def request(images: list[bytes], **changes: Any) -> dict[str, Any]:
    """The JSON of a request, with changes to its input, or to itself by `whole`."""
    whole = changes.pop("whole", {})
    given: dict[str, Any] = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "data": [base64.b64encode(image).decode() for image in images],
    }
    return {"inputs": [given | changes], **whole}


def refused(answer: httpx2.Response) -> tuple[int, str]:
    """Status and message of an error in the protocol's shape, and nothing but that shape."""
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    return answer.status_code, answer.json()["error"]


def test_the_server_and_the_served_version_say_that_they_are_there(client: InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(NAME)
    assert client.is_model_ready(NAME, "1")
    assert not client.is_model_ready(NAME, "2")
    assert not client.is_model_ready("other")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "dermlens"
    assert metadata["extensions"] == ["binary_tensor_data"]


@pytest.mark.parametrize("version", ["", "1"])
def test_metadata_describes_the_tensors_that_infer_gives(
    client: InferenceServerClient, version: str, lesion: bytes
) -> None:
    metadata = client.get_model_metadata(NAME, version)
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == (NAME, ["1"], "openvino")
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    wanted = [triton.InferRequestedOutput(output["name"]) for output in metadata["outputs"]]
    answer = client.infer(NAME, [tensor([lesion])], version, outputs=wanted).get_response()
    for described, given in zip(metadata["outputs"], answer["outputs"], strict=True):
        assert (given["name"], given["datatype"]) == (described["name"], described["datatype"])
        assert given["shape"] == [1, *described["shape"][1:]]


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("column", [True, False])
def test_answers_are_those_of_predict(
    client: InferenceServerClient, server: str, lesions: list[bytes], *, binary_in: bool, binary_out: bool, column: bool
) -> None:
    names = ["label", "cam", "logits", "refer", "probabilities"]
    result = client.infer(
        NAME,
        [tensor(lesions, binary=binary_in, shape=[2, 1] if column else None)],
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_out) for name in names],
        request_id="case-7",
    )
    assert result.get_response()["id"] == "case-7"
    assert [output["name"] for output in result.get_response()["outputs"]] == names
    for index, lesion in enumerate(lesions):
        predicted = httpx2.post(f"{server}/explain", content=lesion, headers={"accept": "application/json"}).json()
        given = result.as_numpy("label")[index]
        assert (given.decode() if binary_out else given) == predicted["label"]
        assert result.as_numpy("refer")[index] == predicted["decision"]["refer"]
        expected = list(predicted["probabilities"].values())
        np.testing.assert_allclose(result.as_numpy("probabilities")[index], expected, atol=1e-6)
        classes = list(predicted["probabilities"])
        target = classes.index(predicted["target"])
        np.testing.assert_allclose(result.as_numpy("cam")[index, target], predicted["map"], rtol=1e-4, atol=1e-6)
    powers = np.exp(result.as_numpy("logits") / 1.5)  # the store's temperature
    np.testing.assert_allclose(powers / powers.sum(axis=1, keepdims=True), result.as_numpy("probabilities"), rtol=1e-4)


def test_without_a_choice_all_but_the_maps_come(client: InferenceServerClient, server: str, lesion: bytes) -> None:
    by_client = client.infer(NAME, [tensor([lesion])]).get_response()
    by_hand = httpx2.post(server + INFER, json=request([lesion])).json()
    for answer in (by_client, by_hand):
        names = ["logits", "probabilities", "label", "refer", "refer_because"]
        assert [output["name"] for output in answer["outputs"]] == names
        assert (answer["model_name"], answer["model_version"]) == (NAME, "1")
        assert "Not a medical device" in answer["parameters"]["notice"]
        assert "id" not in answer


def test_parameters_change_the_judgement(client: InferenceServerClient, lesion: bytes) -> None:
    def ask(**parameters: str) -> Any:
        return client.infer(NAME, [tensor([lesion])], parameters=parameters)

    assert ask(operating_point="sensitivity-95").as_numpy("label").tolist() == [b"malignant"]
    assert ask(operating_point="specificity-95").as_numpy("label").tolist() == [b"benign"]
    assert ask(coverage="0.90").as_numpy("refer").tolist() == [True]
    answer = ask(coverage="off", operating_point="sensitivity-95")
    assert answer.as_numpy("refer").tolist() == [False]
    told = answer.get_response()["parameters"]
    assert (told["operating_point"], told["coverage"]) == ("sensitivity-95", "off")
    for unknown in ({"operating_point": "best"}, {"coverage": "0.5"}):
        with pytest.raises(InferenceServerException, match="422") as caught:
            ask(**unknown)
        assert "this version has" in caught.value.message()


def test_deadline_and_priority_are_the_clients(client: InferenceServerClient, lesion: bytes) -> None:
    assert client.infer(NAME, [tensor([lesion])], timeout=20_000_000, priority=2).as_numpy("label") is not None
    with pytest.raises(InferenceServerException, match="504"):
        client.infer(NAME, [tensor([lesion])], timeout=1)
    with pytest.raises(InferenceServerException, match=r"parameters\.priority"):
        client.infer(NAME, [tensor([lesion])], priority=3)


def test_what_cannot_be_honoured_is_refused(client: InferenceServerClient, lesion: bytes) -> None:
    with pytest.raises(InferenceServerException, match=r"sequence_"):
        client.infer(NAME, [tensor([lesion])], sequence_id=5, sequence_start=True)
    with pytest.raises(InferenceServerException, match=r"classification"):
        client.infer(NAME, [tensor([lesion])], outputs=[triton.InferRequestedOutput("label", class_count=2)])
    with pytest.raises(InferenceServerException, match="compressed"):
        client.infer(NAME, [tensor([lesion])], request_compression_algorithm="gzip")


def test_only_the_served_version_answers(client: InferenceServerClient, lesion: bytes) -> None:
    assert client.infer(NAME, [tensor([lesion])], "1").get_response()["model_version"] == "1"
    with pytest.raises(InferenceServerException, match=r"\[404\] version 2 is not served"):
        client.infer(NAME, [tensor([lesion])], "2")
    with pytest.raises(InferenceServerException, match=r"\[404\] there is no model other"):
        client.infer("other", [tensor([lesion])])
    with pytest.raises(InferenceServerException, match=r"\[404\]"):
        client.get_model_metadata(NAME, "2")


def test_one_bad_image_refuses_the_request_and_is_named(
    client: InferenceServerClient, server: str, lesion: bytes
) -> None:
    with pytest.raises(InferenceServerException, match=r"\[400\] image 1: the upload is not an image"):
        client.infer(NAME, [tensor([lesion, b"no image", lesion])])
    assert httpx2.post(server + INFER, json=request([lesion, b""])).status_code == 400


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"name": "input"}, "inputs.0.name"),
        ({"datatype": "UINT8"}, "inputs.0.datatype"),
        ({"shape": []}, "inputs.0.shape"),
        ({"shape": [0]}, "inputs.0.shape"),
        ({"shape": [-1]}, "inputs.0.shape"),
        ({"shape": [1, 2]}, "inputs.0.shape"),
        ({"shape": [1, 1, 1]}, "inputs.0.shape"),
        ({"shape": [5]}, "inputs.0.shape"),
        ({"shape": [10**30]}, "inputs.0.shape"),
        ({"shape": [True]}, "inputs.0.shape"),
        ({"shape": [2]}, "1 images are given"),
        ({"data": ["!!!!"]}, "inputs.0.data.0"),
        ({"data": ["AAA"], "shape": [2]}, "1 images are given"),
        ({"data": [["AAAA", "AAAA"]]}, "inputs.0.data.0"),
        ({"data": [1]}, "inputs.0.data.0"),
        ({"data": "AAAA"}, "inputs.0.data"),
        ({"data": ["é"]}, "inputs.0.data.0"),
        ({"data": []}, "0 images are given"),
        ({"parameters": {"binary_data_size": 4}}, "0 bytes come after the JSON"),
        ({"parameters": {"binary_data_size": -1}}, "binary_data_size"),
        ({"parameters": {"binary_data_size": "4"}}, "binary_data_size"),
        ({"whole": {"id": "a b"}}, "id"),
        ({"whole": {"id": "a" * 65}}, "id"),
        ({"whole": {"id": 7}}, "id"),
        ({"whole": {"inputs": []}}, "inputs"),
        ({"whole": {"outputs": [{"name": "pixels"}]}}, "outputs.0.name"),
        ({"whole": {"outputs": [{"name": "cam"}] * 9}}, "outputs"),
        ({"whole": {"parameters": {"timeout": 10**400}}}, "parameters.timeout"),
        ({"whole": {"parameters": {"temperature": 1}}}, "parameters.temperature"),
    ],
)
def test_a_request_that_is_wrong_is_told_where(server: str, lesion: bytes, changes: dict[str, Any], where: str) -> None:
    status, message = refused(httpx2.post(server + INFER, json=request([lesion], **changes)))
    assert status == 400
    assert where in message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xd8\xff",
        b"null",
        b"[" * 900,
        b"[" * 200_000,
        b'{"inputs":' * 900,
        b'{"id":' + b"7" * 200_000 + b"}",
        b'{"inputs":[' + b"{}," * 60_000 + b"{}]}",
        b'{"id":"\\ud800"}',
        b'{"parameters":{"' + b"x" * 100_000 + b'":1}}',
    ],
    ids=range(11),
)
def test_a_body_that_is_no_request_is_a_short_400(server: str, body: bytes) -> None:
    status, message = refused(httpx2.post(server + INFER, content=body))
    assert status == 400
    assert len(message) <= 300


def binary(binary_data: bytes, *, count: int, size: int | None = None, **changes: Any) -> tuple[bytes, int]:
    """A body with binary data, and the length of its JSON."""
    text = json.dumps(
        request([], shape=[count], parameters={"binary_data_size": len(binary_data) if size is None else size})
        | changes
    ).encode()
    return text + binary_data, len(text)


def element(data: bytes, length: int | None = None) -> bytes:
    return (len(data) if length is None else length).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    ("data", "count", "what"),
    [
        (element(b"abc", 4), 1, "image 0 ends after"),
        (element(b"abc", 2), 1, "left after the last"),
        (element(b"abc", 2**32 - 1), 1, "image 0 ends after"),
        (element(b"abc") + b"\x00\x00\x00", 2, "image 1 ends after"),
        (element(b"abc") + element(b"d"), 1, "left after the last"),
        (element(b"abc"), 2, "image 1 ends after"),
        (element(b"abc") + element(b"", 1), 2, "image 1 ends after"),
        (b"a", 1, "image 0 ends after"),
    ],
)
def test_lengths_that_lie_are_refused(data: bytes, count: int, what: str) -> None:
    body, length = binary(data, count=count)
    with pytest.raises(MalformedUpload, match=what):
        parse(body, length, max_files=4, max_bytes=100)


def test_lengths_that_lie_are_a_400(server: str) -> None:
    body, length = binary(element(b"abc", 4), count=1)
    headers = {"Inference-Header-Content-Length": str(length)}
    status, message = refused(httpx2.post(server + INFER, content=body, headers=headers))
    assert (status, message) == (400, "image 0 ends after the binary data")


@pytest.mark.parametrize("many", [b"[" * 2000, b'{"inputs":[' + b"{}," * 2000 + b"{}]}", b'{"a":' * 2000])
def test_json_of_too_many_values_is_never_parsed(many: bytes) -> None:
    with pytest.raises(MalformedUpload, match="more values"):
        parse(many, None, max_files=4, max_bytes=100)


def test_the_json_ends_where_the_header_says_and_the_binary_data_where_the_json_says(lesion: bytes) -> None:
    body, length = binary(element(lesion), count=1)
    limits = {"max_files": 2, "max_bytes": 100_000}
    assert parse(body, length, **limits).images == [lesion]
    for wrong in (0, length - 1, length + 1, len(body), len(body) + 1, None):
        with pytest.raises(MalformedUpload):
            parse(body, wrong, **limits)
    for size in (0, 1, len(lesion), len(lesion) + 5, 2**62):
        body, length = binary(element(lesion), count=1, size=size)
        with pytest.raises(MalformedUpload, match="come after the JSON"):
            parse(body, length, **limits)
    both = json.dumps(request([b"abc"], parameters={"binary_data_size": 7})).encode()
    with pytest.raises(MalformedUpload, match="not both"):
        parse(both + element(b"abc"), len(both), **limits)


def test_images_may_be_as_large_as_the_limit_and_no_larger() -> None:
    for data in (b"12345", b"123456"):
        body, length = binary(element(data), count=1)
        for given, header in ((body, length), (json.dumps(request([data])).encode(), None)):
            if len(data) == 5:
                assert parse(given, header, max_files=1, max_bytes=5).images == [data]
            else:
                with pytest.raises(BodyTooLarge, match="image 0"):
                    parse(given, header, max_files=1, max_bytes=5)


@pytest.mark.parametrize("value", ["-1", "1e3", "x", "9" * 5000])
def test_a_header_length_that_is_no_number_is_refused(server: str, value: str) -> None:
    answer = httpx2.post(server + INFER, content=b"{}", headers={"Inference-Header-Content-Length": value})
    assert refused(answer)[0] == 422


def test_limits_and_unknown_places_answer_in_the_protocols_shape(server: str, lesion: bytes) -> None:
    assert refused(httpx2.post(server + INFER, json=request([b"x" * 100_001])))[0] == 413
    assert refused(httpx2.post(server + INFER, content=b" " * 300_001))[0] == 413
    assert refused(httpx2.get(server + INFER))[0] == 405
    assert refused(httpx2.get(f"{server}/v2/nothing"))[0] == 404
    assert refused(httpx2.get(f"{server}/v2/models/%20"))[0] == 422
    full = httpx2.post(server + INFER, json=request([lesion] * 4))
    assert refused(full)[0] == 503
    assert int(full.headers["retry-after"]) >= 1


async def metrics_after_leaving(app: FastAPI, body: bytes, release: threading.Event) -> str:
    """The metrics after a client left while its first image was on the device and the rest waited."""
    leaves = asyncio.Event()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        return

    scope = {"type": "http", "method": "POST", "path": INFER, "query_string": b"", "headers": []}
    transport = httpx2.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx2.AsyncClient(transport=transport, base_url="http://a") as other:
        asking = asyncio.ensure_future(app(scope, receive, send))
        while "dermlens_queue_depth 2.0" not in (await other.get("/metrics")).text:
            await asyncio.sleep(0.01)
        leaves.set()
        await asking
        while 'dermlens_dropped_total{reason="client_gone"} 2.0' not in (text := (await other.get("/metrics")).text):
            await asyncio.sleep(0.01)
        release.set()
    return text


def test_a_client_that_leaves_has_none_of_its_waiting_images_run(
    small_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, lesion: bytes
) -> None:
    release = threading.Event()

    class Held(Quick):
        def run(self, images: NDArray[np.uint8]) -> Output:
            if images.any():  # the warm-up is black
                release.wait(50)
            return super().run(images)

    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Held(version))
    root = small_store("1")
    store.promote(root, NAME, "1")
    app = create_app(Settings(model_store=root, reload_ms=0, max_batch=1))
    text = asyncio.run(metrics_after_leaving(app, json.dumps(request([lesion] * 3)).encode(), release))
    assert 'dermlens_dropped_total{reason="client_gone"} 2.0' in text
    assert "dermlens_queue_depth 0.0" in text


@pytest.fixture
def guarded(quick_store: Path, tmp_path: Path) -> Iterator[tuple[TestClient, dict[str, dict[str, str]]]]:
    """A server that asks for keys: one to predict twice a minute, one for metrics."""
    made = {"predict": new_key("p", ["predict"], per_minute=2), "metrics": new_key("m", ["metrics"])}
    path = tmp_path / "keys.toml"
    path.write_text("".join(key.toml for key in made.values()))
    secret = tmp_path / "audit.key"
    secret.write_bytes(bytes(32))
    settings = Settings(
        model_store=quick_store, api_keys=path, reload_ms=0, audit_log=tmp_path / "audit.log", audit_key_file=secret
    )
    with TestClient(create_app(settings)) as client:
        yield client, {scope: {"Authorization": f"Bearer {key.secret}"} for scope, key in made.items()}


def test_keys_are_asked_for_everywhere_but_for_health(
    guarded: tuple[TestClient, dict[str, dict[str, str]]], lesion: bytes
) -> None:
    client, keys = guarded
    for path in ("/v2", f"/v2/models/{NAME}", f"/v2/models/{NAME}/versions/1"):
        assert refused(client.get(path))[0] == 401
        assert refused(client.get(path, headers=keys["metrics"]))[0] == 403
    without = client.post(INFER, content=b"never looked at")
    assert refused(without)[0] == 401
    assert without.headers["www-authenticate"] == "Bearer"
    for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{NAME}/ready"):
        assert client.get(path).status_code == 200
    assert client.post(INFER, json=request([lesion]), headers=keys["predict"]).status_code == 200
    assert client.get("/v2", headers=keys["predict"]).status_code == 200
    limited = client.get("/v2", headers=keys["predict"])
    assert refused(limited)[0] == 429
    assert int(limited.headers["retry-after"]) >= 1


def test_every_image_of_a_request_is_counted_and_recorded(
    guarded: tuple[TestClient, dict[str, dict[str, str]]], lesion: bytes, tmp_path: Path
) -> None:
    client, keys = guarded
    assert client.post(INFER, json=request([lesion] * 3), headers=keys["predict"]).status_code == 200
    records = [json.loads(line) for line in (tmp_path / "audit.log").read_text().splitlines()]
    assert [(record["route"], record["key"]) for record in records] == [("/v2/models/{name}/infer", "p")] * 3
    metrics = client.get("/metrics", headers=keys["metrics"]).text
    assert 'dermlens_predictions_total{label="malignant",version="1"} 3.0' in metrics
    assert 'route="/v2/models/{name}/infer"' in metrics


def test_a_server_that_takes_no_work_is_not_ready(guarded: tuple[TestClient, dict[str, dict[str, str]]]) -> None:
    starting = TestClient(guarded[0].app)  # the first opens its device; nothing opens it twice
    guarded[0].__exit__()
    for path in ("/v2/health/ready", f"/v2/models/{NAME}/ready"):
        status, message = refused(starting.get(path))
        assert (status, message) == (503, "the server is starting or stopping")
    assert starting.get("/v2/health/live").json() == {"live": True}
