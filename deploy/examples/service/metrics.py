"""What the service counts, in Prometheus' format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Requests and batches.

    Args:
        inside: how many requests are in the service now.
    """

    def __init__(self, inside: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("vitprune_requests", "Answered requests.", ["code"], registry=registry)
        self._request_s = Histogram(
            "vitprune_request_seconds", "From a request to its answer.", buckets=SECONDS, registry=registry
        )
        self._images = Histogram("vitprune_batch_images", "Images in a batch.", buckets=BATCHES, registry=registry)
        self._batch_s = Histogram(
            "vitprune_batch_seconds", "A batch's time in the engine.", buckets=SECONDS, registry=registry
        )
        Gauge("vitprune_requests_inside", "Requests in the service.", registry=registry).set_function(inside)

    def answered(self, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(status).inc()
        self._request_s.observe(seconds)

    @contextlib.contextmanager
    def batch(self, images: int) -> Iterator[None]:
        """Counts the batch that runs inside."""
        self._images.observe(images)
        with self._batch_s.time():
            yield

    async def page(self) -> Response:
        """All of it, for Prometheus to fetch."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
