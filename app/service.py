"""What the routes work with: the rule of a request, an image seen and judged, and the steps between."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from anyio import to_thread
from fastapi import Request

from app import logs
from app.audit import AuditLog
from app.batcher import DeadlineExceeded, Result
from app.metrics import Metrics
from app.model.flips import AXES, Tta, flips, mean_cam, mean_logits
from app.model.labels import Judgement, judge
from app.model.manifest import Manifest
from app.model.metadata import Metadata, fuse
from app.model.out_of_distribution import score_of
from app.model.preprocess import DecodedImage
from app.model.quality import Quality, assess, measure
from app.schemas import ModelInfo
from app.served import Running, Served
from app.shadow import Compare

if TYPE_CHECKING:  # it imports OpenTelemetry, which few have
    from app.tracing import Tracing

T = TypeVar("T")


class Decode(Protocol):
    """`app.model.preprocess.decode`, or the same in a process of its own; for a worker thread."""

    def __call__(
        self, data: bytes, *, size: int, max_pixels: int, crop_frame: bool, preview_side: int
    ) -> DecodedImage: ...


@dataclass(frozen=True)
class Rule:
    """What answers this request, how it wants its probabilities judged, and how long it waits for them."""

    running: Running
    operating_point: str
    coverage: str
    timeout_s: float
    background: bool
    tta: Tta = "none"
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def passes(self) -> int:
        """Places that an image takes."""
        return len(AXES) if self.tta == "flips" else 1

    def admit(self, images: int = 1) -> AbstractContextManager[None]:
        """As `MicroBatcher.admit`, for images that have been read."""
        return self.running.batcher.admit(images * self.passes, timeout_s=self.timeout_s, background=self.background)


@dataclass(frozen=True)
class Answer:
    """One image, seen and judged."""

    image: DecodedImage
    result: Result
    judgement: Judgement


@dataclass(frozen=True)
class Service:
    """What the routes need, built once in `main`."""

    served: Served
    decode: Decode
    audit: AuditLog | None
    metrics: Metrics
    tracing: "Tracing | None"
    list_models: Callable[[], list[ModelInfo]]
    read_report: Callable[[str, str], bytes]  # of a version, by its name
    promote: Callable[[str], Awaitable[str]]  # a version in place of the one whose name it gives
    compare: Compare  # with the shadow version, where there is one
    workers: ThreadPoolExecutor  # that decode, draw and read files
    operating_point: str
    coverage: str
    max_upload_bytes: int
    max_pixels: int
    max_batch_files: int
    max_batch_bytes: int
    read_timeout_s: float
    timeout_ms: int

    def took(self, stage: str, seconds: float) -> None:
        """Count a stage's duration, and note it in the access line."""
        self.metrics.stage_seconds.labels(stage=stage).observe(seconds)
        logs.note_stage(stage, seconds)

    async def timed(self, stage: str, work: Awaitable[T]) -> T:
        """The outcome of `work`, its duration counted."""
        started = time.perf_counter()
        try:
            return await work
        finally:
            seconds = time.perf_counter() - started
            self.took(stage, seconds)
            if self.tracing is not None:
                self.tracing.stage(stage, seconds)

    def in_worker(self, work: Callable[[], T]) -> Awaitable[T]:
        """The outcome of `work` in a thread: not begun for who has left, and once begun never without its thread."""
        return asyncio.get_running_loop().run_in_executor(self.workers, work)

    async def see(self, request: Request, data: bytes, rule: Rule, *, preview_side: int = 0) -> Answer:
        """Decode, run, judge and record one image.

        Raises:
            ImageError, DeadlineExceeded, AuditFailed, or what `MicroBatcher.submit` raises.
        """
        started = time.monotonic()
        manifest = rule.running.manifest
        preprocessing = manifest.preprocessing

        def look() -> tuple[DecodedImage, Quality]:
            image = self.decode(
                data,
                size=preprocessing.size,
                max_pixels=self.max_pixels,
                crop_frame=preprocessing.crop_frame,
                preview_side=preview_side,
            )
            measures = measure(image.pixels)
            self.metrics.saw(image, measures)
            quality = assess(measures)
            return replace(image, warnings=(*image.warnings, *quality.warnings)), quality

        try:
            async with asyncio.timeout(rule.timeout_s):  # who waits for a thread in vain is never decoded
                image, quality = await self.timed("decode", self.in_worker(look))
        except asyncio.CancelledError:
            self.metrics.dropped.labels(reason="client_gone").inc()
            raise
        except TimeoutError:
            self.metrics.dropped.labels(reason="deadline").inc()
            raise DeadlineExceeded(f"not decoded within {rule.timeout_s:g} s: allow more time, or try again") from None
        left_s = rule.timeout_s - (time.monotonic() - started)
        result = await self._run(image, rule, timeout_s=left_s)
        self.took("queue", result.queue_s)
        self.took("batch", result.batch_s)
        self.took("forward", result.forward_s)
        if self.tracing is not None:
            self.tracing.ran(result)
        self.metrics.batch_size.observe(result.batch_size)
        judgement = judge(
            fuse(result.logits, rule.metadata, rule.running.fusion),
            manifest,
            rule.operating_point,
            coverage=rule.coverage,
            score=score_of(result.features, rule.running.familiar),
            spoilt=quality.spoilt,
            metadata=rule.metadata.known,
        )
        self.metrics.predictions.labels(label=judgement.label, version=manifest.version).inc()
        self.metrics.referred.labels(version=manifest.version).inc(judgement.refer)
        self.metrics.positive_probability.labels(version=manifest.version).observe(
            judgement.probabilities[manifest.classes[-1]]
        )
        for concern in judgement.refer_because:
            self.metrics.concerns.labels(reason=concern, version=manifest.version).inc()
        await self._record(request, data, judgement, manifest)
        self.compare(image, judgement, rule.running, rule.tta)
        return Answer(image, result, judgement)

    async def _run(self, image: DecodedImage, rule: Rule, *, timeout_s: float) -> Result:
        """What the device says; with `tta` the mean of four that wait together, and the image's own features."""
        submit = partial(rule.running.batcher.submit, timeout_s=timeout_s, background=rule.background)
        if rule.tta == "none":
            return await submit(image.pixels)
        results = await asyncio.gather(*(submit(flipped) for flipped in flips(image.pixels)))
        return replace(  # the times of the one that waited longest
            max(results, key=lambda result: result.ended),
            logits=mean_logits([result.logits for result in results]),
            cam=mean_cam([result.cam for result in results]),
            features=results[0].features,
        )

    async def _record(self, request: Request, data: bytes, judgement: Judgement, manifest: Manifest) -> None:
        """No answer is given without its record in the audit log, where there is one."""
        audit = self.audit
        if audit is None:
            return
        entry = {
            "request_id": request.scope["request_id"],
            "key": request.scope.get("key_name"),
            "route": request.scope["route"].path,
            "model": manifest.name,
            "version": manifest.version,
            "label": judgement.label,
            "probabilities": judgement.probabilities,
            "operating_point": judgement.operating_point,
            "positive": judgement.positive,
            "refer": judgement.refer,
            "refer_because": judgement.refer_because,
            "metadata": judgement.metadata,  # names of fields, never their values
        }
        # Not among the workers that decode: it waits for the disk
        number = await to_thread.run_sync(lambda: audit.append(data, **entry))
        logs.note(audit_number=number)

    async def unready(self) -> str | None:
        """Why no work is taken now; None where it is."""
        batcher = self.served.now.batcher
        if not batcher.accepting:
            return batcher.failure or "the server is starting or stopping"
        if self.audit is not None and not await to_thread.run_sync(self.audit.ready):
            return "the audit log cannot be written"
        return None
