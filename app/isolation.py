"""Decode in processes that can be killed: a bug in a decoder's C code then costs one image, not the server."""

import json
import os
import select
import struct
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.model.frame import LEAST_SIDE, Box
from app.model.preprocess import DecodedImage, FormatNotServed, ImageError, ImageTooLarge, ImageTooSmall, NotAnImage

ERRORS = {kind.__name__: kind for kind in (NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed)}
HEADER_BYTES = 4096  # of a reply at most
START_S = 60  # of a worker, on a host that is busy
Worker = subprocess.Popen[bytes]
Line = Annotated[str, Field(max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")]
Side = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Seen(BaseModel):
    """What a worker may say of an image; an attacker may be speaking."""

    model_config = ConfigDict(strict=True, extra="forbid")
    width: Side
    height: Side
    format: Literal["JPEG", "PNG", "WEBP", "DICOM"]
    warnings: list[Line] = Field(max_length=8)
    preview: tuple[Side, Side]
    lit: tuple[Share, Share, Share, Share] | None


class _Refused(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    error: Literal["NotAnImage", "ImageTooLarge", "ImageTooSmall", "FormatNotServed"]
    message: Line


_REPLY: TypeAdapter[_Seen | _Refused] = TypeAdapter(_Seen | _Refused)


class DecodeProcesses:
    """A pool of `app.decode_worker`s. `decode` is called from threads.

    Args:
        workers: images decoded at once; further callers wait.
        timeout_s: for one image; a worker that takes longer is killed.
        memory_bytes: address space of a worker, with the 115 MB that it starts with.

    Raises:
        RuntimeError: a worker does not start.
    """

    def __init__(self, workers: int, *, timeout_s: float, memory_bytes: int) -> None:
        self._command = [sys.executable, "-m", "app.decode_worker", str(memory_bytes), str(timeout_s)]
        self._timeout_s = timeout_s
        self._closed = False
        self._count = workers
        self._idle: SimpleQueue[Worker] = SimpleQueue()  # one that has ended is replaced when its turn comes
        started = [self._spawn() for _ in range(workers)]  # all at once
        for worker in started:
            self._idle.put(worker)
        try:
            for worker in started:
                _await_ready(worker)
        except RuntimeError:
            self.close()
            raise

    def decode(self, data: bytes, *, size: int, max_pixels: int, crop_frame: bool, preview_side: int) -> DecodedImage:
        """As `preprocess.decode`; NotAnImage also where the worker dies or is killed.

        Raises:
            NotAnImage, ImageTooLarge, ImageTooSmall, FormatNotServed; RuntimeError: closed, or no worker starts.
        """
        worker = self._idle.get()
        try:
            if worker.poll() is not None:
                _end(worker)
                worker = self._spawn()
                _await_ready(worker)
            reply = _ask(
                worker,
                data,
                size=size,
                max_pixels=max_pixels,
                crop_frame=crop_frame,
                preview_side=preview_side,
                deadline=time.monotonic() + self._timeout_s,
            )
        except BaseException as error:
            _end(worker)
            if isinstance(error, (EOFError, BrokenPipeError, TimeoutError, ValueError)):
                message = "the image could not be decoded safely: export it again, or scale it down"
                raise NotAnImage(message) from error
            raise
        finally:
            self._idle.put(worker)
        if isinstance(reply, ImageError):
            raise reply
        return reply

    def close(self) -> None:
        """End every worker, each after the image that it has in hand."""
        self._closed = True
        for worker in [self._idle.get() for _ in range(self._count)]:
            _end(worker)
            self._idle.put(worker)

    def _spawn(self) -> Worker:
        if self._closed:
            raise RuntimeError("the decode processes are closed")
        worker = subprocess.Popen(  # noqa: S603 - our own module
            self._command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parent.parent,
            env={"OPENBLAS_NUM_THREADS": "1"},  # no keys of ours; its threads would take address space
            start_new_session=True,  # Ctrl-C is for the server, which still answers what it has accepted
        )
        os.set_blocking(_stdin(worker), False)  # so that a worker that reads nothing holds no thread
        return worker


def _await_ready(worker: Worker) -> None:
    with suppress(EOFError, TimeoutError):
        if _read(worker, 5, time.monotonic() + START_S) == b"ready":
            return
    raise RuntimeError("a decode process does not start: allow it more memory")


def _ask(
    worker: Worker,
    data: bytes,
    *,
    size: int,
    max_pixels: int,
    crop_frame: bool,
    preview_side: int,
    deadline: float,
) -> DecodedImage | ImageError:
    """Send an image and check every value of the reply before its bytes are read.

    Raises:
        EOFError, BrokenPipeError, TimeoutError: the worker died, or takes too long.
        ValueError: it says what it cannot have seen.
    """
    asked = {
        "bytes": len(data),
        "size": size,
        "max_pixels": max_pixels,
        "crop_frame": crop_frame,
        "preview_side": preview_side,
    }
    header = json.dumps(asked).encode()
    _write(worker, struct.pack(">I", len(header)) + header, deadline)
    _write(worker, data, deadline)
    (length,) = struct.unpack(">I", _read(worker, 4, deadline))
    if length > HEADER_BYTES:
        raise ValueError("a reply's header is too long")
    reply = _REPLY.validate_json(_read(worker, length, deadline))
    if isinstance(reply, _Refused):
        return ERRORS[reply.error](reply.message)
    wide, high = reply.preview
    fits = max(wide, high) <= preview_side if preview_side else wide == high == size
    lit = Box(*reply.lit) if reply.lit else None
    fits = fits and (lit is None or min(lit.right - lit.left, lit.bottom - lit.top) > LEAST_SIDE - 0.01)
    if not fits or reply.width * reply.height > max_pixels:
        raise ValueError("a reply's sizes are not those asked for")
    pixels = np.frombuffer(_read(worker, 3 * size * size, deadline), dtype=np.uint8).reshape(3, size, size)
    return DecodedImage(
        pixels=pixels,
        preview=Image.frombytes("RGB", (wide, high), _read(worker, 3 * wide * high, deadline)),
        width=reply.width,
        height=reply.height,
        format=reply.format,
        warnings=tuple(reply.warnings),
        lit=lit,
    )


def _write(worker: Worker, data: bytes, deadline: float) -> None:
    left = memoryview(data)
    while left:
        _wait(_stdin(worker), select.POLLOUT, deadline)
        left = left[os.write(_stdin(worker), left) :]


def _read(worker: Worker, size: int, deadline: float) -> bytearray:
    assert worker.stdout is not None  # noqa: S101 - narrows the type
    data = bytearray()
    while len(data) < size:
        _wait(worker.stdout.fileno(), select.POLLIN, deadline)
        part = worker.stdout.read(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0, 1000 * (deadline - time.monotonic()))):
        raise TimeoutError


def _stdin(worker: Worker) -> int:
    assert worker.stdin is not None  # noqa: S101 - narrows the type
    return worker.stdin.fileno()


def _end(worker: Worker) -> None:
    with worker:  # closes the pipes and waits
        worker.kill()
