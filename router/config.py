"""What an operator can set: router.toml as Structs, and the checks that no single field can make.

Does not read files or the environment (`router/__main__` hands both in).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from core.errors import ConfigError
from core.settings import host_and_port, is_loopback, load_settings

Role: TypeAlias = Literal["chat", "admin"]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]

MIB = 1024 * 1024
_NAME = re.compile(r"[a-z0-9-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]+")


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class RouterSection(_Section, frozen=True):
    """name: part of every response id, so that any router knows whose response it is."""

    name: str = "router"
    region: str = ""


class Listen(_Section, frozen=True):
    """allowed_origins: pages of other sites that may use this router, as browsers write them ("https://a.example")."""

    host: str = "127.0.0.1"
    port: Port = 8080
    tls_cert: str = ""
    tls_key: str = ""
    allowed_origins: list[str] = []
    compression: bool = False


class LinkSection(_Section, frozen=True):
    """secret_file: the bearer secret of the router-node link, shared by all routers and nodes.

    For nodes that speak TLS (wss), tls_ca: who signs their certificates, empty = whom this system trusts;
    tls_cert, tls_key: our own certificate, for nodes that ask for one.
    """

    secret_file: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""


class Discovery(_Section, frozen=True):
    """consul: its HTTP address; empty = the static lists serve. advertise: host or host:port that others see.

    routers: others, as `name=http://host:port`; one without a name is only shown to clients.
    """

    consul: str = ""
    static: list[str] = []
    routers: list[str] = []
    advertise: str = ""


class StoreSection(_Section, frozen=True):
    """path: of the SQLite file, while redis (redis:// or rediss://) and redis_file (which holds such a line) are empty.

    durability: what a response survives once a client saw of it: a killed process, or a power cut too (SQLite only).
    keep_days, max_bytes: finished responses that are older, or that no longer fit, are forgotten; 0 = no bound.
    """

    path: str = "data/router.sqlite"
    redis: str = ""
    redis_file: str = ""
    redis_prefix: str = "edgechat"
    durability: Literal["process", "power"] = "process"
    keep_days: Annotated[float, Meta(ge=0, le=36_500)] = 30.0
    max_bytes: Annotated[int, Meta(ge=0)] = 10 * 1024 * MIB


class Defaults(_Section, frozen=True):
    """What a request that does not say gets. model: of the plain shim; empty = the first that is served."""

    model: str = ""
    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    max_output_tokens: Positive = 1024


class Limits(_Section, frozen=True):
    max_frame_bytes: Positive = MIB
    max_connections: Positive = 10_000
    max_queued_per_connection: Positive = 16
    max_lanes_per_connection: Positive = 16
    connection_life_s: Positive = 3600
    slow_reader_bytes: Positive = MIB
    slow_reader_s: Positive = 20


class SessionSection(_Section, frozen=True):
    """orphan_grace_s: how long a stored response goes on after its last reader left. failover_wait_s: how long an
    answer that has lost its node waits for another. resume_wait_s: how long a client that comes back for a response
    waits while the router that has it cannot be reached; one that died has lost it after six seconds (its lease)."""

    orphan_grace_s: Annotated[float, Meta(ge=0)] = 30.0
    failover_wait_s: Annotated[float, Meta(ge=0, le=3600)] = 15.0
    resume_wait_s: Annotated[float, Meta(ge=0, le=60)] = 8.0


class Key(_Section, frozen=True):
    """An API key by its digest: `printf %s "$KEY" | sha256sum`."""

    id: str
    sha256: str
    tenant: str
    roles: list[Role]


class Auth(_Section, frozen=True):
    """dev_key: accept the key `dev` with both roles; only while listening on loopback."""

    dev_key: bool = False
    keys: list[Key] = []


class Config(_Section, frozen=True):
    router: RouterSection = RouterSection()
    listen: Listen = Listen()
    link: LinkSection = LinkSection()
    discovery: Discovery = Discovery()
    store: StoreSection = StoreSection()
    defaults: Defaults = Defaults()
    limits: Limits = Limits()
    session: SessionSection = SessionSection()
    auth: Auth = Auth()


def load_config(text: str, environ: Mapping[str, str], where: str) -> Config:
    """Read router.toml with ROUTER__SECTION__KEY laid over it; raises ConfigError naming the key."""
    config = load_settings(Config, text, environ, prefix="ROUTER", where=where)
    _check(config)
    return config


class NamedRouter(NamedTuple):
    """A router's name and its `http://host:port`."""

    name: str
    url: str


def named_routers(entries: Iterable[str]) -> list[NamedRouter]:
    """Those of `[discovery] routers` that have a name, each name once; raises ConfigError for a misshapen one."""
    found: dict[str, NamedRouter] = {}
    for entry in entries:
        if not _has_name(entry):
            continue
        name, _, url = entry.partition("=")
        if not is_router_name(name) or not _is_base_url(url) or name in found:
            sentence = f"`discovery.routers` has {entry!r}; write each router once, as name=http://host:port."
            raise ConfigError(sentence)
        found[name] = NamedRouter(name, url.rstrip("/"))
    return list(found.values())


def nameless_routers(entries: Iterable[str]) -> list[str]:
    """Those of `[discovery] routers` that have no name: for clients only."""
    return [entry for entry in entries if not _has_name(entry)]


def _has_name(entry: str) -> bool:
    """A URL may have a `=` too, but not before its scheme."""
    before, equals, _ = entry.partition("=")
    return bool(equals) and "://" not in before


def is_router_name(name: str) -> bool:
    """Whether it can stand in a response's id."""
    return _NAME.fullmatch(name) is not None


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in {"http", "https"}
            and bool(parts.hostname)
            and parts.port != 0
            and parts.path in {"", "/"}
            and not (parts.query or parts.fragment or parts.username)
        )
    except ValueError:
        return False


def advertised(config: Config, port: int) -> tuple[str, int]:
    """Host and port that others reach this router at; `port` is the one it listens on."""
    advertise = config.discovery.advertise
    return host_and_port(advertise, port) if advertise else (config.listen.host, port)


def _check(config: Config) -> None:
    if not is_router_name(config.router.name):
        raise ConfigError(f"`router.name` is {config.router.name!r}; use only a-z, 0-9 and `-`.")
    if bool(config.listen.tls_cert) != bool(config.listen.tls_key):
        raise ConfigError("`listen.tls_cert` and `listen.tls_key` belong together; set both or neither.")
    if bool(config.link.tls_cert) != bool(config.link.tls_key):
        raise ConfigError("`link.tls_cert` and `link.tls_key` belong together; set both or neither.")
    for url in config.discovery.static:
        if not url.startswith(("ws://", "wss://")):
            raise ConfigError(f"`discovery.static` has {url!r}; write ws://host:port or wss://host:port.")
    named_routers(config.discovery.routers)
    _check_advertised(config)
    _check_store(config.store)
    for key in config.auth.keys:
        if not _SHA256.fullmatch(key.sha256):
            raise ConfigError(f"`auth.keys` entry {key.id!r} has no SHA-256 of 64 hex digits; see `sha256sum`.")
    if not config.auth.dev_key and not config.auth.keys:
        raise ConfigError("No key could ever be accepted; list some under [[auth.keys]], or set `auth.dev_key`.")
    if not is_loopback(config.listen.host):
        _check_public(config)


def _check_advertised(config: Config) -> None:
    discovery, host = config.discovery, config.listen.host
    try:
        advertised(config, config.listen.port)
    except ValueError:
        raise ConfigError(
            f"`discovery.advertise` is {discovery.advertise!r}; write host, host:port or [ipv6]:port."
        ) from None
    if discovery.consul and not discovery.advertise and host in {"", "0.0.0.0", "::"}:
        raise ConfigError(
            f"The router listens on {host!r} and registers in Consul without `discovery.advertise`; set the address "
            "that others reach it at."
        )


def is_redis_url(url: str) -> bool:
    """Whether it is redis:// or rediss:// with a host, and a port that can be."""
    try:
        parts = urlsplit(url)
        return parts.scheme in {"redis", "rediss"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _check_store(store: StoreSection) -> None:
    if store.redis and store.redis_file:
        raise ConfigError("`store.redis` and `store.redis_file` both name a Redis; set one of them.")
    if store.redis and not is_redis_url(store.redis):
        # Not repeated: there may be a password in it.
        raise ConfigError("`store.redis` is no address of a Redis; write redis://host:port/db, or rediss:// for TLS.")
    if not _PREFIX.fullmatch(store.redis_prefix):
        raise ConfigError(f"`store.redis_prefix` is {store.redis_prefix!r}; use only letters, digits and `-_.:`.")
    if store.durability == "power" and (store.redis or store.redis_file):
        raise ConfigError(
            "`store.durability` is for SQLite alone; what survives in a Redis is set there (`appendfsync`): remove it."
        )
    if 0 < store.max_bytes < MIB:
        raise ConfigError(f"`store.max_bytes` is {store.max_bytes}; give it at least {MIB}, or 0 for no bound.")


def _check_public(config: Config) -> None:
    host = config.listen.host
    if config.auth.dev_key:
        raise ConfigError(f"`auth.dev_key` is set while listening on {host}; remove it or listen on 127.0.0.1.")
    if not config.link.secret_file:
        raise ConfigError(f"`link.secret_file` is missing while listening on {host}; name one or listen on 127.0.0.1.")
