"""Bodies as no honest client sends them, read from a real request."""

import asyncio
import tracemalloc
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from app.upload import BodyTooLarge, BodyTooSlow, MalformedUpload, UnsupportedBody, read_image, read_images

FORM = "multipart/form-data; boundary=cut"
HEAD = b'--cut\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
END = b"\r\n--cut--\r\n"
STALL, LEAVE = b"stall", b"leave"  # in place of a chunk: the client sends nothing more, or goes


def request(*chunks: bytes, kind: str = FORM, **headers: str) -> Request:
    """A request whose body comes in these chunks."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        chunk = left.pop(0) if left else b""
        if chunk is STALL:
            await asyncio.Event().wait()
        if chunk is LEAVE:
            return {"type": "http.disconnect"}
        fresh = bytes(bytearray(chunk))  # as a server would, not one object many times
        return {"type": "http.request", "body": fresh, "more_body": bool(left)}

    named = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def one(of: Request, *, max_bytes: int = 1_000_000, read_timeout_s: float = 20) -> bytes:
    return asyncio.run(read_image(of, max_bytes=max_bytes, read_timeout_s=read_timeout_s))


def many(of: Request, **limits: int) -> list[bytes]:
    limits = {"max_bytes": 1_000_000, "max_files": 4, "max_total_bytes": 3_000_000} | limits
    return asyncio.run(read_images(of, field="file", read_timeout_s=20, **limits))


def peak(reading: Coroutine[Any, Any, object]) -> int:
    """The most bytes held at once while reading."""
    tracemalloc.start()
    try:
        asyncio.run(reading)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def part(disposition: str = 'form-data; name="file"; filename="a"', body: bytes = b"image", more: str = "") -> bytes:
    return f"--cut\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode("latin-1") + body + b"\r\n"


def test_the_raw_body_and_the_form_hold_the_same_image() -> None:
    assert one(request(b"im", b"age", kind="image/jpeg")) == b"image"
    assert one(request(HEAD + b"im", b"age" + END)) == b"image"
    assert one(request(*(bytes([byte]) for byte in HEAD + b"\r\n--cu\r\r\n--cux" + END))) == b"\r\n--cu\r\r\n--cux"
    assert many(request(part(body=b"1") + part(body=b"2") + b"--cut--")) == [b"1", b"2"]


@pytest.mark.parametrize("kind", ["image/jpeg", FORM])
def test_a_body_that_stalls_is_given_up(kind: str) -> None:
    with pytest.raises(BodyTooSlow, match=r"not complete after 0\.05 seconds"):
        one(request(HEAD, b"im", STALL, kind=kind), read_timeout_s=0.05)


@pytest.mark.parametrize("kind", ["image/jpeg", FORM])
def test_a_client_that_leaves_in_the_middle_is_no_failure_of_ours(kind: str) -> None:
    with pytest.raises(ClientDisconnect):
        one(request(HEAD, b"im", LEAVE, kind=kind, content_length="1000"))


@pytest.mark.parametrize("kind", ["image/jpeg", FORM])
def test_an_announced_length_over_the_limit_is_refused_before_the_first_byte(kind: str) -> None:
    for length in ("1003000", "9" * 19, "9" * 5000):
        with pytest.raises(BodyTooLarge):
            one(request(STALL, kind=kind, content_length=length))


def test_a_batch_is_bounded_as_a_whole() -> None:
    parts = [part(body=bytes(900_000)) for _ in range(4)]
    assert len(many(request(*parts, b"--cut--"), max_total_bytes=4_000_000)) == 4
    with pytest.raises(BodyTooLarge, match="3000000 bytes"):
        many(request(*parts, STALL))
    with pytest.raises(BodyTooLarge, match="4008000 bytes"):  # four files of a million are no reason to read on
        many(request(*parts, *parts, STALL), max_total_bytes=40_000_000)


def test_one_file_over_the_limit_is_refused_where_the_batch_has_room() -> None:
    with pytest.raises(BodyTooLarge, match="1000000 bytes"):
        many(request(part() + part(body=bytes(1_000_001)) + b"--cut--"))


def test_a_batch_is_never_in_memory_twice() -> None:
    parts = [part(body=bytes(900_000)) for _ in range(10)]
    limits = {"max_bytes": 1_000_000, "max_files": 10, "max_total_bytes": 10_000_000}
    assert peak(read_images(request(*parts, b"--cut--"), field="file", read_timeout_s=20, **limits)) < 13_000_000


@pytest.mark.parametrize("kind", ["image/jpeg", FORM])
def test_tiny_chunks_cost_no_more_than_their_bytes(kind: str) -> None:
    body = [b"ab"] * 30_000
    chunks = [HEAD, *body, END] if kind == FORM else body
    assert peak(read_image(request(*chunks, kind=kind), max_bytes=1_000_000, read_timeout_s=20)) < 600_000


@pytest.mark.parametrize(
    "body",
    [
        part() * 5 + b"--cut--",  # more files than allowed
        part('form-data; name="note"') * 5_000,
        part('form-data; name="note"', bytes(1_100_000)),
        part(more="".join(f"X-{n}: 1\r\n" for n in range(5_000))),
        part(more=f"X: {'a' * 100_000}\r\n"),
        part(more=f"{'a' * 100_000}: 1\r\n"),
        part(f'form-data; name="file"; filename="{"a" * 100_000}"'),
        part(more="no colon\r\n"),
        part('form-data; filename="a"'),  # no name
        part("form-data"),
        part(""),
        b"--cut\r\n\r\nimage\r\n--cut--",  # no headers
        part('form-data; name="other"; filename="a"') + b"--cut--",
        part('form-data; name="file"') + b"--cut--",  # a text, not a file
        part(),  # no final boundary
        part() + HEAD + b"cut off",  # one file is whole, and the answer would say nothing of the other
        HEAD + b"image",
        HEAD[:40],
        b"",
        b"--cut--\r\n",
        b"a preamble\r\n" + part() + b"--cut--",
        b"\r\n" * 500_000,
        b"\x00" * 500_000,
        part().replace(b"\r\n", b"\n") + b"--cut--",
    ],
    ids=lambda body: repr(body[:70]),
)
def test_a_form_that_makes_no_sense_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedUpload):
        many(request(body))


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\r\nan epilogue" * 50_000])
def test_what_follows_the_final_boundary_is_not_part_of_the_image(end: bytes) -> None:
    assert many(request(part() + b"--cut--", end)) == [b"image"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", r"C:\a\b.jpg", "a\0b", "\x7f\x1b[2J", "", "é" * 500, "a;b=c", "%0d%0aX: 1", '\\"x']
)
def test_a_file_name_changes_nothing(name: str) -> None:
    assert many(request(part(f'form-data; name="file"; filename="{name}"') + b"--cut--")) == [b"image"]


def test_odd_part_headers_change_nothing() -> None:
    more = "Content-Transfer-Encoding: base64\r\nContent-Type: text/html; charset=undefined\r\n"
    more += 'Content-Disposition: form-data; name="file"; filename="b"\r\n'
    assert many(request(part('form-data; name="other"; filename="a"', more=more) + b"--cut--")) == [b"image"]


def test_a_form_within_a_form_is_one_file() -> None:
    inner = part().replace(b"--cut", b"--inner") + b"--inner--"
    assert many(request(part(body=inner, more="Content-Type: multipart/mixed; boundary=inner\r\n") + b"--cut--")) == [
        inner
    ]


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", '; boundary=""', "; boundary=" + "a" * 10_000, "; boundary=other"]
)
def test_a_boundary_that_is_missing_or_not_the_bodys_is_malformed(boundary: str) -> None:
    with pytest.raises(MalformedUpload):
        many(request(part() + b"--cut--", kind="multipart/form-data" + boundary))


@pytest.mark.parametrize("boundary", ['"cut"', "cut; x=y", 'cut; x=";"'])
def test_a_boundary_may_be_quoted_or_stand_among_others(boundary: str) -> None:
    assert many(request(part() + b"--cut--", kind=f"multipart/form-data; boundary={boundary}")) == [b"image"]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "utf-7", "hex", "\xe9", "a" * 10_000, "../x"])
def test_only_usual_charsets_are_served(charset: str) -> None:
    with pytest.raises(UnsupportedBody):
        many(request(part('form-data; name="file"') + b"--cut--", kind=f"{FORM}; charset={charset}"))


def test_the_usual_charsets_are_served() -> None:
    for charset in ("utf-8", "UTF-8", '"us-ascii"', "ISO-8859-1"):
        assert many(request(part() + b"--cut--", kind=f"{FORM}; charset={charset}")) == [b"image"]


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/mixed; boundary=cut", "multipart/form-dataX; boundary=cut", "\xff"]
)
def test_other_content_types_are_unsupported(kind: str) -> None:
    with pytest.raises(UnsupportedBody):
        one(request(part() + b"--cut--", kind=kind))
    with pytest.raises(UnsupportedBody):
        many(request(part() + b"--cut--", kind=kind))


@pytest.mark.parametrize("unit", [b"\r", b"\r\n", b"\r\n-", b"\r\n--cu", b"\r\n--cutX", b"\r\n--cut\r", b"\r\n--cut-x"])
def test_bytes_that_almost_end_the_image_belong_to_it(unit: bytes) -> None:
    """A parser that goes back for each of them would not be done within the test's timeout."""
    image = unit * (1_000_000 // len(unit))
    body = HEAD + image + END
    assert one(request(*(body[at : at + 100_000] for at in range(0, len(body), 100_000)))) == image
