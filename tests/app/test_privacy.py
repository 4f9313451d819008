"""Nothing of a patient reaches a log or a disk: a marked image goes through every route of a real server."""

import base64
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import httpx2
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.app.test_serve import free_port
from tests.conftest import ROOT, encode

MARKER = f"JaneDoe{secrets.token_hex(12)}"
WINDOW = 16  # bytes of pixels or file in a row that are no chance
MAX_UPLOAD = 4_000_000
SIDE = 700  # pixels of noise: a PNG of 1.4 MB, over what starlette keeps in memory by itself

strace = shutil.which("strace")


# What a request tells of a patient in words of its own
KNOWN = {"age": f"47.{secrets.randbelow(10**9):09d}1", "sex": "female", "site": "oral/genital"}


def marked(kind: str) -> bytes:
    """Noise that no other image holds, with the marker wherever a file has room for words."""
    noise = Image.frombytes("RGB", (SIDE, SIDE), NOISE)
    exif = Image.Exif()
    exif.update({0x010E: MARKER, 0x013B: MARKER, 0x9C9B: MARKER.encode("utf-16-le")})
    if kind == "JPEG":
        xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><n>{MARKER}</n></x:xmpmeta>'.encode()
        return encode(noise, kind, quality=95, exif=exif, xmp=xmp, comment=MARKER.encode())
    if kind == "TIFF":
        return encode(noise, kind, exif=exif, description=MARKER)
    text = PngInfo()
    text.add_text("Comment", MARKER)
    text.add_itxt("XML:com.adobe.xmp", f"<n>{MARKER}</n>")
    return encode(noise, kind, exif=exif, pnginfo=text)


NOISE = secrets.token_bytes(SIDE * SIDE * 3)
FILES = {kind: marked(kind) for kind in ("PNG", "JPEG", "TIFF")}
# Aligned pieces here against every offset there: a run of 31 bytes cannot be missed
PIECES = {data[at : at + WINDOW] for data in (NOISE, *FILES.values()) for at in range(0, len(data) - WINDOW, WINDOW)}
PIECES = {piece for piece in PIECES if len(set(piece)) > 8}  # no runs of zeros, and the like


def views(data: bytes) -> Iterator[bytes]:
    """The data, and what it may stand for."""
    yield data
    yield data.replace(b"\0", b"")  # UTF-16
    yield unquote_to_bytes(data)
    yield re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), data)  # Python's repr
    for run in re.findall(rb"[0-9a-fA-F]{16,}", data):
        for start in range(2):
            yield bytes.fromhex(run[start : len(run) - (len(run) - start) % 2].decode())
    for run in re.findall(rb"[A-Za-z0-9+/_-]{16,}", data):
        for start in range(4):
            yield base64.urlsafe_b64decode(run[start : len(run) - (len(run) - start) % 4].translate(TO_URL_SAFE))


TO_URL_SAFE = bytes.maketrans(b"+/", b"-_")


def found_in(data: bytes) -> str | None:
    """What of the patient some data gives away, if anything."""
    for view in views(data):
        at = view.lower().find(MARKER.lower().encode())
        if at >= 0:
            return f"the marker: …{view[max(0, at - 80) : at + 40]!r}"
        for start in range(len(view) - WINDOW + 1):
            if view[start : start + WINDOW] in PIECES:
                return f"the image: {view[start : start + WINDOW]!r}"
    return None


@pytest.mark.parametrize(
    "leak",
    [
        MARKER.encode(),
        MARKER.upper().encode(),
        MARKER.encode("utf-16-le"),
        MARKER.encode("utf-16-be"),
        MARKER.encode().hex().encode(),
        b"f" + MARKER.encode().hex().upper().encode(),
        base64.b64encode(b"x" + MARKER.encode()),
        base64.urlsafe_b64encode(b"xy" + MARKER.encode()),
        "".join(f"%{letter:02X}" for letter in MARKER.encode()).encode(),
        NOISE[1001:1040],
        repr(FILES["JPEG"][5001:5400]).encode(),
        FILES["PNG"][9001:9040].hex().encode(),
        base64.b64encode(FILES["JPEG"][7001:7040]),
    ],
    ids=range(13),  # the same names in each process of a parallel run
)
def test_a_leak_is_seen_in_every_form(leak: bytes) -> None:
    assert found_in(b'{"event": "x", "value": "' + leak + b'"}')
    assert not found_in(b'{"event": "x", "value": "' + leak[:10] + b'"}')


@dataclass(frozen=True)
class Run:
    """What a server left, and what it opened, where that could be watched."""

    folder: Path  # its stdout and stderr, working directory, home and temporary files
    shared_memory: list[Path]  # new files there
    opened: list[str]  # lines of strace
    answered: dict[str, int]  # status by request


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, told_store: Path) -> Run:
    """A server that was sent the marked image in every way, and stopped."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    for name in ("tmp", "work", "home"):
        (folder / name).mkdir()
    key = folder / "audit.key"
    key.write_bytes(secrets.token_bytes(32))
    settings = {
        "DERMLENS_MODEL_STORE": str(told_store),
        "DERMLENS_PORT": str(port),
        "DERMLENS_LOG_LEVEL": "debug",
        "DERMLENS_MAX_UPLOAD_BYTES": str(MAX_UPLOAD),
        "DERMLENS_AUDIT_LOG": str(folder / "audit.log"),
        "DERMLENS_AUDIT_KEY_FILE": str(key),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(folder / "tmp"),
        "HOME": str(folder / "home"),
    }
    shared = set(Path("/dev/shm").iterdir())  # noqa: S108 - to look at, not to write
    read, write = os.pipe()
    calls = "trace=openat,openat2,open,creat,memfd_create,mknodat"
    # -D keeps the server our child; its trace ends when it ends
    watched = [strace, "-D", "-f", "-qq", "-s", "300", "-e", calls, "-o", f"/dev/fd/{write}"] if strace else []
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(
            [*watched, sys.executable, "-m", "app.cli", "serve"],
            cwd=folder / "work",
            env=os.environ | settings,
            stdout=out,
            stderr=err,
            pass_fds=[write],
        )
    os.close(write)
    opened: list[str] = []
    with os.fdopen(read, errors="replace") as trace:
        reader = threading.Thread(target=lambda: opened.extend(trace))
        reader.start()
        try:
            await_ready(process, port, folder)
            answered = send_everything(port)
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
            reader.join()
    return Run(folder, sorted(set(Path("/dev/shm").iterdir()) - shared), opened, answered)  # noqa: S108


def await_ready(process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
    while process.poll() is None:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError((folder / "stderr").read_text())


def send_everything(port: int) -> dict[str, int]:
    """Every route and every way to fail that we know, with the marker wherever a request has room for it."""
    words = {
        "x-patient": MARKER,
        "user-agent": MARKER,
        "referer": f"https://hospital.example/{MARKER}",
        "cookie": f"name={MARKER}",
        "authorization": f"Bearer {MARKER}",
        "x-request-id": f"not valid {MARKER}",
    }
    answered: dict[str, int] = {}
    png, jpeg = FILES["PNG"], FILES["JPEG"]

    def part(data: bytes, kind: str = "image/png") -> tuple[str, bytes, str, dict[str, str]]:
        return f"../{MARKER}.png", data, kind, {"X-Note": MARKER}

    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=words, timeout=60) as client:

        def send(name: str, method: str, path: str, **more: Any) -> None:
            query = {"patient": MARKER} | more.pop("params", {})
            answered[name] = client.request(method, path, params=query, **more).status_code

        for path in ("/predict", "/explain"):
            send(f"{path} multipart", "POST", path, files={"file": part(png)}, data={"patient": MARKER})
            send(f"{path} raw", "POST", path, content=jpeg, headers={"content-type": f"image/jpeg; name={MARKER}"})
            send(f"{path} cut", "POST", path, content=jpeg[:-90_000], headers={"content-type": "image/jpeg"})
            send(f"{path} cut PNG", "POST", path, files={"file": part(png[:-90_000])})
            send(f"{path} TIFF", "POST", path, files={"file": part(FILES["TIFF"], "image/tiff")})
            send(f"{path} words", "POST", path, content=MARKER.encode() * 50)
            send(f"{path} type", "POST", path, content=jpeg, headers={"content-type": f"application/{MARKER}"})
            send(f"{path} too large", "POST", path, content=jpeg + jpeg * (MAX_UPLOAD // len(jpeg)))
            send(f"{path} no file", "POST", path, files={MARKER: part(png)})
            send(f"{path} point", "POST", path, content=jpeg, params={"operating_point": MARKER})
            send(f"{path} time", "POST", path, content=jpeg, headers={"x-timeout-ms": MARKER})
            send(f"{path} known", "POST", path, content=jpeg, params=KNOWN)
            send(f"{path} age", "POST", path, content=jpeg, params=KNOWN | {"age": "-" + KNOWN["age"]})
            send(f"{path} site", "POST", path, content=jpeg, params=KNOWN | {"site": MARKER})
            send(f"{path} late", "POST", path, content=jpeg, headers={"x-timeout-ms": "1"})
            for name, head in (
                ("boundary", "multipart/form-data"),
                ("encoding", "multipart/form-data; boundary=b"),
            ):
                head_of_part = f'Content-Disposition: form-data; name="file"; filename="{MARKER}"\r\n'
                odd = (
                    f"--b\r\n{head_of_part}Content-Transfer-Encoding: {MARKER}\r\n\r\n".encode()
                    + png
                    + b"\r\n--b--\r\n"
                )
                send(f"{path} {name}", "POST", path, content=odd, headers={"content-type": head})
            broken = b"--b\r\n" + MARKER.encode() + b"\x01(: \r\n\r\n" + png
            send(
                f"{path} broken",
                "POST",
                path,
                content=broken,
                headers={"content-type": "multipart/form-data; boundary=b"},
            )
        send("/explain json", "POST", "/explain", content=jpeg, headers={"accept": "application/json"})
        send("/explain target", "POST", "/explain", content=jpeg, params={"target": MARKER})
        several = [("files", part(png)), ("files", part(jpeg)), ("files", part(png[:-90_000])), ("files", part(b"x"))]
        send("/predict/batch", "POST", "/predict/batch", files=several)
        send("/predict/batch too large", "POST", "/predict/batch", files=[("files", part(jpeg * 9))])
        for path in ("/", "/models", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", f"/{MARKER}", "/v2"):
            send(f"GET {path}", "GET", path)
        send("no such method", "PUT", "/predict", content=jpeg)
        send("no such model", "POST", f"/v2/models/{MARKER}/infer", content=jpeg)
        send("no such version", "POST", f"/models/{MARKER}/promote")
    leave_early(port)
    for raw in (
        f"GET /{MARKER} {MARKER}\r\n\r\n",
        f"{MARKER} / HTTP/1.1\r\nHost: x\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nBad Header {MARKER}: x\r\n\r\n",
        f"GET /{MARKER}?{MARKER} HTTP/1.1\r\nHost: x\r\nX-Long: {MARKER * 5000}\r\n\r\n",
        f"GET /?p={MARKER} HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, suppress(ConnectionError):
            connection.sendall(raw.encode())
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
    return answered


def leave_early(port: int) -> None:
    """Clients that break off in the middle of a body, and right after it."""
    png = FILES["PNG"]
    part = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{MARKER}"\r\n\r\n'.encode() + png
    for kind, body in (("image/png", png), ("multipart/form-data; boundary=b", part)):
        head = f"POST /predict?p={MARKER} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        for sent in (len(body) // 2, len(body)):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(head.encode() + body[:sent])


def test_the_marked_image_was_seen_and_refused_in_every_way(run: Run) -> None:
    for request in ("/predict multipart", "/predict raw", "/explain multipart", "/explain raw", "/explain json"):
        assert run.answered[request] == 200, request
    assert run.answered["/predict/batch"] == 200
    assert {status for status in run.answered.values() if status >= 500} <= {504}  # the late ones
    assert set(run.answered.values()) >= {200, 400, 404, 405, 413, 415, 422}


def test_nothing_of_the_patient_is_in_what_the_server_left(run: Run) -> None:
    left = [path for path in (*run.folder.rglob("*"), *run.shared_memory) if path.is_file()]
    assert (run.folder / "stderr").stat().st_size > 0
    leaks = {}
    for path in left:
        if leak := found_in(path.read_bytes()) or found_in(os.fsencode(path)):
            leaks[path.name] = leak
    assert not leaks


def test_no_age_sex_or_site_is_in_what_the_server_left(run: Run) -> None:
    assert [run.answered[f"{path} known"] for path in ("/predict", "/explain")] == [200, 200]
    assert {run.answered[f"/predict {field}"] for field in ("age", "site")} == {422}
    records = [json.loads(line) for line in (run.folder / "audit.log").read_text().splitlines()]
    assert ["age", "sex", "site"] in [record.get("metadata") for record in records]
    for path in run.folder.rglob("*"):
        for view in views(path.read_bytes()) if path.is_file() else ():
            assert not [value for value in KNOWN.values() if value.encode() in view], path.name


@pytest.mark.skipif(strace is None, reason="strace is not installed")
def test_the_server_opened_no_file_to_write_but_its_audit_log(run: Run) -> None:
    writing = [line for line in run.opened if re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TMPFILE|memfd|creat\(|mknod", line)]
    assert run.opened
    known = rf'"/dev/(null|tty|fd/\d+)"|"{re.escape(str(run.folder))}/audit\.log(\.head)?"|= -1 '
    assert [line for line in writing if not re.search(known, line)] == []
