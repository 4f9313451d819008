"""Coverage-guided fuzzing of what strangers send: images, multipart bodies and requests of the V2 protocol.

make fuzz                                              an hour, shared by the targets
python tests/fuzz/fuzz.py decode -max_total_time=60    after the target, options of libFuzzer

Begins from tests/fuzz/corpus/TARGET and drawn images, and keeps what it finds in .fuzz/TARGET for the next run. An
input that raises what it must not, hangs or takes too much memory is written to .fuzz/ and ends the run with an error.
"""

import asyncio
import base64
import io
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["app", "PIL", "starlette", "python_multipart"], enable_loader_override=False):
    from PIL import Image
    from starlette.requests import Request

    from app.model.preprocess import ImageError, decode
    from app.tensors import parse
    from app.upload import BodyTooLarge, MalformedUpload, UnsupportedBody, read_image, read_images

from training.drawn import draw_lesion

HERE = Path(__file__).parent
KEPT = Path(".fuzz")
LIMITS = ["-timeout=10", "-rss_limit_mb=3000", "-max_len=60000"]
BOUNDARY = b"multipart/form-data; boundary=x"


def fuzz_decode(data: bytes) -> None:
    """Any bytes are an image of the right shape, or an `ImageError`."""
    try:
        image = decode(data, size=32, max_pixels=1_000_000, crop_frame=True, preview_side=64 * (len(data) % 2))
    except ImageError:
        return
    assert image.pixels.shape == (3, 32, 32)
    assert image.preview.mode == "RGB"


def fuzz_multipart(data: bytes) -> None:
    """Any body under any boundary is files within the limits, or an upload error."""
    provider = atheris.FuzzedDataProvider(data)
    one = provider.ConsumeBool()
    kind = BOUNDARY if provider.ConsumeBool() else provider.ConsumeBytes(80)
    cut = provider.ConsumeIntInRange(1, 4000)
    body = provider.ConsumeBytes(provider.remaining_bytes())
    chunks = [body[start : start + cut] for start in range(0, len(body), cut)] or [b""]

    async def receive() -> dict[str, object]:
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    request = Request({"type": "http", "method": "POST", "headers": [(b"content-type", kind)]}, receive)
    try:
        if one:
            files = [asyncio.run(read_image(request, max_bytes=2000, read_timeout_s=20))]
        else:
            reading = read_images(
                request, field="files", max_bytes=2000, max_files=3, max_total_bytes=5000, read_timeout_s=20
            )
            files = asyncio.run(reading)
    except (BodyTooLarge, UnsupportedBody, MalformedUpload):
        return
    assert all(len(file) <= 2000 for file in files)
    assert len(files) <= 3


def fuzz_v2(data: bytes) -> None:
    """Any body, whatever it says of its lengths, is images within the limits, or an upload error."""
    provider = atheris.FuzzedDataProvider(data)
    if provider.ConsumeBool():
        length = provider.ConsumeIntInRange(0, 4000) if provider.ConsumeBool() else None
        body = provider.ConsumeBytes(provider.remaining_bytes())
    else:
        text = _nearly_right(provider)
        length = len(text) + provider.ConsumeIntInRange(-2, 2) if provider.ConsumeBool() else None
        body = text + provider.ConsumeBytes(provider.remaining_bytes())
    try:
        asked = parse(body, length, max_files=3, max_bytes=2000)
    except (BodyTooLarge, MalformedUpload):
        return
    assert 1 <= len(asked.images) <= 3
    assert all(type(image) is bytes and len(image) <= 2000 for image in asked.images)


def _nearly_right(provider: "atheris.FuzzedDataProvider") -> bytes:
    """The JSON of a V2 request: the fuzzer does not see into pydantic's parser, and finds none by itself."""
    count = provider.ConsumeIntInRange(-1, 4)
    tensor: dict[str, object] = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [count, 1] if provider.ConsumeBool() else [count],
    }
    if provider.ConsumeBool():
        encoded = [base64.b64encode(provider.ConsumeBytes(8)).decode() for _ in range(provider.ConsumeIntInRange(0, 4))]
        tensor["data"] = encoded if provider.ConsumeBool() else [[text] for text in encoded]
    if provider.ConsumeBool():
        tensor["parameters"] = {"binary_data_size": provider.ConsumeIntInRange(-1, 2100)}
    return json.dumps({"id": provider.ConsumeUnicode(5), "inputs": [tensor]}).encode()


def seeds(target: str) -> list[bytes]:
    """Small valid inputs, drawn."""
    image = draw_lesion(1, 1, size=(24, 20))
    found = []
    for kind, options in (
        ("JPEG", {"exif": _turned()}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True, "exif": _turned()}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        found.append(buffer.getvalue())
    for mode in ("P", "L", "LA", "1", "RGBA", "I;16"):
        buffer = io.BytesIO()
        (image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    if target == "decode":
        return found
    if target == "v2":
        tensor = b'{"name":"image","datatype":"BYTES","shape":[2],%s}'
        text = b'{"id":"a","inputs":[' + tensor + b'],"outputs":[{"name":"cam","parameters":{"binary_data":true}}]}'
        whole = text % b'"data":["AAAA",["/+8="]]'
        head = text % b'"parameters":{"binary_data_size":12}'
        binary = b"\x03\x00\x00\x00abc\x01\x00\x00\x00d"
        # The provider takes a number from the end
        return [b"\x01\x00" + whole, b"\x01\x01" + head + binary + len(head).to_bytes(2, "little")]
    head = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\nContent-Type: image/png\r\n\r\n'
    return [b"\x01\x01\xff\xff" + head % field + b"pixels\r\n--x--\r\n" for field in (b"file", b"files")]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


TARGETS: dict[str, Callable[[bytes], None]] = {"decode": fuzz_decode, "multipart": fuzz_multipart, "v2": fuzz_v2}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"fuzz: give a target: {', '.join(TARGETS)}")
    target, options = sys.argv[1], sys.argv[2:]
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # as the server has it
    kept = KEPT / target
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (kept / f"seed-{number}").write_bytes(seed)
    folders = [str(kept), str(HERE / "corpus" / target)]
    artefacts = f"-artifact_prefix={KEPT}/{target}-"
    corpus = [folder for folder in folders if Path(folder).is_dir()]
    atheris.Setup([sys.argv[0], *LIMITS, artefacts, *options, *corpus], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
