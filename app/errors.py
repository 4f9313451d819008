"""Domain errors -> RFC 9457 problem+json, or what the Open Inference Protocol says instead; mapped once."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from app import logs
from app.audit import AuditFailed
from app.batcher import DeadlineExceeded, DeviceFailed, QueueFull, ShuttingDown
from app.engines.base import MethodUnavailable
from app.metrics import Metrics
from app.model.labels import UnknownChoice
from app.model.preprocess import FormatNotServed, ImageTooLarge, ImageTooSmall, NotAnImage
from app.schemas import Problem
from app.security import HEADERS, Forbidden, RateLimited, Unauthorized
from app.served import ReportMissing, VersionMissing, VersionRefused
from app.upload import BodyTooLarge, BodyTooSlow, MalformedUpload, UnsupportedBody


class InvalidParameter(ValueError):
    """A query parameter that the served model cannot honour."""


class Kind(NamedTuple):
    status: int
    slug: str
    title: str


KINDS: Mapping[type[Exception], Kind] = {
    Unauthorized: Kind(401, "unauthorized", "An API key is needed"),
    Forbidden: Kind(403, "forbidden", "This may not be done"),
    RateLimited: Kind(429, "rate-limited", "Too many requests with this key"),
    NotAnImage: Kind(400, "not-an-image", "Not an image, or a damaged one"),
    ClientDisconnect: Kind(400, "client-gone", "The client left before its answer"),
    MalformedUpload: Kind(400, "malformed-upload", "The request body cannot be read"),
    BodyTooSlow: Kind(408, "body-too-slow", "The request body came too slowly"),
    BodyTooLarge: Kind(413, "body-too-large", "The upload has too many bytes"),
    ImageTooLarge: Kind(413, "image-too-large", "The image has too many pixels"),
    UnsupportedBody: Kind(415, "unsupported-body", "The content type is not served"),
    FormatNotServed: Kind(415, "format-not-served", "The image format is not served"),
    ImageTooSmall: Kind(422, "image-too-small", "The image has too few pixels"),
    InvalidParameter: Kind(422, "invalid-parameter", "A parameter is not valid"),
    VersionMissing: Kind(404, "version-missing", "There is no such version"),
    ReportMissing: Kind(404, "report-missing", "The report has no such file"),
    MethodUnavailable: Kind(422, "invalid-parameter", "A parameter is not valid"),
    VersionRefused: Kind(409, "version-refused", "The version cannot be served"),
    UnknownChoice: Kind(422, "invalid-parameter", "A parameter is not valid"),
    QueueFull: Kind(503, "queue-full", "The server is busy"),
    ShuttingDown: Kind(503, "not-ready", "The server is not ready"),
    AuditFailed: Kind(503, "audit-failed", "The answer cannot be recorded"),
    DeviceFailed: Kind(503, "not-ready", "The server is not ready"),
    DeadlineExceeded: Kind(504, "deadline-exceeded", "The deadline passed"),
}
LOG = logging.getLogger(__name__)
INTERNAL = Kind(500, "internal-error", "The server failed")


def problem_of(error: Exception, request_id: str) -> Problem:
    """The problem that an error is told as; an unknown error tells nothing of itself."""
    kind = KINDS.get(type(error), INTERNAL)
    detail = "see the server's log for this request id" if kind is INTERNAL else str(error)
    return _problem(kind, detail, request_id)


def report(error: Exception, request_id: str, metrics: Metrics) -> Problem:
    """The problem of an error, counted by its kind, and logged with its traceback where it is ours."""
    problem = problem_of(error, request_id)
    metrics.rejected.labels(reason=problem.slug).inc()
    logs.note(problem=problem.slug)
    if problem.status == INTERNAL.status:
        LOG.error("the request failed", exc_info=error)
    return problem


def _problem(kind: Kind, detail: str, request_id: str) -> Problem:
    return Problem(
        type=f"urn:dermlens:problem:{kind.slug}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        request_id=request_id,
    )


def _respond(request: Request, problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # A 500 is sent from outside the middleware that sets these on every other answer
    headers = {**HEADERS, "X-Request-ID": problem.request_id, **(headers or {})}
    if f"{request.scope['path']}/".startswith("/v2/"):
        return JSONResponse({"error": problem.detail}, problem.status, headers=headers)
    return JSONResponse(problem.model_dump(), problem.status, headers=headers, media_type="application/problem+json")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error of the app as a problem, and count it by its kind."""

    def request_id(request: Request) -> str:
        return str(request.scope["request_id"])

    async def known(request: Request, error: Exception) -> JSONResponse:
        problem = report(error, request_id(request), metrics)
        match error:
            case QueueFull() | RateLimited():
                return _respond(request, problem, {"Retry-After": str(error.retry_after_s)})
            case ShuttingDown() | DeviceFailed() | AuditFailed():
                return _respond(request, problem, {"Retry-After": "1"})
            case BodyTooSlow():
                return _respond(request, problem, {"Connection": "close"})
            case Unauthorized():
                return _respond(request, problem, {"WWW-Authenticate": "Bearer"})
        return _respond(request, problem)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows the type
        first: dict[str, Any] = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await known(request, InvalidParameter(f"{where}: {first['msg']}"))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - narrows the type
        kind = Kind(error.status_code, f"http-{error.status_code}", str(error.detail))
        metrics.rejected.labels(reason=kind.slug).inc()
        return _respond(request, _problem(kind, str(error.detail), request_id(request)), error.headers)

    for kind in (*KINDS.values(), INTERNAL):
        metrics.rejected.labels(reason=kind.slug)  # at zero from the start
    for exception in (*KINDS, Exception):
        app.add_exception_handler(exception, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
