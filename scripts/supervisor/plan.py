"""Say what each process of a local fleet is started with: command, environment, ports.

Starts nothing and looks at nothing; what is found on the machine comes in with the request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

HOST = "127.0.0.1"
"""Loopback only: the key `dev` is refused anywhere else."""
CONSUL_OFFSET = 10
"""Nodes take PORT+1 up to here; Consul takes four ports from here on."""
LAST_OFFSET = CONSUL_OFFSET + 3


class PlanError(Exception):
    """A fleet that was asked for cannot be; the message is one sentence for the person."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process: what runs, what is added to its environment, and which address answers 200 when it is ready."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready_url: str
    ports: tuple[int, ...]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OwnConsul:
    """A Consul agent that the fleet starts itself: the binary, and its version as (major, minor)."""

    binary: str
    version: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ForeignConsul:
    """A Consul that runs already."""

    url: str


Discovery = OwnConsul | ForeignConsul | None
"""None: the router's static list serves."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the person asked for, and where things lie (absolute paths)."""

    python: str
    root: str
    port: int
    nodes: Sequence[str]
    discovery: Discovery
    release: str
    model: str
    threads: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise PlanError if there cannot be such a fleet."""
        if not 1 <= self.port <= 65535 - LAST_OFFSET:
            raise PlanError(f"PORT={self.port} cannot be used: choose one from 1024 to {65535 - LAST_OFFSET}.")
        if not 1 <= len(self.nodes) < CONSUL_OFFSET:
            raise PlanError(f"--nodes names {len(self.nodes)} nodes: name 1 to {CONSUL_OFFSET - 1}.")
        for name in self.nodes:
            if not re.fullmatch(r"[a-z0-9-]+", name) or name in ("router", "consul"):
                raise PlanError(f"--nodes: '{name}' cannot be a node's name: use a-z, 0-9 and '-', as in 'eu'.")
        if len(set(self.nodes)) != len(self.nodes):
            raise PlanError(f"--nodes names a node twice: {','.join(self.nodes)}.")


def fleet(request: Request) -> tuple[Process, ...]:
    """Plan the processes in the order of their start. Raises PlanError."""
    request.check()
    own = request.discovery if isinstance(request.discovery, OwnConsul) else None
    before = (
        (consul(request.root, range(request.port + CONSUL_OFFSET, request.port + LAST_OFFSET + 1), own),) if own else ()
    )
    after = tuple(process.name for process in before)
    nodes = tuple(node(request, name, request.port + 1 + index, after) for index, name in enumerate(request.nodes))
    return (*before, *nodes, router(request, after))


def consul_url(request: Request) -> str:
    """Return the address for the services' `discovery.consul`; empty when there is no Consul."""
    match request.discovery:
        case OwnConsul():
            return f"http://{HOST}:{request.port + CONSUL_OFFSET}"
        case ForeignConsul(url):
            return url
        case None:
            return ""


def consul(root: str, ports: Sequence[int], own: OwnConsul) -> Process:
    """Plan an agent in memory on four `ports`: HTTP, Serf LAN, Serf WAN, server.

    Its other settings are in configs/consul/dev.hcl.
    """
    http, serf_lan, serf_wan, server = ports
    flags = [
        f"-config-file={root}/configs/consul/dev.hcl",
        f"-http-port={http}",
        f"-serf-lan-port={serf_lan}",
        f"-serf-wan-port={serf_wan}",
        f"-server-port={server}",
        "-log-level=err",
    ]
    if own.version >= (1, 14):
        flags.append("-grpc-tls-port=-1")  # older ones neither open this port nor know the flag
    return Process(
        name="consul",
        argv=(own.binary, "agent", "-dev", *flags),
        env={},
        ready_url=f"http://{HOST}:{http}/v1/status/leader",
        ports=tuple(ports),
    )


def node(request: Request, name: str, port: int, after: tuple[str, ...]) -> Process:
    """Plan one node; its name is its region."""
    return Process(
        name=name,
        argv=(request.python, "-m", "edge_node", "--config", f"{request.root}/configs/edge.toml"),
        env={
            "EDGE__NODE__NAME": name,
            "EDGE__NODE__REGION": name,
            "EDGE__NODE__RELEASE": request.release,
            "EDGE__LISTEN__HOST": HOST,
            "EDGE__LISTEN__PORT": str(port),
            "EDGE__LINK__SECRET_FILE": secret_file(request.root),
            "EDGE__DISCOVERY__CONSUL": consul_url(request),
            "EDGE__ENGINE__THREADS": request.environment.get("EDGE__ENGINE__THREADS", str(request.threads)),
        },
        ready_url=f"http://{HOST}:{port}/readyz",
        ports=(port,),
        after=after,
    )


def router(request: Request, after: tuple[str, ...]) -> Process:
    """Plan the router; with a Consul its static list is empty, so that what the fleet shows is what Consul found."""
    addresses = [f"ws://{HOST}:{request.port + 1 + index}" for index in range(len(request.nodes))]
    return Process(
        name="router",
        argv=(request.python, "-m", "router", "--config", f"{request.root}/configs/router.toml"),
        env={
            "ROUTER__ROUTER__NAME": "local",
            "ROUTER__LISTEN__HOST": HOST,
            "ROUTER__LISTEN__PORT": str(request.port),
            "ROUTER__LINK__SECRET_FILE": secret_file(request.root),
            "ROUTER__DISCOVERY__CONSUL": consul_url(request),
            "ROUTER__DISCOVERY__STATIC": json.dumps([] if request.discovery else addresses),
            "ROUTER__STORE__PATH": f"{request.root}/data/router-{request.port}.sqlite",
        },
        ready_url=f"http://{HOST}:{request.port}/readyz",
        ports=(request.port,),
        after=after,
    )


def secret_file(root: str) -> str:
    """Name the file with the secret that router and nodes of this machine share."""
    return f"{root}/data/link-secret"


def consul_address(variable: str) -> str:
    """Turn CONSUL_HTTP_ADDR into a URL. Raises PlanError for what is no TCP address."""
    if variable.startswith(("http://", "https://")):
        return variable.rstrip("/")
    if "://" in variable:
        raise PlanError(f"CONSUL_HTTP_ADDR={variable} cannot be used: give host:port or an http:// address.")
    return f"http://{variable}"


def consul_version(words: str) -> tuple[int, int]:
    """Read (major, minor) out of what `consul version` prints. Raises PlanError if it is something else."""
    found = re.match(r"Consul v(\d+)\.(\d+)", words)
    if found is None:
        raise PlanError("the program given as consul does not answer `consul version` as Consul does: check CONSUL=.")
    return int(found[1]), int(found[2])


def welcome(request: Request) -> str:
    """Compose the lines that greet the person when everything is ready."""
    match request.discovery:
        case OwnConsul():
            found_by = f"Consul, {consul_url(request)}/ui/"
        case ForeignConsul(url):
            found_by = f"Consul at {url}"
        case None:
            found_by = "the router's static list"
    return f"""
  edgechat is ready:  http://{HOST}:{request.port}/   (Ctrl-C stops everything)

      nodes {", ".join(request.nodes)}; found by {found_by}

      from openai import OpenAI
      client = OpenAI(base_url="http://{HOST}:{request.port}/v1", api_key="dev")
      print(client.responses.create(model="{request.model}", input="Name three rivers.").output_text)
"""
