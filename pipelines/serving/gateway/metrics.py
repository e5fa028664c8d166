"""Metrics for Prometheus: what was asked for, how long it took, and what the engines do."""

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import inf

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from t2i.pipelines.serving.gateway.log import CLIENT_GONE, LogEntry
from t2i.pipelines.serving.rows import CALL_SECONDS, ROW_COUNTS
from t2i.pipelines.serving.service import Service

# Seconds: drawings take from a second to minutes
BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
REFUSED = (401, 403, 413, 429, 503)  # statuses of requests that were turned away, not wrong in themselves


class Metrics:
    """Counts of requests, and a view of the services' own counts. `render` is what Prometheus reads."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, list_services: Callable[[], Iterable[Service]]):
        self.registry = registry = CollectorRegistry()
        registry.register(ServiceCollector(list_services))
        self.requests = Counter("t2i_requests", "Requests.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "t2i_request_seconds", "From a request to its answer's end.", ["route"], buckets=BUCKETS, registry=registry
        )
        self.queue_seconds = Histogram(
            "t2i_queue_seconds", "Wait for a turn to draw.", buckets=BUCKETS, registry=registry
        )
        self.first_preview_seconds = Histogram(
            "t2i_first_preview_seconds", "From a request to its first preview.", buckets=BUCKETS, registry=registry
        )
        self.cancelled = Counter(
            "t2i_cancelled", "Requests that ended before their answer.", ["why"], registry=registry
        )
        self.rejected = Counter("t2i_rejected", "Requests that were turned away.", ["why"], registry=registry)
        self.pictures = Counter("t2i_pictures", "Images that were drawn.", registry=registry)

    def count(self, entry: LogEntry, seconds: float) -> None:
        """Count a request that has ended."""
        self.requests.labels(entry.route, str(entry.status)).inc()
        self.seconds.labels(entry.route).observe(seconds)
        if "queue" in entry.milliseconds:
            self.queue_seconds.observe(entry.milliseconds["queue"] / 1000)
        if entry.first_preview_seconds is not None:
            self.first_preview_seconds.observe(entry.first_preview_seconds)
        if entry.status == CLIENT_GONE:
            self.cancelled.labels("disconnect").inc()
        # A turn that never came, and a server that ends, take a request away that was accepted before
        elif entry.error in ("queue_timeout", "cancelled") or entry.error == "shutting_down" and entry.milliseconds:
            self.cancelled.labels(entry.error).inc()
        elif entry.error is not None and entry.status in REFUSED:
            self.rejected.labels(entry.error).inc()
        elif entry.error is None:
            self.pictures.inc(entry.images)

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self.registry)


class ServiceCollector(Collector):
    """A collector of what services count themselves, at the moment when it is asked for."""

    def __init__(self, list_services: Callable[[], Iterable[Service]]):
        self.list_services = list_services

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all services."""
        queued = GaugeMetricFamily("t2i_queue_pictures", "Images that wait for their turn.", labels=["model"])
        running = GaugeMetricFamily("t2i_running_pictures", "Images that are drawn now.", labels=["model"])
        stepping = GaugeMetricFamily("t2i_running_rows", "Rows of the calls that run now.", labels=["model"])
        wasted = CounterMetricFamily("t2i_wasted_rows", "Rows that nobody waited for any more.", labels=["model"])
        rows = HistogramMetricFamily("t2i_batch_rows", "Rows of a call of a network.", labels=["model"])
        steps = HistogramMetricFamily("t2i_step_seconds", "A call of a network.", labels=["model", "stage"])
        for service in self.list_services():
            counts, name = service.counts, service.name
            queued.add_metric([name], service.admission.queued_images)
            running.add_metric([name], service.admission.running_images)
            stepping.add_metric([name], counts.running_rows)
            wasted.add_metric([name], counts.wasted_rows)
            rows.add_metric([name], accumulate_spread(ROW_COUNTS, counts.rows_spread), counts.rows)
            for stage, spread in counts.seconds_spread.items():
                steps.add_metric([name, stage], accumulate_spread(CALL_SECONDS, spread), counts.seconds[stage])
        yield from (queued, running, stepping, wasted, rows, steps)


def accumulate_spread(bounds: Iterable[float], spread: list[int]) -> list[tuple[str, float]]:
    """Return how many values are at most each bound, as Prometheus has histograms."""
    return [(floatToGoString(bound), float(total)) for bound, total in zip((*bounds, inf), accumulate(spread))]
