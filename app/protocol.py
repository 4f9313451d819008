"""uvicorn's HTTP/1.1 protocol, with limits on what a client may send, withhold or leave unread."""

from asyncio import TimerHandle, Transport
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, cast

from starlette.types import Scope
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from app.busy import Busy
from app.middleware import new_request_id
from app.schemas import Problem
from app.security import HEADERS


class Refused(Exception):
    """Stops the parser in the middle of what a client sent."""


class GuardedProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=GuardedProtocol, ws="none")`; a subclass sets other limits.

    One timer runs whenever the server waits for the client: for a request's headers, for the rest of a body that nobody
    reads any more, for the client to take its answer. Bodies that the app does read are bounded by `app.upload`.
    """

    max_connections = 900  # below the 1024 file descriptors that a process may open by default
    max_head_bytes = 65_536  # request line and headers, or what stands between two pieces of a chunked body
    max_headers = 100
    max_pipelined = 8  # requests behind the one being answered
    max_unread_bytes = 67_108_864  # a client sees the answer to its oversize upload only after sending all of it
    min_taken_bytes = 16_384  # of a long answer, each `client_timeout_s`
    client_timeout_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: TimerHandle | None = None
        self._in_head = False
        self._framing = 0  # bytes since the last of a body, so of headers, chunk extensions or trailers
        self._unread = 0  # bytes since the timer started
        self._untaken = 0  # bytes of the answer when the timer started
        self._running: RequestResponseCycle | None = None  # the oldest of the pipeline, where uvicorn's is the newest
        self._status = HTTPStatus.BAD_REQUEST  # of what the parser does not take
        self._ended = False  # what still comes is thrown away

    # The connection, as asyncio tells of it

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_client()
        if len(self.connections) > self.max_connections:
            self._ended = True
            transport.write(self._problem(HTTPStatus.SERVICE_UNAVAILABLE))
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline or self._ended:
            self._unread += len(data)
            if self._unread > self.max_unread_bytes:
                self.transport.abort()
                return
        if self._ended:
            return
        self._framing += len(data)
        super().data_received(data)
        if self._framing > self.max_head_bytes and not self._ended:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_client()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering():
            self._stop_waiting()

    # The request, as the parser tells of it

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer: the app has the headers already
        if len(self.headers) == self.max_headers:
            self._status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.max_head_bytes:
            self._status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise Refused
        if len(self.pipeline) == self.max_pipelined or self.parser.get_http_version() not in ("1.0", "1.1"):
            raise Refused
        super().on_headers_complete()
        self._in_head = False
        self.flow.resume_reading()  # paused for a request sent ahead, it would not hear that the client left
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # what follows would be another protocol
        if not self.flow.write_paused and self._answering():  # refused at once, it is answered already
            self._stop_waiting()

    def on_body(self, body: bytes) -> None:
        self._framing = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._framing = 0
        super().on_message_complete()

    # The answer

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        busy: Busy | None = self.app_state.get("busy")  # from the app's lifespan
        refusal = busy(cast(Scope, cycle.scope)) if busy else None
        if refusal is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.response_started = cycle.response_complete = True
        headers = {"Retry-After": str(refusal.retry_after_s)}
        self.transport.write(self._answer(refusal.problem, headers, keep_alive=cycle.keep_alive))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.flow.write_paused or not self._answering():
            self._wait_for_client()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's own words
        self._refuse(self._status)

    def _answering(self) -> bool:
        """Whether the app owes an answer; uvicorn's cycle is the newest of the pipeline."""
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_client(self) -> None:
        self._stop_waiting()
        self._unread = 0
        self._untaken = self.transport.get_write_buffer_size()
        self._deadline = self.loop.call_later(self.client_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._untaken - self.transport.get_write_buffer_size() >= self.min_taken_bytes:
            self._wait_for_client()
        elif self._ended or not self._in_head or self.flow.write_paused or self.transport.is_closing():
            self.transport.abort()  # `close` would wait for the client to take what is left
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer with a problem, and take no more requests; the answers already owed go out first."""
        self._ended = True
        if self._in_head and self._answering():  # the request before this one is whole, and answered as the last
            self.cycle.keep_alive = False
            return
        if not self._in_head:  # the fault is in a body
            if not self._answering() or self.pipeline or self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = True  # the app hears that the client left, and its answer goes nowhere
            self.cycle.message_event.set()
        self.transport.write(self._problem(status))
        self.transport.write_eof()  # closing with bytes unread would reset the connection, and the answer with it
        self._wait_for_client()

    def _problem(self, status: HTTPStatus) -> bytes:
        if count := self.app_state.get("refused_unread"):  # from the app's lifespan
            count(status)
        problem = Problem(
            type=f"urn:dermlens:problem:http-{status}",
            title=status.phrase,
            status=status,
            detail=status.description or status.phrase,
            request_id=new_request_id(),
        )
        headers = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        return self._answer(problem, headers, keep_alive=False)

    def _answer(self, problem: Problem, headers: Mapping[str, str], *, keep_alive: bool) -> bytes:
        """A whole response."""
        body = problem.model_dump_json().encode()
        ours = {
            "Content-Type": "application/problem+json",
            "Content-Length": str(len(body)),
            "X-Request-ID": problem.request_id,
            **HEADERS,
            **headers,
            **({} if keep_alive else {"Connection": "close"}),
        }
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers)
        lines += "".join(f"{name.lower()}: {value}\r\n" for name, value in ours.items()).encode("latin-1")
        return STATUS_LINE[problem.status] + lines + b"\r\n" + body
