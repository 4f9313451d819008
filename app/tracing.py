"""OpenTelemetry: each request a trace, and each batch a span that links its requests; imported only where it is wanted.

Spans hold times, the route's template, the status and the request id: nothing of an upload, no path, query or message.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context as Variables

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.batcher import Result


class Tracing:
    """Makes spans and sends them in the background, as the OTEL_* variables say.

    Args:
        exporter: where spans go in place of the OTLP endpoint.
    """

    def __init__(self, version: str, exporter: SpanExporter | None = None) -> None:
        ours = Resource({"service.name": "dermlens", "service.version": version})
        resource = Resource.create().merge(ours).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self.tracer = self._provider.get_tracer("dermlens", version)

    def close(self) -> None:
        """Send what is left; seconds where the collector does not answer."""
        self._provider.shutdown()

    def stage(self, name: str, seconds: float) -> None:
        """A span of this request that ends now."""
        now = time.time_ns()
        self._span(name, now - _ns(seconds), now)

    def ran(self, result: Result) -> None:
        """The spans of an image that was in a batch: `queue`, `batch`, `forward`, one after the other."""
        ended = time.time_ns() - _ns(time.monotonic() - result.ended)
        begun = ended - _ns(result.forward_s)
        taken = begun - _ns(result.batch_s)
        self._span("queue", taken - _ns(result.queue_s), taken)
        self._span("batch", taken, begun)
        assert isinstance(result.shared, SpanContext)  # noqa: S101 - narrows the type
        self._span("forward", begun, ended, Link(result.shared))

    def _span(self, name: str, start_ns: int, end_ns: int, *links: Link) -> None:
        self.tracer.start_span(name, start_time=start_ns, links=links).end(end_ns)

    @contextmanager
    def batch(self, requests: Sequence[Variables]) -> Iterator[SpanContext]:
        """A span around one run of a batch, in a trace of its own, that links the spans of its requests."""
        found = [request.run(get_current_span).get_span_context() for request in requests]
        spans = {context.span_id: context for context in found if context.is_valid}  # one request has several images
        with self.tracer.start_as_current_span(
            "device batch",
            Context(),
            links=[Link(context) for context in spans.values()],
            attributes={"dermlens.batch.size": len(requests)},
            record_exception=False,  # messages may quote the upload
            set_status_on_exception=False,
        ) as span:
            try:
                yield span.get_span_context()
            except Exception as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


class TracedRequests:
    """Pure ASGI, within `RequestContext`: continues the caller's trace (W3C Trace Context), or begins one."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracer = tracing.tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in logs.QUIET:
            await self._app(scope, receive, send)
            return
        status = 500

        async def send_seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracer.start_as_current_span(
            scope["method"],
            self._propagator.extract(Headers(scope=scope), Context()),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "dermlens.request_id": scope["request_id"]},
            record_exception=False,  # messages may quote the upload
            set_status_on_exception=False,
        ) as span:
            logs.note(trace_id=f"{span.get_span_context().trace_id:032x}")
            try:
                await self._app(scope, receive, send_seen)
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                span.update_name(f"{scope['method']} {route}")
                span.set_attributes({"http.route": route, "http.response.status_code": status})
                if status >= 500:
                    span.set_status(StatusCode.ERROR)
