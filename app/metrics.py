"""Every Prometheus instrument, in base units; docs/metrics.md describes each."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from app.served import Running

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PROBABILITY_DIFFERENCES = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1)


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
            "Time in each stage of a request, seconds: read, decode, queue, forward, attribute, render.",
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
            "Images of the shadow's share that it did not score, by reason: busy, deadline, failed, incomparable.",
            ["reason"],
            registry=registry,
        )

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

    def refused(self) -> None:
        """Count a version that could not be served."""
        self.reloads.labels(outcome="refused").inc()

    def watch_queue(self, depth: Callable[[], int]) -> None:
        """Read the queue's depth at each scrape."""
        self.queue_depth.set_function(depth)
