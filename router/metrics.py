"""What Prometheus reads from the router. Names: `edgechat_router_*`, base units, no text of conversations."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST_TOKEN_BUCKETS_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)


class Metrics:
    """One registry per router, so that two routers in one process (tests) do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.responses = self._counter("responses", "Responses that ended, by status", ["status"])
        self.output_tokens = self._counter("output_tokens", "Output ids delivered")
        self.dropped_frames = self._counter("dropped_frames", "Frames of dead epochs or unknown streams")
        self.moved_streams = self._counter(
            "moved_streams",
            "Streams taken from a node that was lost or not trusted (failover), or drains (handoff)",
            ["kind"],
        )
        self.crossed_variants = self._counter("crossed_variants", "Streams that went on with another variant")
        self.adopted = self._counter("adopted", "Responses taken over from another router or an earlier life")
        self.resumed = self._counter("resumed", "Readers that came back to a response")
        self.store_failures = self._counter("store_failures", "Batches that the store did not take whole")
        self.slow_readers = self._counter("slow_readers", "Connections closed because they read too slowly")
        self.stalled = self._counter("stalled_connections", "Connections closed because nothing was asked or taken")
        self.refusals = self._counter("refusals", "Requests refused, by code", ["code"])
        self.connections = Gauge(
            "edgechat_router_connections", "Open client connections and requests", registry=self.registry
        )
        self.running = Gauge("edgechat_router_running", "Responses in progress", registry=self.registry)
        self.nodes = Gauge("edgechat_router_nodes", "Nodes by state", ["state"], registry=self.registry)
        self.first_token_s = Histogram(
            "edgechat_router_first_token_seconds",
            "From dispatch to the first output id",
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"edgechat_router_{name}", text, labels or [], registry=self.registry)

    def on_end(self, status: str, output_tokens: int, dropped_frames: int) -> None:
        self.responses.labels(status).inc()
        self.output_tokens.inc(output_tokens)
        self.dropped_frames.inc(dropped_frames)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)
