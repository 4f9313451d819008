"""The routes: /predict, /predict/batch, /explain, /models, /livez, /readyz, /metrics."""

import asyncio
import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.batcher import MicroBatcher, Result
from app.errors import KINDS, report
from app.metrics import Metrics
from app.model.labels import PREDICTED, Judgement, check_choices, judge
from app.model.manifest import Manifest
from app.model.overlay import Method, Overlay, Style, aim, render
from app.model.preprocess import PREVIEW_SIDE, DecodedImage, JpegDecoder, decode
from app.schemas import (
    BatchItem,
    Explanation,
    Health,
    ModelInfo,
    Models,
    Prediction,
    Problem,
    prediction_fields,
)
from app.upload import read_image, read_images, while_connected

T = TypeVar("T")
IMAGE = {"type": "string", "format": "binary"}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": "A problem, as application/problem+json."}
    for status in sorted({kind.status for kind in KINDS.values()})
}


class Attribute(Protocol):
    """`app.engines.base.Engine.attribute`."""

    def __call__(self, image: NDArray[np.uint8], method: Method, *, target: int) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Service:
    """What the routes need, built once in `main`."""

    batcher: MicroBatcher
    attribute: Attribute  # for `batcher.call` alone
    jpeg: JpegDecoder | None  # in place of Pillow
    manifest: Manifest
    metrics: Metrics
    list_models: Callable[[], list[ModelInfo]]
    workers: CapacityLimiter  # threads that decode and draw
    operating_point: str
    coverage: str
    max_upload_bytes: int
    max_pixels: int
    max_batch_files: int
    timeout_s: float


@dataclass(frozen=True)
class Rule:
    """How this request wants its probabilities judged, and how long it waits for them."""

    operating_point: str
    coverage: str
    timeout_s: float
    background: bool


@dataclass(frozen=True)
class Answer:
    """One image, seen and judged."""

    image: DecodedImage
    result: Result
    judgement: Judgement


def body(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI for a body that the route reads itself, to bound it."""
    content = {"multipart/form-data": {"schema": schema}}
    if "file" in schema["properties"]:
        content |= {f"image/{kind}": {"schema": IMAGE} for kind in ("jpeg", "png", "webp")}
    return {"requestBody": {"required": True, "content": content}}


ONE_IMAGE = body({"type": "object", "properties": {"file": IMAGE}, "required": ["file"]})
MANY_IMAGES = body(
    {"type": "object", "properties": {"files": {"type": "array", "items": IMAGE}}, "required": ["files"]}
)


def build_router(service: Service) -> APIRouter:  # noqa: PLR0915 - one closure a route
    """The routes over a service."""
    router = APIRouter()
    metrics = service.metrics
    model_headers = {"X-Model-Version": service.manifest.version}

    async def in_worker(stage: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        try:
            return await to_thread.run_sync(work, limiter=service.workers)
        finally:
            metrics.stage_seconds.labels(stage=stage).observe(time.perf_counter() - started)

    async def choose_rule(
        operating_point: Annotated[str | None, Query(description="In place of the server's default.")] = None,
        coverage: Annotated[
            str | None, Query(description="In place of the server's default; `off` never refers.")
        ] = None,
        x_timeout_ms: Annotated[
            int | None, Header(ge=1, description="Milliseconds until a 504, where the server's own limit is later.")
        ] = None,
        x_priority: Annotated[
            Literal["interactive", "batch"], Header(description="`batch` lets every interactive image go first.")
        ] = "interactive",
    ) -> Rule:
        check_choices(service.manifest, operating_point=operating_point, coverage=coverage)
        timeout_s = service.timeout_s if x_timeout_ms is None else min(service.timeout_s, x_timeout_ms / 1000)
        return Rule(
            operating_point or service.operating_point,
            coverage or service.coverage,
            timeout_s,
            background=x_priority == "batch",
        )

    chosen_rule = Depends(choose_rule)

    async def see(data: bytes, rule: Rule, *, preview_side: int = 0) -> Answer:
        """Decode, run and judge one image."""
        started = time.monotonic()
        size, manifest = service.manifest.preprocessing.size, service.manifest
        image = await in_worker(
            "decode",
            lambda: decode(
                data, size=size, max_pixels=service.max_pixels, preview_side=preview_side, jpeg=service.jpeg
            ),
        )
        left_s = rule.timeout_s - (time.monotonic() - started)
        result = await service.batcher.submit(image.pixels, timeout_s=left_s, background=rule.background)
        metrics.stage_seconds.labels(stage="queue").observe(result.queue_s)
        metrics.stage_seconds.labels(stage="forward").observe(result.forward_s)
        metrics.batch_size.observe(result.batch_size)
        judgement = judge(result.logits, manifest, rule.operating_point, coverage=rule.coverage)
        metrics.predictions.labels(label=judgement.label, version=manifest.version).inc()
        metrics.referred.labels(version=manifest.version).inc(judgement.refer)
        return Answer(image, result, judgement)

    async def read_one(request: Request) -> bytes:
        with metrics.stage_seconds.labels(stage="read").time():
            return await read_image(request, max_bytes=service.max_upload_bytes)

    def fields(answer: Answer, request: Request) -> dict[str, Any]:
        return prediction_fields(
            answer.judgement,
            answer.image,
            manifest=service.manifest,
            request_id=request.scope["request_id"],
        )

    @router.post("/predict", openapi_extra=ONE_IMAGE, responses=PROBLEMS, tags=["inference"])
    async def predict(request: Request, response: Response, rule: Annotated[Rule, chosen_rule]) -> Prediction:
        """Classify one dermoscopic image: multipart field `file`, or the image as the raw body."""
        response.headers.update(model_headers)
        data = await read_one(request)
        return Prediction(**fields(await while_connected(request, see(data, rule)), request))

    @router.post("/predict/batch", openapi_extra=MANY_IMAGES, responses=PROBLEMS, tags=["inference"])
    async def predict_batch(
        request: Request, response: Response, rule: Annotated[Rule, chosen_rule]
    ) -> list[BatchItem]:
        """Classify several images, multipart field `files`; a bad one fails alone and keeps its place."""
        response.headers.update(model_headers)
        with metrics.stage_seconds.labels(stage="read").time():
            files = await read_images(
                request, field="files", max_bytes=service.max_upload_bytes, max_files=service.max_batch_files
            )

        async def one(index: int, data: bytes) -> BatchItem:
            try:
                return BatchItem(index=index, prediction=Prediction(**fields(await see(data, rule), request)))
            except Exception as error:
                problem = report(error, request.scope["request_id"], metrics)
                return BatchItem(index=index, problem=problem)

        return list(
            await while_connected(request, asyncio.gather(*(one(index, data) for index, data in enumerate(files))))
        )

    @router.post(
        "/explain",
        openapi_extra=ONE_IMAGE,
        responses=PROBLEMS | {200: {"model": Explanation, "content": {"image/png": {"schema": IMAGE}}}},
        tags=["inference"],
    )
    async def explain(
        request: Request,
        rule: Annotated[Rule, chosen_rule],
        target: Annotated[str, Query(description="`predicted` or a class name.")] = PREDICTED,
        style: Annotated[Style, Query()] = "overlay",
        method: Annotated[Method, Query(description="All but `gradcam` take many seconds on a CPU.")] = "gradcam",
        alpha: Annotated[float, Query(ge=0, le=1, description="Opacity at the peak of the evidence.")] = 0.6,
        accept: Annotated[str, Header()] = "image/png",
    ) -> Response:
        """Show where the evidence lies: a PNG, or JSON for `Accept: application/json`."""
        check_choices(service.manifest, target=target)
        data = await read_one(request)
        started = time.monotonic()
        answer = await while_connected(request, see(data, rule, preview_side=PREVIEW_SIDE))
        shown = aim(target, method, judgement=answer.judgement, manifest=service.manifest)
        raw = answer.result.cam[shown.index]
        if method != "gradcam":
            with metrics.stage_seconds.labels(stage="attribute").time():
                raw = await while_connected(
                    request,
                    service.batcher.call(
                        lambda: service.attribute(answer.image.pixels, method, target=shown.index),
                        timeout_s=rule.timeout_s - (time.monotonic() - started),
                    ),
                )

        def draw() -> Overlay:
            return render(raw, answer.image.preview, style=style, alpha=alpha, description=shown.description)

        overlay = await in_worker("render", draw)
        last = service.manifest.classes[-1]
        headers = model_headers | {
            f"X-Probability-{last.capitalize()}": f"{answer.judgement.probabilities[last]:.6f}",
            "X-CAM-Peak": f"{overlay.peak:.6g}",
            "X-CAM-Empty": str(overlay.empty).lower(),
        }
        if "application/json" not in accept:
            return Response(overlay.png, media_type="image/png", headers=headers)
        explanation = Explanation(
            **fields(answer, request),
            target=shown.label,
            method=method,
            map=raw.tolist(),
            peak=overlay.peak,
            empty=overlay.empty,
            overlay_png=base64.b64encode(overlay.png).decode(),
        )
        return JSONResponse(explanation.model_dump(), headers=headers)

    @router.get("/models", tags=["model"])
    async def models() -> Models:
        """The published versions, the served one, and their metrics."""
        listed = await to_thread.run_sync(service.list_models, limiter=service.workers)
        return Models(name=service.manifest.name, versions=listed)

    @router.get("/livez", tags=["health"])
    async def livez() -> Health:
        """200 while the process answers at all."""
        return Health(status="ok")

    @router.get("/readyz", responses={503: {"model": Health}}, tags=["health"])
    async def readyz(response: Response) -> Health:
        """200 when the model is loaded, warm and taking work; else 503 with the reason."""
        if service.batcher.accepting:
            return Health(status="ok")
        response.status_code = 503
        return Health(status="unavailable", reason="the server is starting or stopping")

    @router.get("/metrics", tags=["health"])
    async def scrape() -> Response:
        """Prometheus text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
