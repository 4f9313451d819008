"""The real worker processes, stopped and killed as a bug in a decoder would."""

import array
import fcntl
import json
import os
import signal
import struct
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.isolation import DecodeProcesses
from app.main import create_app
from app.model.preprocess import MAX_PIXELS, DecodedImage, ImageError, NotAnImage, decode
from app.settings import Settings
from tests.app.model.test_preprocess import png_header
from tests.conftest import encode, framed
from training.drawn import draw_lesion

UNSAFE = "could not be decoded safely"


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


LESION = draw_lesion(1, 3, size=(900, 700))
IMAGES = {
    "jpeg": encode(LESION, "JPEG"),
    "turned": encode(LESION, "JPEG", exif=turned(6)),
    "mpo": encode(LESION, "MPO", save_all=True, append_images=[LESION]),
    "png": encode(LESION),
    "rgba": encode(LESION.convert("RGBA")),
    "grey": encode(LESION.convert("L"), "JPEG"),
    "palette": encode(LESION.quantize(64)),
    "webp": encode(LESION, "WEBP"),
    "thin": encode(draw_lesion(0, 1, size=(16, 900))),
    "text": b"just some text",
    "empty": b"",
    "truncated": encode(LESION)[:-5000],
    "gif": encode(LESION, "GIF"),
    "small": encode(Image.new("RGB", (300, 8))),
    "large": png_header(40_000, 40_000),
}


@contextmanager
def processes(workers: int = 1, *, timeout_s: float = 30, memory_mb: int = 600) -> Iterator[DecodeProcesses]:
    pool = DecodeProcesses(workers, timeout_s=timeout_s, memory_bytes=memory_mb << 20)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodeProcesses]:
    with processes() as pool:
        yield pool


def workers() -> set[int]:
    """Process ids of this process's decode workers, those that have ended and were not waited for among them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
            command = (path.parent / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        state, parent = rest.split()[:2]
        if int(parent) == os.getpid() and (b"app.decode_worker" in command or state == "Z"):
            found.add(int(name.split()[0]))
    return found


def ask(pool: DecodeProcesses, data: bytes, *, crop_frame: bool = False, preview_side: int = 0) -> DecodedImage:
    return pool.decode(data, size=224, max_pixels=MAX_PIXELS, crop_frame=crop_frame, preview_side=preview_side)


def outcome(work: object) -> tuple[object, ...]:
    try:
        image = work()  # type: ignore[operator]
    except ImageError as error:
        return type(error), str(error)
    return (
        image.pixels.tobytes(),
        image.pixels.shape,
        image.preview.size,
        image.preview.tobytes(),
        image.width,
        image.height,
        image.format,
        image.warnings,
        image.lit,
    )


@pytest.mark.parametrize("preview_side", [0, 512])
@pytest.mark.parametrize("name", IMAGES)
def test_a_process_answers_as_a_thread_does(pool: DecodeProcesses, name: str, preview_side: int) -> None:
    data = IMAGES[name]
    expected = outcome(lambda: decode(data, preview_side=preview_side))
    assert outcome(lambda: ask(pool, data, preview_side=preview_side)) == expected


def test_a_process_crops_a_frame_as_a_thread_does(pool: DecodeProcesses) -> None:
    data = encode(framed(LESION))
    expected = outcome(lambda: decode(data, crop_frame=True, preview_side=512))
    assert expected[-1] is not None
    assert outcome(lambda: ask(pool, data, crop_frame=True, preview_side=512)) == expected


def test_pixels_can_be_written_as_a_threads_can(pool: DecodeProcesses) -> None:
    assert ask(pool, IMAGES["jpeg"]).pixels.flags.writeable


def test_a_worker_that_hangs_is_killed_in_time_and_the_next_image_is_served() -> None:
    before = workers()
    with processes(timeout_s=3) as pool:
        (hung,) = workers() - before
        os.kill(hung, signal.SIGSTOP)
        with pytest.raises(NotAnImage, match=UNSAFE):
            ask(pool, IMAGES["png"])
        assert hung not in workers()
        assert ask(pool, IMAGES["jpeg"]).format == "JPEG"
        (fresh,) = workers() - before
        assert fresh != hung


def wait_for_bytes(pid: int) -> None:
    """Until something lies in a process's stdin."""
    waiting = array.array("i", [0])
    with open(f"/proc/{pid}/fd/0", "rb", buffering=0) as stdin:
        while not waiting[0]:
            fcntl.ioctl(stdin, termios.FIONREAD, waiting)
            time.sleep(0.001)


def test_a_worker_that_dies_over_an_image_fails_that_image_alone() -> None:
    before = workers()
    with processes() as pool, ThreadPoolExecutor(1) as thread:
        (dying,) = workers() - before
        os.kill(dying, signal.SIGSTOP)
        doomed = thread.submit(ask, pool, IMAGES["png"])
        wait_for_bytes(dying)
        os.kill(dying, signal.SIGKILL)
        with pytest.raises(NotAnImage, match=UNSAFE):
            doomed.result(30)
        assert ask(pool, IMAGES["jpeg"]).format == "JPEG"


def test_a_worker_that_died_idle_costs_no_image() -> None:
    before = workers()
    with processes() as pool:
        (dead,) = workers() - before
        os.kill(dead, signal.SIGKILL)
        os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
        assert ask(pool, IMAGES["jpeg"]).format == "JPEG"


def test_an_image_that_takes_more_memory_than_allowed_is_refused_and_the_next_is_served() -> None:
    image = Image.new("RGB", (6000, 6000))
    assert decode(encode(image)).width == 6000
    with processes(memory_mb=200) as pool:
        with pytest.raises(ImageError, match="scale it down"):
            ask(pool, encode(image))
        assert ask(pool, IMAGES["jpeg"]).format == "JPEG"


def test_a_pool_whose_workers_cannot_start_says_so_and_leaves_none_behind() -> None:
    before = workers()
    with pytest.raises(RuntimeError, match="more memory"):
        DecodeProcesses(2, timeout_s=5, memory_bytes=1 << 20)
    assert workers() == before


def test_a_workers_rights_end_before_the_first_upload() -> None:
    before = workers()
    with processes():
        (pid,) = workers() - before
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
        for name in ("Max core file size", "Max file size", "Max processes"):
            assert limits[name] == ["0", "0"]
        assert limits["Max open files"] == ["3", "3"]
        assert limits["Max address space"] == [str(600 << 20)] * 2
        status = Path(f"/proc/{pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Uid:\t0" not in status


def test_images_are_decoded_side_by_side() -> None:
    before = workers()
    with processes(2) as pool, ThreadPoolExecutor(4) as threads:
        stopped, _ = workers() - before
        os.kill(stopped, signal.SIGSTOP)
        futures = [threads.submit(ask, pool, IMAGES["jpeg"]) for _ in range(3)]
        wait_for_bytes(stopped)
        # One image is stuck; the others go through the other worker
        while sum(future.done() for future in futures) < 2:
            time.sleep(0.001)
        os.kill(stopped, signal.SIGCONT)
        assert {future.result(30).format for future in futures} == {"JPEG"}


def test_close_leaves_no_process_and_serves_no_more() -> None:
    before = workers()
    with processes(2) as pool:
        assert len(workers() - before) == 2
    assert workers() == before
    with pytest.raises(RuntimeError, match="closed"):
        ask(pool, IMAGES["jpeg"])


SEEN = {"width": 900, "height": 700, "format": "JPEG", "warnings": [], "preview": [224, 224], "lit": None}


def reply_of(header: object) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">I", len(encoded)) + encoded + bytes(6 * 224 * 224)


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        reply_of(json.dumps(SEEN).encode() + b" " * 4096),
        reply_of(b"[" * 4000),
        reply_of(None),
        reply_of({}),
        reply_of({"error": "SystemExit", "message": "3"}),
        reply_of({"error": "NotAnImage", "message": "two\nlines"}),
        reply_of(SEEN | {"width": 900.5}),
        reply_of(SEEN | {"width": 9_000_000}),
        reply_of(SEEN | {"height": True}),
        reply_of(SEEN | {"format": "EPS"}),
        reply_of(SEEN | {"warnings": ["long" * 200]}),
        reply_of(SEEN | {"preview": [224, 225]}),
        reply_of(SEEN | {"preview": [65_000, 65_000]}),
        reply_of(SEEN | {"lit": [0, 0, 1, 1.5]}),
        reply_of(SEEN | {"lit": [0.9, 0, 0.1, 1]}),
        reply_of(SEEN | {"more": 1}),
        reply_of(SEEN)[:-1],
    ],
)
def test_a_worker_that_lies_is_not_believed(reply: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tell(reply_of(SEEN), tmp_path, monkeypatch).width == 900
    with pytest.raises(NotAnImage, match=UNSAFE):
        tell(reply, tmp_path, monkeypatch)


def tell(reply: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> DecodedImage:
    """What a program in the worker's place, as after a takeover, brings the parent to."""
    (folder / "reply").write_bytes(b"ready" + reply)
    liar = folder / "python"
    liar.write_text(f"#!/bin/sh\ncat {folder}/reply\nexec >&-\nexec sleep 600\n")
    liar.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", str(liar))
        pool = DecodeProcesses(1, timeout_s=30, memory_bytes=1 << 30)
        try:
            return ask(pool, IMAGES["jpeg"])
        finally:
            pool.close()


def test_the_service_decodes_in_processes_where_it_is_told_to(careful_store: Path, lesion: bytes) -> None:
    answers = []
    for isolation in ("thread", "process"):
        settings = Settings(model_store=careful_store, decode_isolation=isolation, decode_threads=1)
        with TestClient(create_app(settings)) as client:
            bad = client.post("/predict", content=lesion[:-200], headers={"content-type": "image/jpeg"})
            assert (bad.status_code, bad.json()["type"]) == (400, "urn:dermlens:problem:not-an-image")
            good = client.post("/predict", content=lesion, headers={"content-type": "image/jpeg"})
            answers.append(good.json()["probabilities"])
    assert answers[0] == answers[1]


def test_process_isolation_refuses_a_decoder_that_it_cannot_confine(careful_store: Path) -> None:
    with pytest.raises(ValueError, match="DERMLENS_DECODER=pillow"):
        create_app(Settings(model_store=careful_store, decode_isolation="process", decoder="nvjpeg"))
