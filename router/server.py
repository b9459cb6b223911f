"""One router process from start to stop: links, discovery, store, sessions and the port, tied together."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from core.errors import ConfigError, StoreUnavailable
from core.frames import PROTOCOL, Hello
from router.auth import Keyring
from router.config import Config, LinkSection, Listen, advertised
from router.dispatch import Dispatcher
from router.finder import Finder
from router.fleet import STATUS_PERIOD_S, Fleet
from router.http.app import make_app
from router.http.context import Context
from router.http.websocket import DRAIN_CODE
from router.journal import LEASE_S, Store
from router.keeper import Keeper
from router.link import LinkEvent, LinkPool
from router.metrics import Metrics
from router.peers import Peers
from router.registry import ConsulRegistry, Registry, RouterService, StaticRegistry
from router.salts import salts
from router.session import Instant
from router.sessions import Links, Sessions
from router.shelf import Shelf
from router.store.opening import open_store

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
# A tick that is so late says that the whole process was.
STOOD_STILL_S = 1.0
# aiohttp would let a client hold a connection for an hour between two requests.
KEEP_ALIVE_S = 75.0


def now() -> Instant:
    return Instant(time.monotonic(), int(time.time()))


def make_context(
    config: Config, secret: str, links: Links, store: Store, clock: Callable[[], Instant] = now
) -> Context:
    """Tie the parts together; `links`, `store` and `clock` may be fakes."""
    fleet, metrics, shelf, salt_of = Fleet(), Metrics(), Shelf(store), salts(secret)
    keeper = Keeper(store, metrics.store_failures.inc)
    sessions = Sessions(
        links,
        fleet,
        keeper.journal,
        metrics,
        clock,
        orphan_grace_s=config.session.orphan_grace_s,
        failover_wait_s=config.session.failover_wait_s,
        salt_of=salt_of,
    )
    routers = Peers(secret, link_tls(config.link))
    finder = Finder(config.router.name, sessions, shelf, routers, patience_s=config.session.resume_wait_s)
    dispatcher = Dispatcher(config.router.name, fleet, sessions, finder.record, clock, salt_of)
    return Context(
        config=config,
        keyring=Keyring(config.auth),
        fleet=fleet,
        sessions=sessions,
        dispatcher=dispatcher,
        store=shelf,
        keeper=keeper,
        routers=routers,
        finder=finder,
        link_secret=secret,
        metrics=metrics,
        now=clock,
    )


async def run(config: Config, secret: str) -> None:
    """Serve until SIGTERM or SIGINT; raises ConfigError when something needed at the start cannot be had."""
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            # Asked twice, it is not to wait for anything; what is stored is gone on with all the same.
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    async with serving(config, secret) as port:
        scheme = "https" if config.listen.tls_cert else "http"
        log.info("router %s listens at %s://%s:%d", config.router.name, scheme, config.listen.host, port)
        await stop.wait()
        log.info("router %s is shutting down", config.router.name)


@asynccontextmanager
async def serving(config: Config, secret: str) -> AsyncIterator[int]:
    """A router from its first to its last connection; yields the port that was bound."""
    instance = secrets.token_hex(4)
    store = await open_store(config.store, config.router.name, instance)
    hello = Hello(PROTOCOL, config.router.name, instance, config.router.region)
    links = LinkPool(hello, secret, lambda event: _hand_on(context, event), ssl_context=link_tls(config.link))
    context = make_context(config, secret, links, store)
    held, adopt = context.sessions.__contains__, context.sessions.adopt
    # What an earlier life was answering is in the table before its clients can ask for it.
    await context.keeper.look_once(held, adopt)
    keeping = asyncio.create_task(context.keeper.keep(held, adopt), name="keeper")
    try:
        async with listening(context) as port:
            registry = make_registry(config, instance, port)
            tasks = [
                asyncio.create_task(registry.run(links.set_addresses, context.routers.set_addresses), name="discovery"),
                asyncio.create_task(_tick(context), name="tick"),
            ]
            try:
                yield port
            finally:
                context.dispatcher.draining = True
                await registry.close()
                await _end(tasks)
    finally:
        # The lease is kept until nothing is answered any more.
        await _end([keeping])
        await context.routers.close()
        await links.close()
        await _let_go(store)
        await store.close()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _let_go(store: Store) -> None:
    try:
        await store.release()
    except StoreUnavailable as error:
        log.warning("%s What this router was answering is free in %g s.", error.message, LEASE_S)


@asynccontextmanager
async def listening(context: Context) -> AsyncIterator[int]:
    """The port alone, without links and discovery; on leaving, every client is told to go (1012)."""
    # A handler must notice that its client went away, or nobody would cancel the generation.
    runner = web.AppRunner(
        make_app(context),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=CLOSE_TIMEOUT_S,
        keepalive_timeout=KEEP_ALIVE_S,
    )
    await runner.setup()
    listen = context.config.listen
    try:
        site = web.TCPSite(runner, listen.host, listen.port, ssl_context=listen_tls(listen))
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(_port_problem(listen, error)) from error
        context.clients = lambda: runner.server.connections if runner.server else ()
        yield runner.addresses[0][1]
        context.dispatcher.draining = True
        await site.stop()
        for peer in list(context.peers):
            await peer.close(DRAIN_CODE)
        # Streams that are passed on from other routers end with the connections to those.
        await context.routers.close()
        context.sessions.suspend()
        await context.keeper.drain()
    finally:
        await runner.cleanup()


def make_registry(config: Config, instance: str, port: int) -> Registry:
    """Consul when it is configured, else the static list; raises ConfigError."""
    discovery = config.discovery
    if not discovery.consul:
        return StaticRegistry(discovery.static, discovery.routers, config.router.name)
    host, advertised_port = advertised(config, port)
    service = RouterService(
        name=config.router.name,
        instance=instance,
        region=config.router.region,
        host=host,
        port=advertised_port,
        tls=bool(config.listen.tls_cert),
    )
    return ConsulRegistry(discovery.consul, service)


async def _tick(context: Context) -> None:
    ticked_at_s = time.monotonic()
    while True:
        await asyncio.sleep(STATUS_PERIOD_S)
        late_s, ticked_at_s = time.monotonic() - ticked_at_s - STATUS_PERIOD_S, time.monotonic()
        try:
            if late_s > STOOD_STILL_S:
                log.warning("this router stood still for %.1f s", late_s)
                context.forgive(late_s)
            context.on_tick()
        except Exception:
            # One response's trouble must not stop the watch over all others.
            log.exception("the router's timer stumbled")


def _hand_on(context: Context, event: LinkEvent) -> None:
    context.sessions.on_link_event(event)


def listen_tls(listen: Listen) -> ssl.SSLContext | None:
    """For the port, None = plain; raises ConfigError."""
    if not listen.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"`listen.tls_cert` {listen.tls_cert} cannot be used: {error}.") from error
    return context


def link_tls(link: LinkSection) -> ssl.SSLContext:
    """For links to nodes that speak TLS: whom to believe, and what to show; raises ConfigError."""
    try:
        context = ssl.create_default_context(cafile=link.tls_ca or None)
        if link.tls_cert:
            context.load_cert_chain(link.tls_cert, link.tls_key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(filter(None, (link.tls_ca, link.tls_cert, link.tls_key)))
        raise ConfigError(f"The certificates of [link] ({files}) cannot be used: {error}.") from error
    return context


def _port_problem(listen: Listen, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {listen.port} on {listen.host} is taken; stop what listens there, or set `listen.port`."
    return f"The router cannot listen on {listen.host}:{listen.port}: {error.strerror or error}."
