"""The fleet: what this router knows of every node, from the link's events alone.

Pure: events and monotonic seconds go in. Does not know sockets or discovery, and does not choose
(`router/policy` does).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from core.frames import SPEECH_VERSION, Hello, Status
from core.manifest import model_of

STATUS_PERIOD_S = 0.25
MISSED_STATUS = 4
# A Status that is on its way when the fourth was missed must not cost a stream: one more period of slack.
SUSPECT_AFTER_S = (MISSED_STATUS + 1) * STATUS_PERIOD_S
FORGET_DOWN_AFTER_S = 600.0
# What a node tells at most; a table that would grow past it has missed something and loses its oldest entries.
MAX_CHAINS = 4096

State: TypeAlias = Literal["down", "suspect", "loading", "ready", "failed", "draining", "incompatible"]


@dataclass(slots=True)
class Node:
    """One node as this router sees it. `url` is the link's key, `hello.name` what people read.

    dispatched: streams sent since the last Status, which that Status cannot count yet.
    chains: by prefix key, how many tokens of that beginning its prefix store holds.
    """

    url: str
    hello: Hello
    up: bool = True
    changed_at_s: float = 0.0
    status: Status | None = None
    status_at_s: float = 0.0
    dispatched: int = 0
    draining: bool = False
    rtt_s: float | None = None
    chains: dict[str, int] = field(default_factory=dict)

    @property
    def running(self) -> int:
        return (self.status.running if self.status else 0) + self.dispatched

    @property
    def waiting(self) -> int:
        return self.status.waiting if self.status else 0

    @property
    def occupied(self) -> int:
        """Streams that have or want a slot."""
        return self.running + self.waiting

    @property
    def pressing(self) -> int:
        """Streams that have or want a slot and give it to nobody."""
        return self.occupied - (self.status.yielding if self.status else 0)

    @property
    def slots(self) -> int:
        return self.hello.slots

    def resident_tokens(self, prefix_keys: Sequence[str]) -> int:
        """Tokens of a conversation's beginning that need not be read here."""
        return next((self.chains[key] for key in reversed(prefix_keys) if key in self.chains), 0)

    def remember(self, chains: Iterable[tuple[str, int]]) -> None:
        """Take over what has changed in the node's prefix store; no tokens = gone."""
        for key, tokens in chains:
            self.chains.pop(key, None)
            if tokens > 0:
                self.chains[key] = tokens
        while len(self.chains) > MAX_CHAINS:
            del self.chains[next(iter(self.chains))]

    def state(self, now_s: float) -> State:
        if not self.up:
            return "down"
        if self.hello.speech_version != SPEECH_VERSION:
            return "incompatible"
        if self.status is None:
            return "loading"
        if now_s - self.status_at_s > SUSPECT_AFTER_S or not self.status.vouched:
            return "suspect"
        if self.status.state == "ready" and (self.draining or self.status.draining):
            return "draining"
        return self.status.state

    @property
    def life(self) -> tuple[str, int]:
        """Which run of the node and of its engine this is; (instance, 0) while the engine is not known."""
        return self.hello.instance, self.status.engine_pid if self.status else 0

    def variant_of(self, release: str) -> str:
        """The recipe of a release that it serves."""
        return dict(zip(self.hello.releases, self.hello.variants, strict=False)).get(release, "")

    def release_for(self, model: str) -> str | None:
        """The release that serves `model`: an alias, or a release named in full."""
        return next((r for r in self.hello.releases if model in (r, model_of(r))), None)


class NodeRow(msgspec.Struct, frozen=True):
    """A node as `/fleet` shows it."""

    name: str
    region: str
    url: str
    state: State
    release: str
    variant: str
    releases: list[str]
    pid: int
    engine_pid: int
    running: int
    waiting: int
    slots: int
    context_tokens: int
    load: float
    prefill_tokens_s: float
    decode_tokens_s: float
    rtt_ms: float | None
    chains: int


@dataclass(slots=True)
class Fleet:
    """Invariant: at most one Node per url; a Node outlives its link, so that its models stay known."""

    nodes: dict[str, Node] = field(default_factory=dict)

    def on_up(self, url: str, hello: Hello, now_s: float) -> None:
        self.nodes[url] = Node(url, hello, changed_at_s=now_s)

    def on_down(self, url: str, now_s: float) -> None:
        if node := self.nodes.get(url):
            node.up, node.status, node.dispatched, node.changed_at_s = False, None, 0, now_s
            node.chains.clear()

    def on_rtt(self, url: str, rtt_s: float) -> None:
        if node := self.nodes.get(url):
            node.rtt_s = rtt_s

    def on_status(self, url: str, status: Status, now_s: float) -> None:
        if node := self.nodes.get(url):
            node.status, node.status_at_s, node.dispatched = status, now_s, 0
            node.remember(status.chains)

    def on_drain(self, url: str) -> None:
        if node := self.nodes.get(url):
            node.draining = True

    def on_dispatch(self, url: str) -> None:
        if node := self.nodes.get(url):
            node.dispatched += 1

    def forgive(self, seconds: float) -> None:
        """This router stood still for so long: what it has not heard was said all the same."""
        for node in self.nodes.values():
            node.status_at_s += seconds

    def forget_long_gone(self, now_s: float) -> None:
        """Drop nodes whose link has been down for `FORGET_DOWN_AFTER_S`: the table stays as small as the fleet."""
        for url, node in list(self.nodes.items()):
            if not node.up and now_s - node.changed_at_s > FORGET_DOWN_AFTER_S:
                del self.nodes[url]

    def ready(self, now_s: float) -> list[Node]:
        """The nodes that may be given a stream."""
        return [node for node in self.nodes.values() if node.state(now_s) == "ready"]

    def untrusted(self, now_s: float) -> set[str]:
        """Nodes that must not keep a stream although their link is up."""
        keeps: set[State] = {"ready", "draining"}
        return {url for url, node in self.nodes.items() if node.state(now_s) not in keeps}

    def leaving(self, now_s: float) -> set[str]:
        """Nodes that go on with what they have, and want to be rid of it."""
        return {url for url, node in self.nodes.items() if node.state(now_s) == "draining"}

    def models(self) -> list[str]:
        """Aliases of every release that some node has announced, ready or not."""
        return aliases(release for node in self.nodes.values() for release in node.hello.releases)

    def served(self, now_s: float) -> list[str]:
        """Aliases that can be answered right now."""
        return aliases(release for node in self.ready(now_s) for release in node.hello.releases)

    def knows(self, model: str) -> bool:
        return any(node.release_for(model) for node in self.nodes.values())

    def rows(self, now_s: float) -> list[NodeRow]:
        return [_row(node, now_s) for node in sorted(self.nodes.values(), key=lambda node: (node.hello.name, node.url))]


def aliases(releases: Iterable[str]) -> list[str]:
    return sorted({model_of(release) for release in releases})


def _row(node: Node, now_s: float) -> NodeRow:
    hello, status = node.hello, node.status
    return NodeRow(
        name=hello.name,
        region=hello.region,
        url=node.url,
        state=node.state(now_s),
        release=hello.releases[0] if hello.releases else "",
        variant=hello.variants[0] if hello.variants else "",
        releases=hello.releases,
        pid=hello.pid,
        engine_pid=status.engine_pid if status else 0,
        running=node.running,
        waiting=node.waiting,
        slots=node.slots,
        context_tokens=hello.context_tokens,
        load=status.load if status else 0.0,
        prefill_tokens_s=status.rates.prefill_tokens_s if status else 0.0,
        decode_tokens_s=status.rates.decode_tokens_s if status else 0.0,
        rtt_ms=None if node.rtt_s is None else round(node.rtt_s * 1000, 3),
        chains=len(node.chains),
    )
