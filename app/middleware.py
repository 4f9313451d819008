"""Around every request: an id, security headers, and its count and duration."""

import os
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import logs
from app.metrics import Metrics
from app.security import HEADERS

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def new_request_id() -> str:
    """A ULID (github.com/ulid/spec): 48 bits of milliseconds, 80 random bits, sortable by time."""
    value = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10))
    return "".join(CROCKFORD[value >> shift & 31] for shift in range(125, -1, -5))


def request_id_of(scope: Scope) -> str:
    """The id that the client offered, where it is a plain one, else a new one."""
    offered = Headers(scope=scope).get("x-request-id", "")
    return offered if REQUEST_ID.fullmatch(offered) else new_request_id()


class RequestContext:
    """Pure ASGI, so that bodies stream through untouched."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["request_id"] = request_id = request_id_of(scope)
        logs.begin(request_id)
        started = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a page brings a policy of its own
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_headers)
            finally:
                seconds = time.perf_counter() - started
                # The route's template, not the path: paths are unbounded
                route = getattr(scope.get("route"), "path", "unmatched")
                self._metrics.requests.labels(route=route, status=str(status)).inc()
                self._metrics.request_seconds.labels(route=route).observe(seconds)
                logs.access(method=scope["method"], route=route, status=status, seconds=seconds)
