"""A second version that sees what the served one answered, so that they can be compared before anyone relies on it."""

import asyncio
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from app.batcher import DeadlineExceeded, MicroBatcher
from app.engines.base import Engine
from app.metrics import Metrics
from app.model.flips import Tta
from app.model.frame import lit_part
from app.model.labels import OFF, Judgement, judge
from app.model.manifest import Manifest
from app.model.preprocess import DecodedImage
from app.served import Running

Compare = Callable[[DecodedImage, Judgement, Running, Tta], None]


class Shadow:
    """Scores images after they were answered; whatever goes wrong is counted, and nobody waits for it.

    Args:
        share: of the answered images to score, 0 to 1.
        max_batch: images in a forward pass, and images kept for one, at most.
        timeout_s: how long an image is kept.
    """

    def __init__(
        self, engine: Engine, manifest: Manifest, *, share: float, max_batch: int, timeout_s: float, metrics: Metrics
    ) -> None:
        self._manifest = manifest
        self._share = share
        self._most = max_batch
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._batcher = MicroBatcher(engine.run, max_batch=max_batch, max_wait_ms=0, max_queue=max_batch)
        self._scoring: set[asyncio.Task[None]] = set()
        for reason in ("busy", "deadline", "failed", "incomparable"):  # at zero, so that the first is an increase
            metrics.shadow_dropped.labels(reason=reason)

    def open(self) -> None:
        """Take work; call from the event loop."""
        self._batcher.start()

    async def close(self) -> None:
        """Forget what is not scored yet, without waiting for a forward pass that may hang."""
        for task in self._scoring:
            task.cancel()
        self._batcher.fail("the server is stopping")
        await self._batcher.stop()

    def compare(self, image: DecodedImage, answered: Judgement, running: Running, tta: Tta) -> None:
        """Score an image later, unless there is other work: whoever waits for the served version has the device first.

        Args:
            answered: what `running` made of it, by one pass or several.
        """
        if random.random() >= self._share:  # noqa: S311 - a sample, no secret
            return
        if tta != "none" or not self._can_be_compared(image, answered, running.manifest):
            self._drop("incomparable")
            return
        if running.batcher.depth or len(self._scoring) >= self._most:
            self._drop("busy")
            return
        task = asyncio.create_task(self._score(image.pixels, answered, running.manifest.version))
        self._scoring.add(task)
        task.add_done_callback(self._scoring.discard)

    def _can_be_compared(self, image: DecodedImage, answered: Judgement, served: Manifest) -> bool:
        manifest = self._manifest
        same_rule = answered.threshold is None or answered.operating_point in manifest.operating_points
        ours, theirs = manifest.preprocessing, served.preprocessing
        same_input = ours.size == theirs.size and (ours.crop_frame == theirs.crop_frame or _unframed(image))
        return same_rule and same_input and not answered.metadata and tuple(answered.probabilities) == manifest.classes

    async def _score(self, pixels: NDArray[np.uint8], answered: Judgement, served: str) -> None:
        try:
            result = await self._batcher.submit(pixels, timeout_s=self._timeout_s)
            judged = judge(result.logits, self._manifest, answered.operating_point, coverage=OFF)
            difference = max(abs(p - answered.probabilities[name]) for name, p in judged.probabilities.items())
        except DeadlineExceeded:
            self._drop("deadline")
        except Exception:  # of the engine's library: whatever it is, no answer depends on it
            self._drop("failed")
        else:
            pair = {"version": served, "shadow": self._manifest.version}
            self._metrics.shadow_pairs.labels(**pair).inc()
            self._metrics.shadow_disagreements.labels(**pair, label=answered.label).inc(judged.label != answered.label)
            self._metrics.shadow_difference.labels(**pair).observe(difference)

    def _drop(self, reason: str) -> None:
        self._metrics.shadow_dropped.labels(reason=reason).inc()


def _unframed(image: DecodedImage) -> bool:
    """Whether a version that crops frames and one that does not see the same of it."""
    return image.lit is None and lit_part(image.pixels) is None
