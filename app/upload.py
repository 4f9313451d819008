"""Read image bytes from a request: the raw body or multipart, never further than the limit, never to disk."""

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

PART_OVERHEAD = 2_000  # bytes of multipart headers allowed per file
# Starlette decodes with whatever codec the client names: `undefined` raises, `punycode` takes quadratic time
CHARSETS = (b"utf-8", b"us-ascii", b"iso-8859-1")


class BodyTooLarge(ValueError):
    """More bytes than the limit."""


class BodyTooSlow(Exception):
    """The body was not there in time."""


class UnsupportedBody(ValueError):
    """Neither multipart nor an image content type, or a charset that is not served."""


class MalformedUpload(ValueError):
    """Multipart that cannot be parsed, or without the expected field."""


class _InMemoryParser(MultiPartParser):
    """Starlette's parser spools to a temporary file above 1 MB; images are patients' data and stay in memory."""

    spool_max_size = sys.maxsize
    complete = False

    def on_end(self) -> None:
        """The final boundary: without it the last part is missing, and nothing else says so."""
        self.complete = True

    def close(self) -> None:
        """Free every part, those of a body that broke off among them."""
        for file in self._files_to_close_on_error:
            file.close()


async def read_image(request: Request, *, max_bytes: int, read_timeout_s: float) -> bytes:
    """The image of a `/predict` or `/explain` request: multipart field `file`, or the raw body.

    Raises:
        BodyTooLarge, BodyTooSlow, UnsupportedBody, MalformedUpload.
    """
    kind = _kind(request)
    if kind == "multipart/form-data":
        form_bytes = max_bytes + PART_OVERHEAD
        [image] = await read_images(
            request,
            field="file",
            max_bytes=max_bytes,
            max_files=1,
            max_total_bytes=form_bytes,
            read_timeout_s=read_timeout_s,
        )
        return image
    if not kind.startswith("image/") and kind not in ("", "application/octet-stream", "application/dicom"):
        raise UnsupportedBody(f"{kind} is not served: send multipart/form-data with a file, or the image as image/jpeg")
    return await read_body(request, max_bytes=max_bytes, read_timeout_s=read_timeout_s)


async def read_body(request: Request, *, max_bytes: int, read_timeout_s: float) -> bytes:
    """The body as it is, whatever it is; raises BodyTooLarge, BodyTooSlow."""
    body = bytearray()  # a list of chunks takes forty times their bytes where they come by twos
    async with _in_time(read_timeout_s):
        async for chunk in _bounded(request, max_bytes):
            body += chunk
    return bytes(body)


async def read_images(
    request: Request,
    *,
    field: str,
    max_bytes: int,
    max_files: int,
    max_total_bytes: int,
    read_timeout_s: float,
) -> list[bytes]:
    """All files of one multipart field: 1 to `max_files`, each of `max_bytes` at most, in a body of `max_total_bytes`.

    Raises:
        BodyTooLarge, BodyTooSlow, UnsupportedBody, MalformedUpload.
    """
    if _kind(request) != "multipart/form-data":
        raise UnsupportedBody(f"send multipart/form-data with the field {field!r}")
    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise UnsupportedBody("the charset of the form is not served: leave it out")
    if not options.get(b"boundary"):
        raise MalformedUpload("the multipart body has no boundary")
    stream = _bounded(request, min(max_total_bytes, max_files * (max_bytes + PART_OVERHEAD)))
    parser = _InMemoryParser(request.headers, stream, max_files=max_files, max_fields=8)
    try:
        async with _in_time(read_timeout_s):
            form = await parser.parse()
        if not parser.complete:
            raise MalformedUpload("the multipart body ends before its final boundary")
        files = [part for part in form.getlist(field) if isinstance(part, UploadFile)]
        if not files:
            raise MalformedUpload(f"the form has no file in the field {field!r}")
        if any((part.size or 0) > max_bytes for part in files):
            raise BodyTooLarge(f"a file is over the limit of {max_bytes} bytes: scale the image down")
        return [await _take(part) for part in files]
    except MultiPartException as error:
        raise MalformedUpload(error.message) from None
    finally:
        parser.close()


def _kind(request: Request) -> str:
    """The media type of the body, without its parameters; empty where the client names none."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


async def _take(part: UploadFile) -> bytes:
    """The bytes of a part, which is freed at once: a batch is never in memory twice."""
    data = await part.read()
    await part.close()
    return data


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete after {seconds:g} seconds") from None


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; refuses on the announced length, or as soon as it proves longer than `limit`."""
    message = f"the body is over the limit of {limit} bytes: send less, or scale the image down"
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise BodyTooLarge(message)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise BodyTooLarge(message)
        yield chunk


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The outcome of `work`, cancelled where the client leaves first; the body has been read.

    Raises:
        ClientDisconnect, or what `work` raises.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())  # after the body nothing comes but the disconnect
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
