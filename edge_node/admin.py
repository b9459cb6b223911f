"""What a node answers to operators over HTTP: /livez, /readyz, /metrics. Text from facts; no sockets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.frames import EngineState, Rates


@dataclass(frozen=True, slots=True)
class Facts:
    """A node at one moment. steps, output_tokens, restarts and dropped_frames only grow."""

    name: str
    region: str
    release: str
    variant: str
    state: EngineState
    vouched: bool
    draining: bool
    running: int
    waiting: int
    slots: int
    links: int
    steps: int
    output_tokens: int
    restarts: int
    dropped_frames: int
    rates: Rates


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    content_type: str
    body: str


def livez() -> Answer:
    return Answer(200, "text/plain; charset=utf-8", "ok\n")


def readyz(facts: Facts) -> Answer:
    """200 only when a request sent now would be worked on; else 503 and why."""
    reason = _why_not_ready(facts)
    body = {"ready": reason is None, "node": facts.name, "release": facts.release, "reason": reason or ""}
    return Answer(503 if reason else 200, "application/json", msgspec.json.encode(body).decode() + "\n")


def metrics(facts: Facts) -> Answer:
    """The Prometheus text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(facts))
    return Answer(200, CONTENT_TYPE_LATEST, generate_latest(registry).decode())


def _why_not_ready(facts: Facts) -> str | None:
    if facts.draining:
        return "draining"
    match facts.state:
        case "loading":
            return "loading"
        case "failed":
            return "engine_lost"
        case "ready":
            return None if facts.vouched else "not_vouched"


class _Collector(Collector):
    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def collect(self) -> Iterable[Metric]:
        facts = self._facts
        identity = {"node": facts.name, "region": facts.region, "release": facts.release, "variant": facts.variant}
        info = GaugeMetricFamily("edgechat_node_info", "1, with what this node is.", labels=list(identity))
        info.add_metric(list(identity.values()), 1)
        yield info
        ready = _why_not_ready(facts) is None
        yield GaugeMetricFamily("edgechat_ready", "1 when /readyz says 200.", value=int(ready))
        yield GaugeMetricFamily("edgechat_running", "Sequences in a slot.", value=facts.running)
        yield GaugeMetricFamily("edgechat_waiting", "Requests waiting for a slot.", value=facts.waiting)
        yield GaugeMetricFamily("edgechat_slots", "Sequences that fit at once.", value=facts.slots)
        yield GaugeMetricFamily("edgechat_links", "Routers connected.", value=facts.links)
        rates = facts.rates
        yield GaugeMetricFamily(
            "edgechat_prefill_tokens_per_second", "Measured; 0 = not known yet.", value=rates.prefill_tokens_s
        )
        yield GaugeMetricFamily(
            "edgechat_decode_tokens_per_second", "Measured; 0 = not known yet.", value=rates.decode_tokens_s
        )
        yield CounterMetricFamily("edgechat_engine_steps", "Engine steps, over all restarts.", value=facts.steps)
        yield CounterMetricFamily("edgechat_output_tokens", "Output ids sent to routers.", value=facts.output_tokens)
        yield CounterMetricFamily("edgechat_engine_restarts", "Engine processes that ended.", value=facts.restarts)
        yield CounterMetricFamily(
            "edgechat_dropped_frames", "Frames of dead epochs or lost links.", value=facts.dropped_frames
        )
