"""One request, one trace, at whatever collector; and nothing of it where nobody asked."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import app.tracing
from app.engines.base import Output
from app.main import create_app
from app.settings import Settings
from tests.conftest import JPEG, Quick

STAGES = ["read", "decode", "queue", "batch", "forward"]
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01"}
ATTRIBUTES = {
    "dermlens.request_id", "dermlens.batch.size", "http.request.method", "http.route", "http.response.status_code"
}  # fmt: skip


class Traces:
    """A server whose spans stay here, by the tests' questions."""

    def __init__(self, client: TestClient, exporter: InMemorySpanExporter) -> None:
        self.client = client
        self._exporter = exporter

    def finished(self) -> list[ReadableSpan]:
        """Every span, in the order of their starts, once the server has ended."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


@contextmanager
def traced(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Traces]:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(app.tracing, "OTLPSpanExporter", lambda: exporter)
    settings = Settings(model_store=root, tracing=True, max_batch=4)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield Traces(client, exporter)


def root_of(spans: list[ReadableSpan]) -> ReadableSpan:
    (found,) = [span for span in spans if span.kind is SpanKind.SERVER]
    return found


def children(spans: list[ReadableSpan], parent: ReadableSpan) -> list[ReadableSpan]:
    context = parent.get_span_context()
    return [span for span in spans if context and span.parent and span.parent.span_id == context.span_id]


def test_one_trace_shows_every_stage_of_a_request_in_turn(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(quick_store, monkeypatch) as traces:
        answer = traces.client.post("/explain", content=lesion, headers=JPEG)
    spans = traces.finished()
    request = root_of(spans)
    assert answer.status_code == 200
    assert request.name == "POST /explain"
    assert request.parent is None
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": "/explain",
        "http.response.status_code": 200,
        "dermlens.request_id": answer.headers["x-request-id"],
    }
    stages = children(spans, request)
    assert [stage.name for stage in stages] == [*STAGES, "render"]
    for before, after in pairwise(stages):
        assert before.end_time is not None
        assert after.start_time is not None
        assert before.end_time <= after.start_time + 1_000_000  # two clocks, read one after the other
    assert request.start_time is not None
    assert all(request.start_time <= (stage.start_time or 0) for stage in stages)
    assert all((stage.end_time or 0) <= (request.end_time or 0) for stage in stages)


def test_a_batch_is_a_span_that_links_its_requests_and_is_linked_by_them(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(quick_store, monkeypatch) as traces:
        files = [("files", ("x.jpg", lesion, "image/jpeg"))] * 6
        assert traces.client.post("/predict/batch", files=files).status_code == 200
    spans = traces.finished()
    request = root_of(spans).get_span_context()
    batches = [span for span in spans if span.name == "device batch"]
    forwards = [span for span in spans if span.name == "forward"]
    assert request
    assert sum((batch.attributes or {})["dermlens.batch.size"] for batch in batches) == len(forwards) == 6  # type: ignore[misc]
    linked = {link.context.span_id for forward in forwards for link in forward.links}
    for batch in batches:
        context = batch.get_span_context()
        assert context
        assert batch.parent is None
        assert context.trace_id != request.trace_id
        assert [link.context for link in batch.links] == [request]  # once, of however many images
        assert context.span_id in linked


def test_the_callers_trace_is_continued_and_named_in_the_access_line(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with traced(quick_store, monkeypatch) as traces, caplog.at_level(logging.INFO, "app.access"):
        traces.client.post("/predict", content=lesion, headers=JPEG | TRACEPARENT)
        traces.client.post("/predict", content=lesion, headers=JPEG | {"traceparent": "00-nonsense"})
    continued, new = [span for span in traces.finished() if span.kind is SpanKind.SERVER]
    assert continued.parent
    assert (f"{continued.parent.trace_id:032x}", f"{continued.parent.span_id:016x}") == CALLER
    assert new.parent is None
    told = [vars(record)["trace_id"] for record in caplog.records if record.name == "app.access"]
    contexts = [span.get_span_context() for span in (continued, new)]
    assert told == [f"{context.trace_id:032x}" for context in contexts if context]
    assert told[0] == CALLER[0]


def test_nothing_of_an_upload_or_an_address_is_in_a_span(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(quick_store, monkeypatch) as traces:
        for data in (lesion, lesion[:900], b"SECRET"):
            traces.client.post("/predict?SECRET=SECRET", files={"file": ("SECRET.jpg", data, "image/jpeg")})
        traces.client.get("/SECRET/SECRET?SECRET")
        traces.client.post("/v2/models/SECRET/infer", json={"SECRET": "SECRET"})
    spans = traces.finished()
    assert len([span for span in spans if span.kind is SpanKind.SERVER]) == 5
    assert not [span for span in spans if "SECRET" in span.to_json()]
    assert not [span for span in spans if span.events or span.status.description]
    assert {name for span in spans for name in span.attributes or {}} == ATTRIBUTES


def test_what_fails_is_marked_without_its_message(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Exception):
        pass

    def run(images: NDArray[np.uint8]) -> Output:
        if images.any():  # what warms up is black
            raise Broken("SECRET")
        return Output(np.zeros((len(images), 2), np.float32), np.zeros((len(images), 2, 4, 4), np.float32))

    monkeypatch.setattr(Quick, "run", staticmethod(run))
    with traced(quick_store, monkeypatch) as traces:
        answer = traces.client.post("/predict", content=lesion, headers=JPEG)
    spans = traces.finished()
    assert answer.status_code == 500
    assert [span.name for span in spans] == ["POST /predict", "read", "decode", "device batch"]
    failed = {span.name: span.status for span in spans if span.status.status_code is StatusCode.ERROR}
    assert {name: status.description for name, status in failed.items()} == {
        "POST /predict": None,
        "device batch": "Broken",
    }


def test_health_checks_are_not_traced(quick_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with traced(quick_store, monkeypatch) as traces:
        for path in ("/livez", "/readyz", "/metrics", "/v2/health/ready", "/v2/health/live"):
            assert traces.client.get(path).status_code == 200
    assert not traces.finished()


def test_without_the_setting_nothing_is_traced_or_imported(
    quick_store: Path, lesion: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(create_app(Settings(model_store=quick_store))) as client, caplog.at_level(logging.INFO):
        assert client.post("/predict", content=lesion, headers=JPEG | TRACEPARENT).status_code == 200
    assert not [record for record in caplog.records if "trace_id" in vars(record)]


def test_without_the_extra_the_server_says_what_to_install(quick_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "app.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install '\.\[tracing\]'"):
        create_app(Settings(model_store=quick_store, tracing=True))


@contextmanager
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP/HTTP receiver, by its address and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_collector_gets_the_trace_over_otlp(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (address, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        with TestClient(create_app(Settings(model_store=quick_store, tracing=True))) as client:
            client.post("/predict", content=lesion, headers=JPEG | TRACEPARENT)
    sent = [resource for message in received for resource in message.resource_spans]
    resource = {pair.key: pair.value.string_value for pair in sent[0].resource.attributes}
    assert resource["service.name"] == "dermlens"
    assert resource["deployment.environment.name"] == "test"
    spans: list[SentSpan] = [span for resource in sent for scope in resource.scope_spans for span in scope.spans]
    mine = [span.name for span in spans if span.trace_id.hex() == CALLER[0]]
    assert sorted(mine) == sorted(["POST /predict", *STAGES])
    (batch,) = [span for span in spans if span.name == "device batch"]
    assert batch.links[0].trace_id.hex() == CALLER[0]


def test_a_collector_that_is_not_there_costs_no_request(
    quick_store: Path, lesion: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with TestClient(create_app(Settings(model_store=quick_store, tracing=True))) as client:
        assert client.post("/predict", content=lesion, headers=JPEG).json()["label"]
