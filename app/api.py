"""The routes: /predict, /predict/batch, /explain, /models with reports, /livez, /readyz, /metrics."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import WithJsonSchema

from app import logs
from app.clinical import fhir
from app.errors import KINDS, report
from app.model.flips import Tta
from app.model.frame import WHOLE
from app.model.labels import OFF, PREDICTED, check_choices, check_metadata
from app.model.manifest import Identifier
from app.model.metadata import OLDEST, SEXES, SITES, Metadata, Sex, Site
from app.model.overlay import Method, Overlay, Style, aim, render
from app.model.preprocess import PREVIEW_SIDE
from app.schemas import (
    Asked,
    BatchItem,
    Explanation,
    Health,
    Limits,
    Models,
    Prediction,
    Promoted,
    prediction_fields,
)
from app.security import REPORT_POLICY, KeyRing, guard
from app.service import Answer, Rule, Service
from app.upload import read_image, read_images, while_connected

IMAGE = {"type": "string", "format": "binary"}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "What is wrong, and what to do about it.",
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    for status in sorted({kind.status for kind in KINDS.values()})
}
REFUSALS: dict[int | str, dict[str, Any]] = {status: PROBLEMS[status] for status in (401, 403, 429)}


def body(schema: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI for a body that the route reads itself, to bound it."""
    content = {"multipart/form-data": {"schema": schema}}
    if "file" in schema["properties"]:
        content["application/octet-stream"] = {"schema": IMAGE}  # generators know no bodies of image/jpeg
    return {"requestBody": {"required": True, "content": content}}


ONE_IMAGE = body({"type": "object", "properties": {"file": IMAGE}, "required": ["file"]})
MANY_IMAGES = body(
    {"type": "object", "properties": {"files": {"type": "array", "items": IMAGE}}, "required": ["files"]}
)


def build_router(service: Service, keys: KeyRing | None = None) -> APIRouter:  # noqa: PLR0915 - one closure a route
    """The routes over a service; with `keys` each asks for a key of its scope, health alone for none."""
    router = APIRouter(generate_unique_id_function=lambda route: route.name)  # what generated clients call it
    may_predict = guard(keys, "predict")
    metrics = service.metrics
    first = service.served.now.manifest  # what the description names; each request is held to the version it gets
    points = sorted({service.operating_point, *first.operating_points})
    coverages = sorted({service.coverage, OFF, *first.abstention})
    targets = [PREDICTED, *first.classes]

    async def choose_rule(
        request: Request,
        response: Response,
        operating_point: Annotated[
            str, Query(description="Where the decision's threshold lies.", json_schema_extra={"enum": points})
        ] = service.operating_point,
        coverage: Annotated[
            str, Query(description="Of the abstention rule; `off` forms no set.", json_schema_extra={"enum": coverages})
        ] = service.coverage,
        x_timeout_ms: Annotated[
            int, Header(ge=1, description="Milliseconds until a 504, where the server's own limit is later.")
        ] = service.timeout_ms,
        x_priority: Annotated[
            Literal["interactive", "batch"], Header(description="`batch` lets every interactive image go first.")
        ] = "interactive",
        tta: Annotated[
            Tta,
            Query(description="`flips`: the mean over the image and its three mirror images, for four times the work."),
        ] = "none",
    ) -> AsyncIterator[Rule]:
        """What answers this request, until it is answered; refused before its body is read where there is no place."""
        timeout_s = min(service.timeout_ms, x_timeout_ms) / 1000
        with service.served.use() as running:
            # Only what was asked for: a default that this version can make nothing of does no harm
            asked = request.query_params
            check_choices(
                running.manifest, operating_point=asked.get("operating_point"), coverage=asked.get("coverage")
            )
            rule = Rule(
                running,
                operating_point,
                coverage,
                timeout_s,
                background=x_priority == "batch",
                tta=tta,
            )
            running.batcher.refuse_if_full(rule.passes, timeout_s=timeout_s, background=rule.background)
            response.headers["X-Model-Version"] = running.manifest.version
            logs.note(model_version=running.manifest.version)
            yield rule

    chosen_rule = Depends(choose_rule)
    described = first.metadata is not None  # experimental, so nobody else reads of it

    async def add_metadata(
        rule: Annotated[Rule, chosen_rule],
        age: Annotated[
            float | None,
            Query(
                ge=0, le=OLDEST, allow_inf_nan=False, description="Years. Experimental.", include_in_schema=described
            ),
            WithJsonSchema({"type": "number", "minimum": 0, "maximum": OLDEST}),  # no query is null
        ] = None,
        sex: Annotated[
            Sex | None,
            Query(description="Experimental.", include_in_schema=described),
            WithJsonSchema({"type": "string", "enum": list(SEXES)}),
        ] = None,
        site: Annotated[
            Site | None,
            Query(description="Where the lesion is, in ISIC's terms. Experimental.", include_in_schema=described),
            WithJsonSchema({"type": "string", "enum": list(SITES)}),
        ] = None,
    ) -> Rule:
        """The rule of one image, with what else is known of it; refused where the version has no use for that."""
        metadata = Metadata(age, sex, site)
        check_metadata(rule.running.manifest, metadata.known)
        return replace(rule, metadata=metadata)

    image_rule = Depends(add_metadata)

    async def read_one(request: Request) -> bytes:
        data = await service.timed(
            "read", read_image(request, max_bytes=service.max_upload_bytes, read_timeout_s=service.read_timeout_s)
        )
        logs.note(bytes_in=len(data))
        return data

    def fields(answer: Answer, rule: Rule, request: Request) -> dict[str, Any]:
        return prediction_fields(
            answer.judgement,
            answer.image,
            manifest=rule.running.manifest,
            request_id=request.scope["request_id"],
        )

    @router.post(
        "/predict",
        dependencies=may_predict,
        openapi_extra=ONE_IMAGE,
        response_model=Prediction,
        responses=PROBLEMS | {200: {"content": {fhir.MEDIA_TYPE: {"schema": {"type": "object"}}}}},
        tags=["inference"],
    )
    async def predict(
        request: Request,
        response: Response,
        rule: Annotated[Rule, image_rule],
        wanted: Annotated[
            Literal["json", "fhir"], Query(alias="format", description="`fhir` is a DiagnosticReport of FHIR R4.")
        ] = "json",
        accept: Annotated[str, Header()] = "application/json",
    ) -> Prediction | Response:
        """Classify one dermoscopic image: multipart field `file`, or the image as the raw body."""
        data = await read_one(request)
        with rule.admit():
            answer = await while_connected(request, service.see(request, data, rule))
        if wanted == "json" and fhir.MEDIA_TYPE not in accept:
            return Prediction(**fields(answer, rule, request))
        diagnosis = fhir.diagnostic_report(
            answer.judgement,
            rule.running.manifest,
            request_id=request.scope["request_id"],
            warnings=answer.image.warnings,
            issued=datetime.now(UTC),
        )
        return JSONResponse(diagnosis, headers=dict(response.headers), media_type=fhir.MEDIA_TYPE)

    @router.post(
        "/predict/batch", dependencies=may_predict, openapi_extra=MANY_IMAGES, responses=PROBLEMS, tags=["inference"]
    )
    async def predict_batch(request: Request, rule: Annotated[Rule, chosen_rule]) -> list[BatchItem]:
        """Classify several images, multipart field `files`; a bad one fails alone and keeps its place."""
        reading = read_images(
            request,
            field="files",
            max_bytes=service.max_upload_bytes,
            max_files=service.max_batch_files,
            max_total_bytes=service.max_batch_bytes,
            read_timeout_s=service.read_timeout_s,
        )
        files = await service.timed("read", reading)
        logs.note(bytes_in=sum(map(len, files)))

        async def one(index: int, data: bytes) -> BatchItem:
            try:
                return BatchItem(
                    index=index, prediction=Prediction(**fields(await service.see(request, data, rule), rule, request))
                )
            except Exception as error:
                problem = report(error, request.scope["request_id"], metrics)
                return BatchItem(index=index, problem=problem)

        with rule.admit(len(files)):
            everything = asyncio.gather(*(one(index, data) for index, data in enumerate(files)))
            return list(await while_connected(request, everything))

    @router.post(
        "/explain",
        dependencies=may_predict,
        openapi_extra=ONE_IMAGE,
        responses=PROBLEMS | {200: {"model": Explanation, "content": {"image/png": {"schema": IMAGE}}}},
        tags=["inference"],
    )
    async def explain(
        request: Request,
        rule: Annotated[Rule, image_rule],
        target: Annotated[
            str, Query(description="`predicted` or a class name.", json_schema_extra={"enum": targets})
        ] = PREDICTED,
        style: Annotated[Style, Query()] = "overlay",
        method: Annotated[Method, Query(description="All but `gradcam` take many seconds on a CPU.")] = "gradcam",
        alpha: Annotated[float, Query(ge=0, le=1, description="Opacity at the peak of the evidence.")] = 0.6,
        accept: Annotated[str, Header()] = "image/png",
    ) -> Response:
        """Show where the evidence lies: a PNG, or JSON for `Accept: application/json`."""
        manifest, batcher = rule.running.manifest, rule.running.batcher
        check_choices(manifest, target=target)
        data = await read_one(request)
        with rule.admit():
            started = time.monotonic()
            answer = await while_connected(request, service.see(request, data, rule, preview_side=PREVIEW_SIDE))
            shown = aim(target, method, judgement=answer.judgement, manifest=manifest)
            raw = answer.result.cam[shown.index]
            if method != "gradcam":
                attribution = batcher.call(
                    lambda: rule.running.engine.attribute(answer.image.pixels, method, target=shown.index),
                    timeout_s=rule.timeout_s - (time.monotonic() - started),
                )
                raw = await service.timed("attribute", while_connected(request, attribution))

            def draw() -> Overlay:
                return render(
                    raw,
                    answer.image.preview,
                    lit=answer.image.lit,
                    style=style,
                    alpha=alpha,
                    description=shown.description,
                )

            overlay = await service.timed("render", service.in_worker(draw))

        last = manifest.classes[-1]
        headers = {
            "X-Model-Version": manifest.version,
            f"X-Probability-{last.capitalize()}": f"{answer.judgement.probabilities[last]:.6f}",
            "X-CAM-Peak": f"{overlay.peak:.6g}",
            "X-CAM-Empty": str(overlay.empty).lower(),
        }
        if "application/json" not in accept:
            return Response(overlay.png, media_type="image/png", headers=headers)
        explanation = Explanation(
            **fields(answer, rule, request),
            target=shown.label,
            method=method,
            map=raw.tolist(),
            seen=answer.image.lit or WHOLE,
            peak=overlay.peak,
            empty=overlay.empty,
            overlay_png=base64.b64encode(overlay.png).decode(),
        )
        return JSONResponse(explanation.model_dump(), headers=headers)

    @router.get("/models", dependencies=may_predict, responses=REFUSALS, tags=["model"])
    async def models() -> Models:
        """The published versions, the served one, and their metrics."""
        listed = await service.in_worker(service.list_models)
        return Models(
            name=service.served.now.manifest.name,
            versions=listed,
            defaults=Asked(operating_point=service.operating_point, coverage=service.coverage),
            limits=Limits(bytes=service.max_upload_bytes, pixels=service.max_pixels),
        )

    @router.get(
        "/models/{version}/report/{file}",
        dependencies=may_predict,
        responses=REFUSALS
        | {status: PROBLEMS[status] for status in (404, 422)}
        | {200: {"content": {"image/png": {"schema": IMAGE}, "text/html": {"schema": {"type": "string"}}}}},
        response_class=Response,
        tags=["model"],
    )
    async def report_file(version: Identifier, file: str) -> Response:
        """A picture or page of a version's report; `/models` lists them."""
        data = await service.in_worker(lambda: service.read_report(version, file))
        if file.endswith(".png"):
            return Response(data, media_type="image/png")
        return Response(data, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})

    @router.post(
        "/models/{version}/promote",
        dependencies=guard(keys, "admin"),
        responses=PROBLEMS,
        tags=["model"],
    )
    async def promote(version: Identifier) -> Promoted:
        """Make a version the current one and serve it, once it is loaded and has run; needs a key of scope `admin`."""
        return Promoted(version=version, previous=await service.promote(version))

    @router.get("/livez", tags=["health"])
    async def livez() -> Health:
        """200 while the process answers at all."""
        return Health(status="ok")

    @router.get("/readyz", responses={503: {"model": Health}}, tags=["health"])
    async def readyz(response: Response) -> Health:
        """200 when the model is loaded, warm and taking work; else 503 with the reason."""
        reason = await service.unready()
        response.status_code = 503 if reason else 200
        return Health(status="unavailable" if reason else "ok", reason=reason)

    @router.get(
        "/metrics",
        dependencies=guard(keys, "metrics"),
        responses=REFUSALS,
        tags=["health"],
        response_class=PlainTextResponse,
        name="metrics",
    )
    async def scrape() -> Response:
        """Prometheus text."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
