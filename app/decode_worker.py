"""python -m app.decode_worker MEMORY_BYTES TIMEOUT_S: decodes images for app.isolation, and can do little else.

Both ways a message is a length (4 bytes, big-endian), JSON of that length, and the bytes that the JSON announces.
"""

import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from typing import Any

from PIL import Image

from app.clinical import dicom
from app.model.preprocess import FORMATS, ImageError, decode

NOBODY = 65534
ROOM = 64_000_000  # bytes, a small photograph decoded
PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


def confine(memory_bytes: int) -> None:
    """Give up, before any upload is read: files, processes, core dumps, root, and memory above the limit."""
    with suppress(AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    with suppress(PermissionError):  # root in a container may lack the right to stop being root
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    limits = {"AS": memory_bytes, "CORE": 0, "FSIZE": 0, "NOFILE": 3, "NPROC": 0}  # stdin, stdout and stderr are open
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def warm_up() -> None:
    """Decode an image of each format."""
    for kind in FORMATS:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, kind)
        decode(buffer.getvalue())
    dicom.warm_up()


def main() -> None:
    """Answer one image after another until stdin ends."""
    timeout_s = float(sys.argv[2])
    warm_up()  # what Pillow imports at first use, it can no longer import once confined
    confine(int(sys.argv[1]))
    bytearray(ROOM)  # too little memory shows before the first upload
    warm_up()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(b"ready")
    replies.flush()
    while len(start := requests.read(4)) == 4:
        signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)  # ends the process even where its parent is gone
        asked = json.loads(requests.read(*struct.unpack(">I", start)))
        for part in answer(requests.read(asked.pop("bytes")), **asked):
            replies.write(part)
        replies.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(data: bytes, *, size: int, max_pixels: int, crop_frame: bool, preview_side: int) -> list[bytes]:
    """The reply to one image: length, header, and pixels (uint8[3,size,size], then the preview's) if it is one."""
    try:
        image = dicom.decode(
            data,
            size=size,
            max_pixels=max_pixels,
            crop_frame=crop_frame,
            preview_side=preview_side,
            unbounded=True,
        )
    except ImageError as error:
        header: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
        parts = []
    else:
        header = {name: getattr(image, name) for name in ("width", "height", "format", "warnings", "lit")}
        header["preview"] = image.preview.size
        parts = [image.pixels.tobytes(), image.preview.tobytes()]
    encoded = json.dumps(header).encode()
    return [struct.pack(">I", len(encoded)), encoded, *parts]


if __name__ == "__main__":
    main()
