"""Requests and answers of the Open Inference Protocol V2 as bytes: JSON, and Triton's binary tensor data after it.

After github.com/kserve/open-inference-protocol and the binary data extension of github.com/triton-inference-server.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from starlette.responses import Response

from app.model.flips import Tta
from app.upload import BodyTooLarge, MalformedUpload

OutputName = Literal["logits", "probabilities", "label", "refer", "refer_because", "cam"]
# Maps are asked for by name
DEFAULT: tuple[OutputName, ...] = ("logits", "probabilities", "label", "refer", "refer_because")
DATATYPES: Mapping[OutputName, str] = {
    "logits": "FP32",
    "probabilities": "FP32",
    "label": "BYTES",
    "refer": "BOOL",
    "refer_because": "BYTES",
    "cam": "FP32",
}
JSON_MARKS = b",[{"  # each value of a JSON text but the first comes after one of them
HEADER_LENGTH = "Inference-Header-Content-Length"

Base64 = Annotated[bytes, WithJsonSchema({"type": "string", "format": "byte"})]
Element = Annotated[
    Base64 | Annotated[list[Base64], Field(min_length=1, max_length=1)], Field(union_mode="left_to_right")
]


class _Part(BaseModel):
    """Part of a request; a member that it does not name is passed over, as the protocol has it."""

    model_config = ConfigDict(strict=True, val_json_bytes="base64")


class _Parameters(_Part):
    """What cannot be honoured is refused: an answer must not look as if it had been."""

    model_config = ConfigDict(extra="forbid")


class ImageParameters(_Part):
    binary_data_size: int = Field(0, ge=0, description="Bytes after the JSON, where the images are there.")


class ImageTensor(_Part):
    name: Literal["image"]
    datatype: Literal["BYTES"]
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=2, description="[N] or [N, 1].")
    data: list[Element] = Field([], description="Image files in base64; empty where they come after the JSON.")
    parameters: ImageParameters = ImageParameters()


class OutputParameters(_Parameters):
    binary_data: bool | None = Field(None, description="After the JSON; by default as `binary_data_output` says.")


class OutputTensor(_Part):
    name: OutputName
    parameters: OutputParameters = OutputParameters()


class InferParameters(_Parameters):
    operating_point: str | None = Field(None, description="Where the decision's threshold lies.")
    coverage: str | None = Field(None, description="Of the abstention rule; `off` forms no set.")
    tta: Tta = Field("none", description="`flips`: the mean over the image and its three mirror images.")
    timeout: int = Field(0, ge=0, lt=2**63, description="Microseconds until a 504; 0 for the server's own limit.")
    priority: int = Field(0, ge=0, le=2, description="2 lets every image of priority 1 go first; 0 is 1.")
    binary_data_output: bool = Field(False, description="Outputs come after the JSON.")


class InferRequest(_Part):
    id: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="Given back in the answer.")
    inputs: list[ImageTensor] = Field(min_length=1, max_length=1)
    outputs: list[OutputTensor] = Field([], max_length=len(DATATYPES), description="By default all but `cam`.")
    parameters: InferParameters = InferParameters()


class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]


class AnswerTensor(Tensor):
    data: list[Any] | None = Field(None, description="In row-major order, flat; absent where it comes after the JSON.")
    parameters: dict[str, int] | None = None


class InferResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, str]
    outputs: list[AnswerTensor]


@dataclass(frozen=True)
class Asked:
    """A request and the image files in it."""

    request: InferRequest
    images: list[bytes]


def parse(body: bytes, header_length: int | None, *, max_files: int, max_bytes: int) -> Asked:
    """An inference request of 1 to `max_files` images, each of `max_bytes` at most.

    Args:
        header_length: bytes of the JSON text, where images come after it; None where all is JSON.

    Raises:
        MalformedUpload, BodyTooLarge.
    """
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise MalformedUpload(f"{HEADER_LENGTH} is more than the body has")
    text, rest = body[:end], memoryview(body)[end:]
    if sum(map(text.count, JSON_MARKS)) > 1000 + 3 * max_files:  # a hundred million empty lists fit into a body
        raise MalformedUpload("the body is not JSON, or holds more values than a request can have")
    try:
        request = InferRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise MalformedUpload(f"{where or 'body'}: {first['msg']}"[:300]) from None
    [tensor] = request.inputs
    count = tensor.shape[0]
    if tensor.shape[1:] not in ([], [1]) or count > max_files:
        raise MalformedUpload(f"inputs.0.shape: give [N] or [N, 1] with N from 1 to {max_files}")
    if len(rest) != tensor.parameters.binary_data_size:
        raise MalformedUpload(f"{len(rest)} bytes come after the JSON, where binary_data_size says otherwise")
    if len(rest) and tensor.data:
        raise MalformedUpload("give images in `data` or after the JSON, not both")
    images = _split(rest, count) if len(rest) else [e if isinstance(e, bytes) else e[0] for e in tensor.data]
    if len(images) != count:
        raise MalformedUpload(f"{len(images)} images are given, where the shape says otherwise")
    for index, image in enumerate(images):
        if len(image) > max_bytes:
            raise BodyTooLarge(f"image {index} is over the limit of {max_bytes} bytes: scale it down")
    return Asked(request, images)


def _split(binary: memoryview, count: int) -> list[bytes]:
    """The elements of a BYTES tensor, each behind its length in four bytes."""
    elements: list[bytes] = []
    at = 0
    for index in range(count):
        start = at + 4
        at = start + int.from_bytes(binary[at:start], "little")
        if at > len(binary):
            raise MalformedUpload(f"image {index} ends after the binary data")
        elements.append(bytes(binary[start:at]))
    if at != len(binary):
        raise MalformedUpload("binary data is left after the last image")
    return elements


def respond(
    asked: InferRequest,
    arrays: Mapping[OutputName, NDArray[Any]],
    *,
    model: str,
    version: str,
    parameters: dict[str, str],
) -> Response:
    """The outputs that were asked for, each in JSON or after it.

    Args:
        arrays: FP32 as float32[N,...] in little-endian order, BYTES as str[N], BOOL as bool[N].
    """
    tensors, binary = [], b""
    for output in asked.outputs or [OutputTensor(name=name) for name in DEFAULT]:
        array, datatype = arrays[output.name], DATATYPES[output.name]
        tensor = AnswerTensor(name=output.name, datatype=datatype, shape=list(array.shape))
        as_binary = output.parameters.binary_data
        if as_binary is None:
            as_binary = asked.parameters.binary_data_output
        if as_binary:
            packed = _pack(array) if datatype == "BYTES" else array.tobytes()
            tensor.parameters = {"binary_data_size": len(packed)}
            binary += packed
        else:
            tensor.data = array.ravel().tolist()
        tensors.append(tensor)
    answer = InferResponse(
        model_name=model, model_version=version, id=asked.id or None, parameters=parameters, outputs=tensors
    )
    text = json.dumps(answer.model_dump(exclude_none=True), allow_nan=False).encode()
    if not binary:
        return Response(text, media_type="application/json")
    return Response(text + binary, media_type="application/octet-stream", headers={HEADER_LENGTH: str(len(text))})


def _pack(texts: NDArray[np.str_]) -> bytes:
    encoded = [text.encode() for text in texts.tolist()]
    return b"".join(len(element).to_bytes(4, "little") + element for element in encoded)


def request_schema() -> dict[str, Any]:
    """Of the JSON of a request, without references: FastAPI resolves none in what a route describes itself."""
    schema = InferRequest.model_json_schema()
    inlined: dict[str, Any] = _inline(schema, schema["$defs"])
    return inlined


def _inline(schema: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(part, definitions) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    return {key: _inline(part, definitions) for key, part in schema.items() if key != "$defs"}
