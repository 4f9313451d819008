"""Routes of the Open Inference Protocol V2, as KServe and Triton have them; what they carry is in `app.tensors`."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Header, Path, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import BaseModel, WithJsonSchema

from app import logs
from app.api import IMAGE, PROBLEMS, REFUSALS
from app.model.labels import NOTICE, OFF, check_choices
from app.model.manifest import Identifier
from app.model.preprocess import ImageError
from app.security import KeyRing, guard
from app.served import Running, VersionMissing
from app.service import Answer, Rule, Service
from app.tensors import (
    DATATYPES,
    InferParameters,
    InferResponse,
    OutputName,
    Tensor,
    parse,
    request_schema,
    respond,
)
from app.upload import UnsupportedBody, read_body, while_connected

CAM_STRIDE = 16  # pixels of the input per cell of the map: conv4 of the network
MODEL_PATH = "/v2/models/{name}"


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    ready: bool


class ModelReady(Ready):
    name: str


class Failure(BaseModel):
    error: str


def describe(running: Running) -> ModelMetadata:
    """The tensors of a version; -1 is the number of images."""
    manifest = running.manifest
    classes, side = len(manifest.classes), math.ceil(manifest.preprocessing.size / CAM_STRIDE)
    shapes = {"logits": [-1, classes], "probabilities": [-1, classes], "cam": [-1, classes, side, side]}
    return ModelMetadata(
        name=manifest.name,
        versions=[manifest.version],
        platform=running.engine.name,
        inputs=[Tensor(name="image", datatype="BYTES", shape=[-1])],
        outputs=[Tensor(name=name, datatype=kind, shape=shapes.get(name, [-1])) for name, kind in DATATYPES.items()],
    )


def _errors(statuses: Iterable[int | str]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure, "description": "What is wrong."} for status in statuses}


async def see_all(service: Service, request: Request, images: list[bytes], rule: Rule) -> list[Answer]:
    """All images, or the error of the first that fails: the others are given up."""

    async def see(index: int, data: bytes) -> Answer:
        try:
            return await service.see(request, data, rule)
        except ImageError as error:
            raise type(error)(f"image {index}: {error}") from error

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(see(index, data)) for index, data in enumerate(images)]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


def make_rule(service: Service, asked: InferParameters, running: Running) -> Rule:
    """What the request's parameters ask for, else what the server was set to; raises UnknownChoice."""
    check_choices(running.manifest, operating_point=asked.operating_point, coverage=asked.coverage)
    return Rule(
        running,
        asked.operating_point or service.operating_point,
        asked.coverage or service.coverage,
        min(service.timeout_ms / 1000, asked.timeout / 1e6 if asked.timeout else math.inf),
        background=asked.priority == 2,
        tta=asked.tta,
    )


def outputs(answers: list[Answer]) -> dict[OutputName, NDArray[Any]]:
    """Every output of the model for N images, by its name."""
    judgements = [answer.judgement for answer in answers]
    return {
        "logits": np.stack([answer.result.logits for answer in answers]).astype("<f4"),
        "probabilities": np.array([list(judgement.probabilities.values()) for judgement in judgements], dtype="<f4"),
        "label": np.array([judgement.label for judgement in judgements]),
        "refer": np.array([judgement.refer for judgement in judgements]),
        "refer_because": np.array([",".join(judgement.refer_because) for judgement in judgements]),
        "cam": np.stack([answer.result.cam for answer in answers]).astype("<f4"),
    }


def name_operation(route: APIRoute) -> str:
    """What generated clients call a route: `v2_infer`, and `v2_infer_version` of one version."""
    return f"v2_{route.name}{'_version' if '{version}' in route.path else ''}"


def build_router(service: Service, keys: KeyRing | None = None) -> APIRouter:
    """The routes of the protocol; with `keys` each but health asks for a key of scope `predict`."""
    router = APIRouter(tags=["open inference protocol"], generate_unique_id_function=name_operation)
    may_predict = guard(keys, "predict")
    served_name = service.served.now.manifest.name
    content = {
        "application/json": {"schema": request_schema()},
        "application/octet-stream": {"schema": IMAGE},
    }
    answer_content = {"model": InferResponse, "content": {"application/octet-stream": {"schema": IMAGE}}}

    async def any_version(
        name: Annotated[Identifier, Path(json_schema_extra={"enum": [served_name]})],
    ) -> AsyncIterator[Running]:
        with service.served.use() as running:
            if name != running.manifest.name:
                raise VersionMissing(f"there is no model {name}: {running.manifest.name} is served")
            yield running

    async def one_version(version: Identifier, running: Annotated[Running, Depends(any_version)]) -> Running:
        if version != running.manifest.version:
            raise VersionMissing(f"version {version} is not served: {running.manifest.version} is")
        return running

    @router.get("/v2/health/live")
    async def live() -> Live:
        """200 while the process answers at all."""
        return Live(live=True)

    @router.get("/v2/health/ready", responses=_errors([503]), response_model=Ready)
    async def ready() -> Ready | JSONResponse:
        """200 when the model is loaded, warm and taking work; else 503 with the reason."""
        if reason := await service.unready():
            return JSONResponse({"error": reason}, 503)
        return Ready(ready=True)

    @router.get("/v2", dependencies=may_predict, responses=_errors(REFUSALS))
    async def server(request: Request) -> ServerMetadata:
        """The server and its extensions of the protocol."""
        return ServerMetadata(name="dermlens", version=request.app.version, extensions=["binary_tensor_data"])

    def add_model(path: str, find: Any) -> None:
        @router.get(f"{path}/ready", responses=_errors([404, 422, 503]), response_model=ModelReady)
        async def model_ready(running: Annotated[Running, Depends(find)]) -> ModelReady | JSONResponse:
            """200 when this version takes work; only the served one does."""
            if reason := await service.unready():
                return JSONResponse({"error": reason}, 503)
            return ModelReady(name=running.manifest.name, ready=True)

        @router.get(path, dependencies=may_predict, responses=_errors([*REFUSALS, 404, 422]))
        async def metadata(running: Annotated[Running, Depends(find)]) -> ModelMetadata:
            """The tensors that the model takes and gives."""
            return describe(running)

        @router.post(
            f"{path}/infer",
            dependencies=may_predict,
            openapi_extra={"requestBody": {"required": True, "content": content}},
            responses=_errors(PROBLEMS) | {200: answer_content},
        )
        async def infer(
            request: Request,
            running: Annotated[Running, Depends(find)],
            inference_header_content_length: Annotated[
                int | None,
                Header(ge=0, description="Bytes of the JSON, where images come after it."),
                WithJsonSchema({"type": "integer", "minimum": 0}),  # no header is null
            ] = None,
        ) -> Response:
            """Classify images; one that is bad, named in the answer, refuses them all."""
            running.batcher.refuse_if_full(timeout_s=service.timeout_ms / 1000)
            if request.headers.get("content-encoding", "identity") != "identity":
                raise UnsupportedBody("compressed bodies are not served: images are compressed already")
            reading = read_body(request, max_bytes=service.max_batch_bytes, read_timeout_s=service.read_timeout_s)
            asked = parse(
                await service.timed("read", reading),
                inference_header_content_length,
                max_files=service.max_batch_files,
                max_bytes=service.max_upload_bytes,
            )
            logs.note(bytes_in=sum(map(len, asked.images)), model_version=running.manifest.version)
            rule = make_rule(service, asked.request.parameters, running)
            with rule.admit(len(asked.images)):
                answers = await while_connected(request, see_all(service, request, asked.images, rule))
            judgement = answers[0].judgement
            answer = respond(
                asked.request,
                outputs(answers),
                model=running.manifest.name,
                version=running.manifest.version,
                parameters={
                    "notice": NOTICE,
                    "operating_point": judgement.operating_point,
                    "coverage": judgement.coverage or OFF,
                },
            )
            answer.headers["X-Model-Version"] = running.manifest.version
            return answer

    add_model(MODEL_PATH, any_version)
    add_model(MODEL_PATH + "/versions/{version}", one_version)
    return router
