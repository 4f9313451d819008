"""Domain errors -> RFC 9457 problem+json, mapped once."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from app.batcher import DeadlineExceeded, QueueFull, ShuttingDown
from app.metrics import Metrics
from app.model.labels import UnknownChoice
from app.model.preprocess import FormatNotServed, ImageTooLarge, ImageTooSmall, NotAnImage
from app.schemas import Problem
from app.upload import BodyTooLarge, MalformedUpload, UnsupportedBody


class InvalidParameter(ValueError):
    """A query parameter that the served model cannot honour."""


class Kind(NamedTuple):
    status: int
    slug: str
    title: str


KINDS: Mapping[type[Exception], Kind] = {
    NotAnImage: Kind(400, "not-an-image", "Not an image, or a damaged one"),
    ClientDisconnect: Kind(400, "client-gone", "The client left before its answer"),
    MalformedUpload: Kind(400, "malformed-upload", "The request body cannot be read"),
    BodyTooLarge: Kind(413, "body-too-large", "The upload has too many bytes"),
    ImageTooLarge: Kind(413, "image-too-large", "The image has too many pixels"),
    UnsupportedBody: Kind(415, "unsupported-body", "The content type is not served"),
    FormatNotServed: Kind(415, "format-not-served", "The image format is not served"),
    ImageTooSmall: Kind(422, "image-too-small", "The image has too few pixels"),
    InvalidParameter: Kind(422, "invalid-parameter", "A parameter is not valid"),
    UnknownChoice: Kind(422, "invalid-parameter", "A parameter is not valid"),
    QueueFull: Kind(503, "queue-full", "The server is busy"),
    ShuttingDown: Kind(503, "not-ready", "The server is not ready"),
    DeadlineExceeded: Kind(504, "deadline-exceeded", "The deadline passed"),
}
LOG = logging.getLogger("uvicorn.error")  # the server's own log
INTERNAL = Kind(500, "internal-error", "The server failed")


def problem_of(error: Exception, request_id: str) -> Problem:
    """The problem that an error is told as; an unknown error tells nothing of itself."""
    kind = KINDS.get(type(error), INTERNAL)
    detail = "see the server's log for this request id" if kind is INTERNAL else str(error)
    return _problem(kind, detail, request_id)


def report(error: Exception, request_id: str, metrics: Metrics) -> Problem:
    """The problem of an error, counted by its kind, and logged with its traceback where it is ours."""
    problem = problem_of(error, request_id)
    metrics.rejected.labels(reason=problem.type.rsplit(":", 1)[1]).inc()
    if problem.status == INTERNAL.status:
        LOG.error("request %s failed", request_id, exc_info=error)
    return problem


def _problem(kind: Kind, detail: str, request_id: str) -> Problem:
    return Problem(
        type=f"urn:dermlens:problem:{kind.slug}",
        title=kind.title,
        status=kind.status,
        detail=detail,
        request_id=request_id,
    )


def _respond(problem: Problem, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # A 500 is sent from outside the middleware that sets the id on every other answer
    headers = {"X-Request-ID": problem.request_id, **(headers or {})}
    return JSONResponse(problem.model_dump(), problem.status, headers=headers, media_type="application/problem+json")


def install(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error of the app as a problem, and count it by its kind."""

    def request_id(request: Request) -> str:
        return str(request.scope["request_id"])

    async def known(request: Request, error: Exception) -> JSONResponse:
        problem = report(error, request_id(request), metrics)
        retry = {"Retry-After": str(error.retry_after_s)} if isinstance(error, QueueFull) else None
        if isinstance(error, ShuttingDown):
            retry = {"Retry-After": "1"}
        return _respond(problem, retry)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows the type
        first: dict[str, Any] = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return await known(request, InvalidParameter(f"{where}: {first['msg']}"))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - narrows the type
        kind = Kind(error.status_code, f"http-{error.status_code}", str(error.detail))
        return _respond(_problem(kind, str(error.detail), request_id(request)), error.headers)

    for exception in (*KINDS, Exception):
        app.add_exception_handler(exception, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
