"""Read image bytes from a request: the raw body or multipart, never further than the limit, never to disk."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")

PART_OVERHEAD = 2_000  # bytes of multipart headers allowed per file


class BodyTooLarge(ValueError):
    """More bytes than the limit."""


class UnsupportedBody(ValueError):
    """Neither multipart nor an image content type."""


class MalformedUpload(ValueError):
    """Multipart that cannot be parsed, or without the expected field."""


class _InMemoryParser(MultiPartParser):
    """Starlette's parser spools to a temporary file above 1 MB; images are patients' data and stay in memory."""

    spool_max_size = sys.maxsize

    def close(self) -> None:
        """Free every part, those of a body that broke off among them."""
        for file in self._files_to_close_on_error:
            file.close()


async def read_image(request: Request, *, max_bytes: int) -> bytes:
    """The image of a `/predict` or `/explain` request: multipart field `file`, or the raw body.

    Raises:
        BodyTooLarge, UnsupportedBody, MalformedUpload.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return (await read_images(request, field="file", max_bytes=max_bytes, max_files=1))[0]
    if kind.startswith("image/") or kind in ("", "application/octet-stream"):
        return b"".join([chunk async for chunk in _bounded(request, max_bytes)])
    raise UnsupportedBody(f"{kind} is not served: send multipart/form-data with a file, or the image as image/jpeg")


async def read_images(request: Request, *, field: str, max_bytes: int, max_files: int) -> list[bytes]:
    """All files of one multipart field, 1 to `max_files` of at most `max_bytes` each.

    Raises:
        BodyTooLarge, UnsupportedBody, MalformedUpload.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedBody(f"send multipart/form-data with the field {field!r}")
    stream = _bounded(request, max_files * (max_bytes + PART_OVERHEAD))
    parser = _InMemoryParser(request.headers, stream, max_files=max_files, max_fields=8)
    try:
        form = await parser.parse()
        files = [part for part in form.getlist(field) if isinstance(part, UploadFile)]
        if not files:
            raise MalformedUpload(f"the form has no file in the field {field!r}")
        if any((part.size or 0) > max_bytes for part in files):
            raise BodyTooLarge(f"a file is over the limit of {max_bytes} bytes: scale the image down")
        return [await part.read() for part in files]
    except (MultiPartException, KeyError) as error:
        raise MalformedUpload(str(getattr(error, "message", "the multipart body has no boundary"))) from None
    finally:
        parser.close()


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; refuses on the announced length, or as soon as it proves longer than `limit`."""
    message = f"the body is over the limit of {limit} bytes: scale the image down"
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
