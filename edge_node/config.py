"""The node's settings: what may be set, within which bounds, and what may not be combined.

Reads no file and no environment: `__main__` hands in the text, and reads the secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from core.errors import ConfigError
from core.settings import host_and_port, is_loopback, load_settings

PREFIX = "EDGE"
# Bridges the gaps between operators, and takes little from others on the same cores; docs/decisions/028.
SPIN_US = 20

Name: TypeAlias = Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,64}$")]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=86_400.0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class NodeSection(_Section, frozen=True):
    """drain_s: time that running answers get at shutdown. hang_s: a child that is not vouched for this long is killed.
    load_s: the longest a release may take to load."""

    name: Name
    region: Name
    release: str
    drain_s: Seconds = 5.0
    hang_s: Annotated[float, Meta(gt=0.0, le=3600.0)] = 30.0
    load_s: Annotated[float, Meta(gt=0.0, le=3600.0)] = 300.0


class ListenSection(_Section, frozen=True):
    """Port 0 takes any free port, which the log names."""

    host: str = "127.0.0.1"
    port: Port = 8081
    tls_cert: str = ""
    tls_key: str = ""


class LinkSection(_Section, frozen=True):
    """client_ca: routers must show a certificate signed by it, too (mutual TLS); empty = the secret is enough."""

    secret_file: str = ""
    client_ca: str = ""


class DiscoverySection(_Section, frozen=True):
    """consul: URL of the agent, empty for none. advertise: host or host:port that routers reach this node at."""

    consul: str = ""
    advertise: str = ""


class EngineSection(_Section, frozen=True):
    """threads 0: one per core that this process may use. max_stall_ms 0: the engine's own default. spin_us: how long a
    thread waits awake for the next operator of a step.

    kv_cache_bytes: prefix blocks beside the slots, which conversations come back to; 0 = nothing is kept.
    speculation: whether drafts are tried where they pay. failover_exact_s: an answer that was begun elsewhere goes on
    exactly as it would have there, unless that takes so long before its next id.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    slots: Annotated[int, Meta(ge=1, le=1024)] = 8
    context_tokens: Annotated[int, Meta(ge=16, le=1_048_576)] = 4096
    max_waiting: Annotated[int, Meta(ge=0, le=65536)] = 64
    max_stall_ms: Annotated[float, Meta(ge=0.0, le=60_000.0)] = 0.0
    kv_cache_bytes: Annotated[int, Meta(ge=0, le=1 << 42)] = 1 << 30
    speculation: bool = True
    failover_exact_s: Seconds = 0.1
    spin_us: Annotated[int, Meta(ge=0, le=10_000)] = SPIN_US
    verify: bool = True


class LogSection(_Section, frozen=True):
    level: Literal["debug", "info", "warning", "error"] = "info"


class EdgeSettings(_Section, frozen=True):
    node: NodeSection
    listen: ListenSection = ListenSection()
    link: LinkSection = LinkSection()
    discovery: DiscoverySection = DiscoverySection()
    engine: EngineSection = EngineSection()
    log: LogSection = LogSection()


def read_settings(text: str, environ: Mapping[str, str], where: str) -> EdgeSettings:
    """Parse `text` (TOML) with `EDGE__SECTION__KEY` over it; raises ConfigError, one sentence."""
    settings = load_settings(EdgeSettings, text, environ, prefix=PREFIX, where=where)
    _check(settings, where)
    return settings


def advertised(settings: EdgeSettings, port: int) -> tuple[str, int]:
    """Host and port that others reach this node at; `port` is the one it listens on."""
    advertise = settings.discovery.advertise
    return host_and_port(advertise, port) if advertise else (settings.listen.host, port)


def _check(settings: EdgeSettings, where: str) -> None:
    listen = settings.listen
    if not settings.link.secret_file and not is_loopback(listen.host):
        raise ConfigError(
            f"{where} listens on {listen.host!r}, which other machines reach, without link.secret_file; name a file "
            "with the secret that routers send, or listen on 127.0.0.1."
        )
    if bool(listen.tls_cert) != bool(listen.tls_key):
        raise ConfigError(f"{where} sets only one of listen.tls_cert and listen.tls_key; set both or neither.")
    if settings.link.client_ca and not listen.tls_cert:
        raise ConfigError(f"{where} sets link.client_ca without TLS; set listen.tls_cert and listen.tls_key as well.")
    consul = settings.discovery.consul
    if consul and not consul.startswith(("http://", "https://")):
        raise ConfigError(f"{where} sets discovery.consul to {consul!r}; write a URL such as http://127.0.0.1:8500.")
    if consul and not settings.discovery.advertise and listen.host in {"", "0.0.0.0", "::"}:
        raise ConfigError(
            f"{where} listens on {listen.host!r} and registers in Consul without discovery.advertise; set the address "
            "that routers reach this node at."
        )
    try:
        advertised(settings, listen.port)
    except ValueError:
        raise ConfigError(
            f"{where} sets discovery.advertise to {settings.discovery.advertise!r}; "
            "write host, host:port or [ipv6]:port."
        ) from None
