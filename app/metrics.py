"""Every Prometheus instrument, in base units; docs/metrics.md describes each."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from app.engines.base import HasMemory
from app.model.labels import Concern
from app.model.preprocess import DecodedImage
from app.model.quality import Measures
from app.served import Running

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PROBABILITY_DIFFERENCES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROBABILITIES = (0.01, 0.02, 0.05, *SHARES, 0.95, 0.98, 0.99)  # finer at the ends, where most answers lie
SHARPNESSES = (3, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000)
SIDES = (64, 128, 200, 300, 450, 600, 1_000, 1_500, 2_000, 3_000, 4_000)  # below 200 an image has a warning


class Metrics:
    """The instruments of one app, in a registry of their own, so that two apps in one process do not collide."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time, file descriptors
        self.requests = Counter("dermlens_requests", "Finished HTTP requests.", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "dermlens_request_seconds",
            "Time to answer, seconds.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("dermlens_in_flight_requests", "Requests being answered.", registry=registry)
        self.queue_depth = Gauge("dermlens_queue_depth", "Images waiting for the device.", registry=registry)
        self.stage_seconds = Histogram(
            "dermlens_stage_seconds",
            "Time in each stage of a request, seconds: read, decode, queue, batch, forward, attribute, render.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "dermlens_batch_size",
            "Images in the forward pass that an image was part of.",
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self.predictions = Counter(
            "dermlens_predictions", "Predictions by label.", ["label", "version"], registry=registry
        )
        self.referred = Counter(
            "dermlens_referred",
            "Predictions that the model would rather leave to a person.",
            ["version"],
            registry=registry,
        )
        self.concerns = Counter(
            "dermlens_refer_reasons",
            "Reasons for which predictions were referred: conformal, out_of_distribution, quality.",
            ["reason", "version"],
            registry=registry,
        )
        self.positive_probability = Histogram(
            "dermlens_positive_probability",
            "Calibrated probability of the last class, malignant.",
            ["version"],
            buckets=PROBABILITIES,
            registry=registry,
        )
        self.image_brightness = Histogram(
            "dermlens_image_brightness_ratio", "Mean luma of an image, 0 to 1.", buckets=SHARES, registry=registry
        )
        self.image_saturation = Histogram(
            "dermlens_image_saturation_ratio", "Mean saturation of an image, 0 to 1.", buckets=SHARES, registry=registry
        )
        self.image_sharpness = Histogram(
            "dermlens_image_sharpness",
            "Variance of an image's Laplacian at the model's size, in grey levels squared.",
            buckets=SHARPNESSES,
            registry=registry,
        )
        self.image_side = Histogram(
            "dermlens_image_side_pixels",
            "Shorter side of an image as uploaded, pixels.",
            buckets=SIDES,
            registry=registry,
        )
        self.rejected = Counter(
            "dermlens_rejected", "Requests or files refused, by problem.", ["reason"], registry=registry
        )
        self.dropped = Counter(
            "dermlens_dropped",
            "Images that were accepted and never run, by reason: client_gone, deadline.",
            ["reason"],
            registry=registry,
        )
        self.model_info = Info("dermlens_model", "The served model.", registry=registry)
        self.device_memory = Gauge(
            "dermlens_device_memory_bytes",
            "Memory of the GPU, whoever uses it: used, total. None without a GPU.",
            ["kind"],
            registry=registry,
        )
        self.start_seconds = Gauge(
            "dermlens_start_seconds",
            "Time that the newest version took to start, by step: load, build, warm_up.",
            ["step"],
            registry=registry,
        )
        self.reloads = Counter(
            "dermlens_reloads",
            "Versions that were to be served, the first among them, by outcome: served, refused.",
            ["outcome"],
            registry=registry,
        )
        self.shadow_pairs = Counter(
            "dermlens_shadow_pairs",
            "Answered images that the shadow version has scored too.",
            ["version", "shadow"],
            registry=registry,
        )
        self.shadow_disagreements = Counter(
            "dermlens_shadow_disagreements",
            "Those among them for which it gives another label than the answered one.",
            ["version", "shadow", "label"],
            registry=registry,
        )
        self.shadow_difference = Histogram(
            "dermlens_shadow_probability_difference",
            "How far apart the two versions' probabilities of an image are; the largest over its classes.",
            ["version", "shadow"],
            buckets=PROBABILITY_DIFFERENCES,
            registry=registry,
        )
        self.shadow_dropped = Counter(
            "dermlens_shadow_dropped",
            "Images of the shadow's share left unscored, by reason: busy, deadline, failed, incomparable, not_loaded.",
            ["reason"],
            registry=registry,
        )
        # At zero from the start, so that the first of each is seen as an increase
        for reason in ("client_gone", "deadline"):
            self.dropped.labels(reason=reason)
        for outcome in ("served", "refused"):
            self.reloads.labels(outcome=outcome)

    def serves(self, running: Running) -> None:
        """Say which version is served from now on."""
        self.reloads.labels(outcome="served").inc()
        manifest, engine = running.manifest, running.engine
        self.model_info.info(
            {
                "name": manifest.name,
                "version": manifest.version,
                "engine": engine.name,
                "device": engine.device,
                "precision": engine.precision,
            }
        )
        for label in manifest.classes:
            self.predictions.labels(label=label, version=manifest.version)
        self.referred.labels(version=manifest.version)
        for concern in get_args(Concern):
            self.concerns.labels(reason=concern, version=manifest.version)
        self.positive_probability.labels(version=manifest.version)
        self.device_memory.clear()  # of the engine before, which is freed when nothing holds it
        if isinstance(engine, HasMemory):
            self.device_memory.labels(kind="used").set_function(lambda: engine.memory().used_bytes)
            self.device_memory.labels(kind="total").set_function(lambda: engine.memory().total_bytes)

    def refused(self) -> None:
        """Count a version that could not be served."""
        self.reloads.labels(outcome="refused").inc()

    def refused_unread(self, status: HTTPStatus) -> None:
        """Count a request that no route gets to see."""
        self.requests.labels(route="unmatched", status=str(int(status))).inc()
        self.rejected.labels(reason=f"http-{int(status)}").inc()

    def saw(self, image: DecodedImage, measures: Measures) -> None:
        """Count what a decoded image is like; from any thread."""
        self.image_brightness.observe(measures.brightness)
        self.image_saturation.observe(measures.saturation)
        self.image_sharpness.observe(measures.sharpness)
        self.image_side.observe(min(image.width, image.height))

    def starting(self, step: str) -> AbstractContextManager[object]:
        """Time a step of a version's start."""
        return self.start_seconds.labels(step=step).time()

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Read the queue's depth at each scrape."""
        self.queue_depth.set_function(depth)
