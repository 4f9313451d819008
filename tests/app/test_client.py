"""The Python client against the real server."""

import asyncio
import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from app.client import (
    AsyncClient,
    BadImage,
    BadRequest,
    Busy,
    Client,
    DermlensError,
    NotAllowed,
    TooLate,
    Unreachable,
)
from app.engines.base import Output
from app.main import create_app
from app.schemas import Explanation, Prediction
from app.security import new_key
from app.settings import Settings
from tests.conftest import ROOT, Quick, running

DOCS = (ROOT / "docs" / "client.md").read_text()


@pytest.fixture(scope="module")
def url(careful_store: Path) -> Iterator[str]:
    settings = Settings(model_store=careful_store, precision="float32", max_batch_files=4, max_upload_bytes=500_000)
    with running(create_app(settings)) as port:
        yield f"http://127.0.0.1:{port}"


def test_an_image_is_bytes_a_path_or_an_open_file(url: str, lesion: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lesion.jpg"
    path.write_bytes(lesion)
    with Client(url, coverage="0.90", operating_point="sensitivity-95") as client:
        answers = [client.predict(image) for image in (lesion, path, str(path), io.BytesIO(lesion))]
    assert {answer.label for answer in answers} == {"malignant"}
    assert {answer.decision.operating_point for answer in answers} == {"sensitivity-95"}
    assert {answer.decision.coverage for answer in answers} == {"0.90"}
    assert {answer.image.width for answer in answers} == {320}


def test_many_go_in_batches_that_the_server_takes_and_a_bad_one_fails_alone(url: str, lesion: bytes) -> None:
    images = [lesion, b"no image", *[lesion] * 4, lesion + bytes(600_000), lesion]
    with Client(url) as client:
        outcomes = client.predict_many(images)
    bad = {index: outcome for index, outcome in enumerate(outcomes) if isinstance(outcome, DermlensError)}
    assert {index: error.problem.type for index, error in bad.items()} == {
        1: "urn:dermlens:problem:not-an-image",
        6: "urn:dermlens:problem:body-too-large",
    }
    assert all(isinstance(error, BadImage) for error in bad.values())
    assert sum(isinstance(outcome, Prediction) for outcome in outcomes) == 6


def test_explain_models_and_ready_are_typed(url: str, lesion: bytes) -> None:
    with Client(url) as client:
        explanation = client.explain(lesion, target="benign", style="heatmap")
        models, health = client.models(), client.ready()
    assert explanation.target == "benign"
    assert explanation.overlay_png.startswith("iVBOR")  # a PNG in base64
    assert [version.version for version in models.versions if version.served] == ["1"]
    assert health.status == "ok"


def test_a_problem_is_raised_as_the_server_told_it(url: str, lesion: bytes) -> None:
    with Client(url) as client, pytest.raises(BadImage, match="send a JPEG, PNG or WebP file") as raised:
        client.predict(b"no image")
    problem = raised.value.problem
    assert (problem.type, problem.status) == ("urn:dermlens:problem:not-an-image", 400)
    assert problem.title == "Not an image, or a damaged one"
    assert len(problem.request_id) == 26
    with Client(url, operating_point="lucky") as client, pytest.raises(BadRequest, match="this version has balanced"):
        client.predict_many([lesion])


def test_a_folder_comes_file_by_file(url: str, lesion: bytes, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.JPEG", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).write_bytes(lesion)
    (tmp_path / "bad.png").write_bytes(b"no image")
    with Client(url, background=True) as client:
        scored = {each.path.name: each.outcome for each in client.score_directory(tmp_path, explain=True)}
        flat = {each.path.name for each in client.score_directory(tmp_path, recursive=False)}
    assert {name: type(outcome) for name, outcome in scored.items()} == {
        "a.jpg": Explanation,
        "b.JPEG": Explanation,
        "bad.png": BadImage,
    }
    assert flat == {"a.jpg", "bad.png"}


def test_asyncio_has_the_same(url: str, lesion: bytes, tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.jpg" for n in range(5)]
    for path in paths:
        path.write_bytes(lesion)

    async def ask() -> list[Any]:
        async with AsyncClient(url) as client:
            both = await asyncio.gather(client.predict(lesion), client.predict_many([lesion, b""]))
            return [*both, [each.path async for each in client.score([*paths, tmp_path / "absent"], concurrency=2)]]

    one, (first, second), order = asyncio.run(ask())
    assert one.probabilities == pytest.approx(first.probabilities)
    assert isinstance(second, BadImage)
    assert sorted(order) == sorted([*paths, tmp_path / "absent"])


def test_who_stops_listening_ends_what_is_under_way(url: str, lesion: bytes, tmp_path: Path) -> None:
    for n in range(9):
        (tmp_path / f"{n}.jpg").write_bytes(lesion)
    with Client(url) as client:
        stream = client.score_directory(tmp_path, concurrency=2)
        next(stream)
        stream.close()
        assert client.ready().status == "ok"


def test_a_wrong_key_is_told_at_once(careful_store: Path, lesion: bytes, tmp_path: Path) -> None:
    key = new_key("ward", ["predict"])
    (tmp_path / "keys.toml").write_text(key.toml)
    (tmp_path / "a.jpg").write_bytes(lesion)
    with running(create_app(Settings(model_store=careful_store, api_keys=tmp_path / "keys.toml"))) as port:
        url = f"http://127.0.0.1:{port}"
        with Client(url, api_key="dl_wrong") as client:
            with pytest.raises(NotAllowed, match="the API key is not known"):
                client.predict_many([lesion] * 3)
            with pytest.raises(NotAllowed):
                list(client.score_directory(tmp_path))
        with Client(url, api_key=key.secret) as client:
            assert client.predict(lesion).model.version == "1"


class Gate(Quick):
    """Answers nothing until it is opened."""

    opened = threading.Event()

    def run(self, images: NDArray[np.uint8]) -> Output:
        self.opened.wait(20)
        return super().run(images)


@pytest.fixture
def gated(quick_store: Path, monkeypatch: pytest.MonkeyPatch, lesion: bytes) -> Iterator[str]:
    """A server with one place, which is taken until `Gate.opened`."""
    Gate.opened.set()  # to warm up
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Gate(version))
    with running(create_app(Settings(model_store=quick_store, max_batch=1, max_queue=1))) as port:
        Gate.opened.clear()
        url = f"http://127.0.0.1:{port}"
        with Client(url) as client:
            taken = threading.Thread(target=client.predict, args=[lesion])
            taken.start()
            while b'dermlens_stage_seconds_count{stage="decode"} 1.0' not in scrape(port):
                time.sleep(0.01)
            yield url
            Gate.opened.set()
            taken.join()


def scrape(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_busy_server_is_asked_again_until_it_has_room(gated: str, lesion: bytes) -> None:
    port = int(gated.rpartition(":")[2])

    def open_once_refused() -> None:
        while b'dermlens_rejected_total{reason="queue-full"} ' not in scrape(port):
            time.sleep(0.02)
        Gate.opened.set()

    opening = threading.Thread(target=open_once_refused)
    opening.start()
    with Client(gated, timeout_s=20) as client:
        assert client.predict(lesion).label in ("benign", "malignant")
    opening.join()


def test_who_has_no_time_to_wait_is_told_that_the_server_is_busy(gated: str, lesion: bytes) -> None:
    with Client(gated, timeout_s=0.5) as client, pytest.raises(Busy) as raised:  # Retry-After says 1 s
        client.predict(lesion)
    assert raised.value.problem.type == "urn:dermlens:problem:queue-full"


def test_the_deadline_is_the_servers_too(quick_store: Path, monkeypatch: pytest.MonkeyPatch, lesion: bytes) -> None:
    Gate.opened.set()
    monkeypatch.setattr("app.main.build_engine", lambda _, version, **__: Gate(version))
    monkeypatch.setattr("app.client.ANSWER_S", 3)  # a busy machine answers late
    with running(create_app(Settings(model_store=quick_store, max_batch=1))) as port:
        Gate.opened.clear()
        with Client(f"http://127.0.0.1:{port}", timeout_s=4) as client, pytest.raises(TooLate) as raised:
            client.predict(lesion)
        Gate.opened.set()
    assert raised.value.problem.type == "urn:dermlens:problem:deadline-exceeded"


@contextmanager
def cutting(port: int, *, times: int) -> Iterator[int]:
    """A port that leads to a server, but cuts the first connections in the middle of their answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        seen = 0

        def serve() -> None:
            nonlocal seen
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                seen += 1
                with client, socket.create_connection(("127.0.0.1", port)) as server:
                    forward = threading.Thread(target=pump, args=(client, server))
                    forward.start()
                    pump(server, client, most=40 if seen <= times else None)
                    with suppress(OSError):
                        client.shutdown(socket.SHUT_RDWR)
                    forward.join()

        thread = threading.Thread(target=serve)
        thread.start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def pump(source: socket.socket, sink: socket.socket, most: int | None = None) -> None:
    try:
        while most != 0 and (data := source.recv(65536)):
            sink.sendall(data[:most])
            most = None if most is None else 0
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_a_connection_that_breaks_in_the_middle_is_made_again(url: str, lesion: bytes) -> None:
    with (
        cutting(int(url.rpartition(":")[2]), times=2) as port,
        Client(f"http://127.0.0.1:{port}", timeout_s=20) as client,
    ):
        assert client.predict(lesion).image.format == "JPEG"


def test_nobody_there_is_told_when_the_time_is_up(lesion: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", timeout_s=0.3) as client:
        with pytest.raises(Unreachable, match=f"No server answers: http://127.0.0.1:{port}"):
            client.predict(lesion)
        with pytest.raises(Unreachable):
            client.ready()


def test_the_examples_of_the_docs_run_as_they_stand(
    url: str, lesion: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("lesion.jpg", "images/a.jpg", "images/b.jpg"):
        (tmp_path / name).write_bytes(lesion)
    (tmp_path / "key.txt").write_text("dl_any\n")
    examples = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        assert "http://127.0.0.1:8000" in example
        code = example.replace("http://127.0.0.1:8000", url)
        exec(compile(code, "docs/client.md", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own page
    told = capsys.readouterr().out
    assert "images/a.jpg" in told
    assert "malignant" in told
    assert (tmp_path / "why.png").read_bytes().startswith(b"\x89PNG")
