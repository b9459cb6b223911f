"""The node's parent process: puts link, engine process, Consul and HTTP together.

Decisions are elsewhere (supervision, switchboard); here events are carried from one to the other. Does not
know models, tokens or prompts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, assert_never

from core.errors import EdgechatError
from core.frames import (
    PROTOCOL,
    SPEECH_VERSION,
    Cancel,
    Drain,
    Failed,
    Generate,
    Hello,
    Status,
)
from core.manifest import Manifest
from core.settings import is_loopback
from edge_node.admin import Facts
from edge_node.config import EdgeSettings, advertised
from edge_node.link import LinkServer
from edge_node.registry import Registry, Service
from edge_node.residents import ResidentTable
from edge_node.runtime.child import EngineProcess
from edge_node.runtime.pipe import Beat, Fatal, Load, Loaded, Outputs, Residents, ToParent
from edge_node.supervision import Patience, Supervisor
from edge_node.switchboard import LinkId, StreamFrame, Switchboard

log = logging.getLogger("edge_node.node")

STATUS_S = 0.25

Spawn: TypeAlias = Callable[[], Awaitable[EngineProcess]]


class Node:
    """One node serving one release.

    Invariant: streams are in the switchboard only while an engine process lives that is not to be killed; `_no_streams`
    is set exactly while there are none.
    """

    def __init__(self, settings: EdgeSettings, manifest: Manifest, spawn: Spawn, secret: str) -> None:
        self.instance = secrets.token_hex(4)
        self._settings = settings
        self._manifest = manifest
        self._spawn = spawn
        self._context_tokens = min(settings.engine.context_tokens, manifest.context_tokens)
        self._supervisor = Supervisor(Patience(settings.node.load_s, settings.node.hang_s), time.monotonic())
        self._streams = Switchboard()
        self._no_streams = asyncio.Event()
        self._no_streams.set()
        self._residents = ResidentTable()
        self._links = LinkServer(
            self,
            secret,
            metrics_open=is_loopback(settings.listen.host),
            certificates=bool(settings.link.client_ca),
        )
        self._engine: EngineProcess | None = None
        self._stop = asyncio.Event()
        self._draining = False
        self._ever_ready = False
        self._output_tokens = 0
        self._steps_before = 0

    async def run(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Serve until `stop`; raises EdgechatError when the first engine process says that it cannot serve."""
        await self._links.start(listener, tls)
        host, port = listener.getsockname()[:2]
        log.info("listening host=%s port=%d tls=%s release=%s", host, port, tls is not None, self._manifest.release)
        registry = self._make_registry(port, tls is not None)
        serving = [
            asyncio.create_task(job) for job in (self._keep_engine(), self._keep_telling(), self._until_stopped())
        ]
        registering = asyncio.create_task(registry.run()) if registry else None
        try:
            done, _ = await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
            if registry and registering:
                registering.cancel()
                await asyncio.gather(registry.deregister(), self._drain())
            else:
                await self._drain()
        finally:
            await self._leave(serving)
        for task in done:
            task.result()

    def stop(self) -> None:
        """Begin to shut down: drain, deregister, end."""
        self._stop.set()

    async def _until_stopped(self) -> None:
        await self._stop.wait()

    # -- shutting down ---------------------------------------------------------------------------

    async def _drain(self) -> None:
        """No new streams; those that run get `drain_s` to end here or to be taken elsewhere, then fail retryably."""
        drain_s = self._settings.node.drain_s
        log.info("draining streams=%d drain_s=%g", len(self._streams), drain_s)
        self._draining = True
        self._tell_all()
        self._links.send_all(Drain(drain_s))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._no_streams.wait()
        sentence = f"The node {self._name!r} shut down before the answer was complete; send the request again."
        self._send(self._streams.fail_all("draining", sentence))

    async def _leave(self, serving: list[asyncio.Task[None]]) -> None:
        """Close the links, and see the engine process end."""
        for task in serving:
            task.cancel()
        await self._links.close()
        await asyncio.wait(serving)
        log.info("stopped")

    # -- the engine process ----------------------------------------------------------------------

    async def _keep_engine(self) -> None:
        """Keep one engine process alive, one life after another; raises what the first one could not be started for."""
        while True:
            await asyncio.sleep(max(0.0, self._supervisor.retry_at_s - time.monotonic()))
            try:
                engine = await self._spawn()
            except OSError as error:
                log.error("engine_not_started error=%r", str(error))
                self._supervisor.ended(time.monotonic())
                continue
            await self._one_life(engine)

    async def _one_life(self, engine: EngineProcess) -> None:
        log.info("engine_started pid=%d", engine.pid)
        self._engine = engine
        self._supervisor.started(time.monotonic())
        engine.send(self._load())
        try:
            # One that is to be killed is not listened to any more.
            while (message := await engine.receive()) is not None and self._engine is engine:
                self._on_engine(message)
        finally:
            self._lose_engine("engine_lost", "stopped")
            how = await engine.end()
            log.log(logging.INFO if self._draining else logging.ERROR, "engine_ended pid=%d how=%r", engine.pid, how)

    def _on_engine(self, message: ToParent) -> None:
        now_s = time.monotonic()
        match message:
            case Beat():
                self._supervisor.beat(message, now_s)
            case Outputs():
                self._output_tokens += sum(len(row.ids) for row in message.rows)
                self._send(self._streams.route(message))
            case Residents(chains):
                self._residents.update(chains)
            case Loaded(load_s):
                self._ever_ready = True
                self._supervisor.loaded(now_s)
                log.info("engine_ready load_s=%.2f", load_s)
                self._tell_all()
            case Fatal(code, sentence):
                if not self._ever_ready:
                    error = EdgechatError(sentence)
                    error.code = code
                    raise error
                log.error("engine_fatal code=%s error=%r", code, sentence)
            case _:
                assert_never(message)

    def _lose_engine(self, code: str, what: str) -> None:
        """It has ended or is to be killed: nothing more comes of its streams. Does nothing the second time.

        code: what its streams fail with: `engine_lost` may be a request's doing, `engine_stalled` is the machine's.
        """
        if self._engine is None:
            return
        self._engine = None
        self._steps_before += self._supervisor.step
        self._supervisor.ended(time.monotonic())
        self._residents.clear()
        if len(self._streams):
            log.warning("streams_lost count=%d code=%s", len(self._streams), code)
        sentence = f"The engine of node {self._name!r} {what} while it was answering; send the request again."
        self._send(self._streams.fail_all(code, sentence))
        self._tell_all()

    def _load(self) -> Load:
        engine = self._settings.engine
        return Load(
            folder=self._settings.node.release,
            release=self._manifest.release,
            variant=self._manifest.variant,
            device=engine.device,
            threads=engine.threads or len(os.sched_getaffinity(0)),
            slots=engine.slots,
            context_tokens=self._context_tokens,
            max_waiting=engine.max_waiting,
            max_stall_ms=engine.max_stall_ms,
            kv_cache_bytes=engine.kv_cache_bytes,
            speculation=engine.speculation,
            spin_us=engine.spin_us,
            verify=engine.verify,
            failover_exact_s=engine.failover_exact_s,
        )

    def _tell_all(self) -> None:
        self._links.send_all(self._status(self._residents.news()))

    async def _keep_telling(self) -> None:
        """Every STATUS_S: tell the routers how this node is, and kill an engine process that hangs."""
        while True:
            why = self._supervisor.why_kill(time.monotonic())
            if why is not None and self._engine is not None:
                log.error("engine_killed pid=%d why=%r", self._engine.pid, why)
                self._engine.kill()
                # Now, not when it is gone: the kernel may wait long for a process that hangs in a driver.
                self._lose_engine("engine_stalled", "hung")
            self._tell_all()
            await asyncio.sleep(STATUS_S)

    # -- what routers ask ------------------------------------------------------------------------

    def on_generate(self, link: LinkId, request: Generate) -> None:
        engine = self._engine
        refusal = self._refusal(request, engine)
        if refusal is not None:
            code, sentence = refusal
            self._links.send(link, [Failed(request.stream, request.epoch, code, True, sentence)])
        elif engine is not None:
            self._send(self._streams.contest(link, request))
            if self._streams.admit(link, request):
                self._no_streams.clear()
                engine.send(request)

    def on_cancel(self, link: LinkId, cancel: Cancel) -> None:
        self._tell_engine(self._streams.cancel(link, cancel))

    def on_link_lost(self, link: LinkId) -> None:
        self._tell_engine(self._streams.drop_link(link))
        self._note_whether_streams()

    def _tell_engine(self, cancels: list[Cancel]) -> None:
        if self._engine is not None:
            for cancel in cancels:
                self._engine.send(cancel)

    def _refusal(self, request: Generate, engine: EngineProcess | None) -> tuple[str, str] | None:
        """Code and sentence for a request that may be tried elsewhere."""
        node = f"node {self._name!r}"
        # What goes on from elsewhere was sent before its router knew; refused, it might have nowhere to go.
        if self._draining and request.epoch == 1:
            return "draining", f"The {node} is shutting down; send the request to another."
        if request.release != self._manifest.release:
            served = self._manifest.release
            return "model_not_found", f"The {node} serves {served}, not {request.release}; send the request to another."
        if engine is None or self._supervisor.phase != "ready":
            return "overloaded", f"The engine of {node} is not running yet; try another node, or this one later."
        if engine.backed_up:
            return "overloaded", f"The engine of {node} has too much to read; try another node, or this one later."
        return None

    def _send(self, routed: dict[LinkId, list[StreamFrame]]) -> None:
        for link, frames in routed.items():
            self._links.send(link, frames)
        self._note_whether_streams()

    def _note_whether_streams(self) -> None:
        """After whatever may have taken the last one away."""
        if not len(self._streams):
            self._no_streams.set()

    # -- what the node says of itself ------------------------------------------------------------

    @property
    def _name(self) -> str:
        return self._settings.node.name

    def hello(self) -> Hello:
        return Hello(
            PROTOCOL,
            self._name,
            self.instance,
            self._settings.node.region,
            releases=[self._manifest.release],
            variants=[self._manifest.variant],
            context_tokens=self._context_tokens,
            slots=self._settings.engine.slots,
            speech_version=SPEECH_VERSION,
            pid=os.getpid(),
        )

    def first_status(self) -> Status:
        """For a link that knows nothing yet."""
        return self._status(chains=self._residents.told())

    def echo(self, nonce: int) -> Status:
        """The answer to a Ping."""
        return self._status(echo=nonce)

    def _status(self, chains: Sequence[tuple[str, int]] = (), echo: int = 0) -> Status:
        """load counts what was admitted, so it is right at once; running and waiting are the last beat's."""
        supervisor = self._supervisor
        return Status(
            load=len(self._streams) / self._settings.engine.slots,
            running=supervisor.running,
            waiting=supervisor.waiting,
            rates=supervisor.rates,
            chains=list(chains),
            vouched=supervisor.vouched(time.monotonic()),
            draining=self._draining,
            state=supervisor.state,
            engine_pid=0 if self._engine is None else self._engine.pid,
            echo=echo,
            yielding=supervisor.yielding,
        )

    def facts(self) -> Facts:
        supervisor = self._supervisor
        return Facts(
            name=self._name,
            region=self._settings.node.region,
            release=self._manifest.release,
            variant=self._manifest.variant,
            state=supervisor.state,
            vouched=supervisor.vouched(time.monotonic()),
            draining=self._draining,
            running=supervisor.running,
            waiting=supervisor.waiting,
            slots=self._settings.engine.slots,
            links=len(self._links),
            steps=self._steps_before + supervisor.step,
            output_tokens=self._output_tokens,
            restarts=supervisor.restarts,
            dropped_frames=self._streams.dropped,
            rates=supervisor.rates,
        )

    def _make_registry(self, port: int, tls: bool) -> Registry | None:
        url = self._settings.discovery.consul
        if not url:
            return None
        host, port = advertised(self._settings, port)
        meta = {
            "name": self._name,
            "scheme": "wss" if tls else "ws",
            "region": self._settings.node.region,
            "release": self._manifest.release,
            "variant": self._manifest.variant,
            "instance": self.instance,
        }
        return Registry(url, Service(f"{self._name}-{self.instance}", host, port, meta, tls))
