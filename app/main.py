"""create_app(settings): the only place where the server's objects are built and wired."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import NamedTuple

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from app.api import Service, build_router
from app.batcher import MicroBatcher
from app.engines.base import Engine, build_decoder, build_engine, warm_up
from app.errors import install
from app.metrics import Metrics
from app.middleware import RequestContext
from app.model import store
from app.model.labels import NOTICE, check_choices
from app.model.manifest import Manifest
from app.schemas import ModelInfo
from app.settings import Settings

DESCRIPTION = f"""Benign or malignant? A calibrated probability for a dermoscopic image, and a picture of where the
evidence lies. ASFF ResNet-50 after [arXiv 2510.03876](https://arxiv.org/abs/2510.03876).

**{NOTICE}**"""


class OpenModel(NamedTuple):
    engine: Engine
    manifest: Manifest


def open_model(settings: Settings) -> OpenModel:
    """Load the version that the settings name onto its device.

    Raises:
        StoreError: there is no such version, or it is damaged.
        EngineUnavailable: the device that was asked for is not there.
        ValueError: the version has no such operating point or coverage, or its weights do not fit.
    """
    root, name, version = settings.model_store, settings.model_name, settings.model_version
    loaded = store.load(root, name, store.current(root, name) if version == "current" else version)
    manifest = loaded.manifest
    # A default that a version can make nothing of does no harm; one that it has under other names is a mistake
    check_choices(
        manifest,
        operating_point=settings.operating_point if manifest.operating_points else None,
        coverage=settings.coverage if manifest.abstention else None,
    )
    engine = build_engine(settings.engine, loaded, precision=settings.precision, threads=settings.cpu_threads)
    return OpenModel(engine, manifest)


def create_app(settings: Settings) -> FastAPI:
    """Load and warm the model, and build the server around it; raises as `open_model` does."""
    model = open_model(settings)
    engine, manifest = model.engine, model.manifest
    max_batch = settings.max_batch or (8 if engine.device == "cpu" else 32)
    warm_up(engine, size=manifest.preprocessing.size, max_batch=max_batch)
    metrics = Metrics()
    batcher = MicroBatcher(
        engine.run,
        max_batch=max_batch,
        max_wait_ms=settings.max_wait_ms,
        max_queue=settings.max_queue,
        in_flight=engine.in_flight,
        on_drop=lambda reason: metrics.dropped.labels(reason=reason).inc(),
    )
    metrics.watch_queue(lambda: batcher.depth)
    metrics.model_info.info(
        {
            "name": manifest.name,
            "version": manifest.version,
            "engine": engine.name,
            "device": engine.device,
            "precision": engine.precision,
        }
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="dermlens", description=DESCRIPTION, version=installed_version("dermlens"), lifespan=lifespan)
    service = Service(
        batcher=batcher,
        attribute=engine.attribute,
        jpeg=build_decoder(settings.decoder),
        manifest=manifest,
        metrics=metrics,
        list_models=lambda: list_models(settings.model_store, manifest.name, manifest.version),
        workers=CapacityLimiter(settings.decode_threads),
        operating_point=settings.operating_point,
        coverage=settings.coverage,
        max_upload_bytes=settings.max_upload_bytes,
        max_pixels=settings.max_pixels,
        max_batch_files=settings.max_batch_files,
        timeout_s=settings.timeout_ms / 1000,
    )
    app.include_router(build_router(service))
    app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    install(app, metrics)
    app.add_middleware(RequestContext, metrics=metrics)
    return app


def list_models(root: Path, name: str, served: str | None) -> list[ModelInfo]:
    """Every published version with its manifest, or with the reason why it cannot be read."""
    listed = []
    for version in store.versions(root, name):
        try:
            manifest = store.read_manifest(root, name, version).model_dump(mode="json")
            listed.append(ModelInfo(version=version, served=version == served, manifest=manifest))
        except store.StoreError as error:
            listed.append(ModelInfo(version=version, served=version == served, problem=str(error)))
    return listed
