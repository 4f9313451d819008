"""create_app(settings): the only place where the server's objects are built and wired."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from functools import partial
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from anyio import to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import RedirectResponse

from app import oip
from app.api import build_router
from app.audit import AuditLog, Secret
from app.batcher import MicroBatcher
from app.busy import Busy
from app.clinical.dicom import decode
from app.engines.base import DeviceLost, Engine, build_decoder, build_engine, warm_up
from app.errors import install
from app.isolation import DecodeProcesses
from app.metrics import Metrics
from app.middleware import RequestContext
from app.model import store
from app.model.labels import NOTICE, check_choices
from app.model.manifest import Manifest
from app.model.metadata import Fusion
from app.model.out_of_distribution import Familiar
from app.pages import add_docs, add_page
from app.schemas import ModelInfo
from app.security import KeyRing
from app.served import ReportMissing, Running, Served, VersionMissing, VersionRefused
from app.service import Service
from app.settings import Settings
from app.shadow import Shadow
from app.watchdog import watch

if TYPE_CHECKING:  # it imports OpenTelemetry, which few have
    from app.tracing import Tracing

LOG = logging.getLogger(__name__)
DESCRIPTION = f"""Benign or malignant? A calibrated probability for a dermoscopic image, and a picture of where the
evidence lies. ASFF ResNet-50 after [arXiv 2510.03876](https://arxiv.org/abs/2510.03876).

**{NOTICE}**"""


class OpenModel(NamedTuple):
    engine: Engine
    manifest: Manifest
    familiar: Familiar | None
    fusion: Fusion | None


def open_model(
    settings: Settings,
    version: str | None = None,
    *,
    step: Callable[[str], AbstractContextManager[object]] = lambda _: nullcontext(),
) -> OpenModel:
    """Load a version, by default the one that the settings name, onto its device.

    Args:
        step: around `load`, from the disk, and `build`, onto the device.

    Raises:
        StoreError: there is no such version, or it is damaged.
        EngineUnavailable: the device that was asked for is not there.
        ValueError: the version has no such operating point or coverage, or its weights do not fit.
    """
    with step("load"):
        loaded = store.load(settings.model_store, settings.model_name, version or current(settings)[0])
    with step("build"):
        return open_loaded(settings, loaded)


def open_loaded(settings: Settings, loaded: store.LoadedVersion) -> OpenModel:
    """As `open_model`, of a version that has been read."""
    manifest = loaded.manifest
    check_choices(manifest, **defaults_for(manifest, settings))
    engine = build_engine(settings.engine, loaded, precision=settings.precision, threads=settings.cpu_threads)
    return OpenModel(engine, manifest, loaded.familiar, loaded.fusion)


def defaults_for(manifest: Manifest, settings: Settings) -> dict[str, str | None]:
    """The operating point and the coverage that a version has to have."""
    # A default that a version can make nothing of does no harm; one that it has under other names is a mistake
    return {
        "operating_point": settings.operating_point if manifest.operating_points else None,
        "coverage": settings.coverage if manifest.abstention else None,
    }


def current(settings: Settings) -> tuple[str, object]:
    """The version to serve, and what changes whenever it is promoted again."""
    if settings.model_version != "current":
        return settings.model_version, None
    root, name = settings.model_store, settings.model_name
    return store.current(root, name), (root / name / "current").stat().st_mtime_ns


def batch_size(settings: Settings, engine: Engine) -> int:
    """Images per forward pass at most; on a CPU one for each thread, beyond which one more is hardly cheaper."""
    if settings.max_batch:
        return settings.max_batch
    return min(8, max(2, settings.cores)) if engine.device == "cpu" else 32


def create_app(settings: Settings, *, on_failure: Callable[[str], None] = lambda _: None) -> FastAPI:
    """Load and warm the model, and build the server around it; raises as `open_model` does.

    Args:
        on_failure: called from a thread of its own when the device is lost or stuck; the process should end.
    """
    metrics = Metrics()
    first = current(settings)  # before it is loaded, so that a promotion meanwhile is noticed
    tracing = open_tracing(settings)
    served = Served(first[0], lambda version: start(settings, version, metrics, tracing), on_change=metrics.serves)
    metrics.watch_queue(lambda: served.now.batcher.depth)
    keys = KeyRing(settings.api_keys) if settings.api_keys else None
    shadow = start_shadow(settings, metrics)
    audit = open_audit_log(settings)
    processes = open_decode_processes(settings)
    workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="worker")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        served.open()
        if shadow is not None:
            shadow.open()
        following = asyncio.create_task(
            served.follow(
                lambda: current(settings), first, every_s=settings.reload_ms / 1000, on_refusal=metrics.refused
            )
        )
        stop_watch = watch(served, asyncio.get_running_loop(), limit_s=settings.stuck_ms / 1000, on_failure=on_failure)
        # For `app.protocol`
        yield {
            "busy": Busy(served, metrics, timeout_ms=settings.timeout_ms),
            "refused_unread": metrics.refused_unread,
        }
        following.cancel()
        await served.close()
        if shadow is not None:
            await shadow.close()
        stop_watch()
        workers.shutdown(wait=False)
        if audit is not None:
            audit.close()
        if tracing is not None:
            await to_thread.run_sync(tracing.close)
        if processes is not None:
            await to_thread.run_sync(processes.close)

    app = FastAPI(
        title="dermlens",
        description=DESCRIPTION,
        version=installed_version("dermlens"),
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs else None,
        docs_url=None,
        redoc_url=None,
        # FastAPI's own spans hold paths, queries and messages, for whoever sets a global provider
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        redirect_slashes=False,  # to an address made from the client's Host header
    )
    service = Service(
        served=served,
        decode=processes.decode if processes else partial(decode, jpeg=build_decoder(settings.decoder)),
        audit=audit,
        metrics=metrics,
        tracing=tracing,
        list_models=lambda: list_models(settings.model_store, settings.model_name, served.now.manifest.version),
        read_report=lambda version, file: read_report(settings.model_store, settings.model_name, version, file),
        promote=lambda version: promote(served, settings, version),
        compare=shadow.compare if shadow else partial(count_missing_shadow, settings, metrics),
        workers=workers,
        operating_point=settings.operating_point,
        coverage=settings.coverage,
        max_upload_bytes=settings.max_upload_bytes,
        max_pixels=settings.max_pixels,
        max_batch_files=settings.max_batch_files,
        max_batch_bytes=settings.max_batch_bytes,
        read_timeout_s=settings.read_timeout_ms / 1000,
        timeout_ms=settings.timeout_ms,
    )
    app.include_router(build_router(service, keys))
    app.include_router(oip.build_router(service, keys))
    if settings.docs:
        add_docs(app)
    if settings.page:
        add_page(app, docs=settings.docs)
    elif settings.docs:
        app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    install(app, metrics)
    if origins := [origin.strip() for origin in settings.cors_origins.split(",") if origin.strip()]:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    if tracing is not None:
        from app.tracing import TracedRequests

        app.add_middleware(TracedRequests, tracing=tracing)
    app.add_middleware(RequestContext, metrics=metrics)
    return app


def open_audit_log(settings: Settings) -> AuditLog | None:
    """The audit log that the settings name, continued.

    Raises:
        ValueError: there is no secret for it.
        AuditLocked, AuditBroken, OSError.
    """
    return AuditLog(settings.audit_log, audit_secret(settings)) if settings.audit_log else None


def audit_secret(settings: Settings) -> Secret:
    """The secret of an audit log.

    Raises:
        ValueError: none was given, or it is too short.
        OSError: it cannot be read.
    """
    if settings.audit_key_file is None:
        raise ValueError("DERMLENS_AUDIT_LOG needs a secret: set DERMLENS_AUDIT_KEY_FILE")
    return Secret(settings.audit_key_file.read_bytes())


def open_tracing(settings: Settings) -> "Tracing | None":
    """What makes spans, where the settings want them; raises ValueError where OpenTelemetry is not installed."""
    if not settings.tracing:
        return None
    try:
        from app.tracing import Tracing
    except ModuleNotFoundError as error:
        raise ValueError(
            f"DERMLENS_TRACING needs {error.name}: pip install '.[tracing]', or set it to false"
        ) from error
    return Tracing(installed_version("dermlens"))


def open_decode_processes(settings: Settings) -> DecodeProcesses | None:
    """What decodes in processes of their own, where the settings want it.

    Raises:
        ValueError: they cannot use nvJPEG.
        RuntimeError: they do not start.
    """
    if settings.decode_isolation == "thread":
        return None
    check_decoder(settings)
    return DecodeProcesses(
        settings.workers,
        timeout_s=settings.decode_timeout_ms / 1000,
        memory_bytes=settings.decode_memory_bytes,
    )


def check_decoder(settings: Settings) -> None:
    """Raise ValueError where the decoder cannot run in processes of its own and has to."""
    if settings.decode_isolation == "process" and settings.decoder != "pillow":
        raise ValueError("DERMLENS_DECODE_ISOLATION=process decodes with Pillow alone: set DERMLENS_DECODER=pillow")


def start(settings: Settings, version: str, metrics: Metrics, tracing: "Tracing | None") -> Running:
    """A version that is loaded, warm, and ready to take work; raises as `open_model` does."""
    engine, manifest, familiar, fusion = model = open_model(settings, version, step=metrics.starting)
    with metrics.starting("warm_up"):
        max_batch = warm(settings, model)
    batcher = MicroBatcher(
        engine.run,
        max_batch=max_batch,
        max_wait_ms=settings.max_wait_ms,
        max_queue=settings.max_queue,
        in_flight=engine.in_flight,
        on_drop=lambda reason: metrics.dropped.labels(reason=reason).inc(),
        is_fatal=lambda error: isinstance(error, DeviceLost),
        around=tracing.batch if tracing is not None else lambda _: nullcontext(),
    )
    return Running(engine, manifest, batcher, familiar, fusion)


def warm(settings: Settings, model: OpenModel) -> int:
    """Run every batch size that the version will have to; returns the largest."""
    max_batch = batch_size(settings, model.engine)
    warm_up(model.engine, size=model.manifest.preprocessing.size, max_batch=max_batch)
    return max_batch


def start_shadow(settings: Settings, metrics: Metrics) -> Shadow | None:
    """The version to compare, loaded and warm, where the settings name one; what is wrong with it is only logged."""
    if settings.shadow_version is None:
        return None
    try:
        engine, manifest, *_ = model = open_model(settings, settings.shadow_version)
        max_batch = warm(settings, model)
    except Exception as error:  # of the store, of the engine's library: whatever it is, the served version serves
        LOG.error("no shadow: version %s cannot be loaded: %s", settings.shadow_version, error)
        return None
    return Shadow(
        engine,
        manifest,
        share=settings.shadow_share,
        max_batch=max_batch,
        timeout_s=settings.timeout_ms / 1000,
        metrics=metrics,
    )


def count_missing_shadow(settings: Settings, metrics: Metrics, *_: object) -> None:
    """In place of `Shadow.compare` where there is none: whether one could not be loaded shows in the metrics."""
    if settings.shadow_version is not None:
        metrics.shadow_dropped.labels(reason="not_loaded").inc(settings.shadow_share)


async def promote(served: Served, settings: Settings, version: str) -> str:
    """Make a version current and serve it; returns the version before it.

    Raises:
        VersionMissing: there is no such version.
        VersionRefused: it cannot be served, the server was told to stay with one version, or the store is read-only.
    """
    if settings.model_version != "current":
        raise VersionRefused(f"this server was started for version {settings.model_version} alone: see MODEL_VERSION")
    root, name = settings.model_store, settings.model_name
    if version not in await to_thread.run_sync(store.versions, root, name):
        raise VersionMissing(f"there is no version {version} of {name}")
    before = served.now.manifest.version
    await served.replace(version)
    try:
        await to_thread.run_sync(store.promote, root, name, version)
    except (OSError, store.StoreError) as error:
        await served.replace(before)  # what is served is what the store says
        raise VersionRefused(f"the store could not be changed: {error}") from error
    return before


def list_models(root: Path, name: str, served: str | None) -> list[ModelInfo]:
    """Every published version with its manifest, or with the reason why it cannot be read."""
    listed = []
    for version in store.versions(root, name):
        try:
            manifest = store.read_manifest(root, name, version).model_dump(mode="json")
            report = store.report_files(root, name, version)
            listed.append(ModelInfo(version=version, served=version == served, manifest=manifest, report=report))
        except (OSError, store.StoreError) as error:
            listed.append(ModelInfo(version=version, served=version == served, problem=str(error)))
    return listed


def read_report(root: Path, name: str, version: str, file: str) -> bytes:
    """A picture or page of a version's report; raises ReportMissing."""
    try:
        return store.read_report(root, name, version, file)
    except (OSError, store.StoreError) as error:
        raise ReportMissing(str(error)) from error
