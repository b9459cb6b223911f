"""Read what the person wants, look at the machine, run the fleet."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.supervisor.host import check_ports, find_discovery, make_secret
from scripts.supervisor.plan import PlanError, Request, fleet, secret_file, welcome
from scripts.supervisor.run import Runner

ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT_PORT = 8080
NO_CONSUL = """\
!!  No Consul found: the router uses a static list of nodes, and discovery is not exercised.
!!  `make consul` fetches one; CONSUL=/path/to/consul or CONSUL_HTTP_ADDR=host:port name your own.
"""


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Parse the command line; PORT of the environment is the default of --port. Raises PlanError."""
    parser = argparse.ArgumentParser(
        prog="scripts/up",
        description="Run a router, its nodes and a Consul on this machine until Ctrl-C; what dies is started again.",
        epilog="The router listens on PORT, the nodes on PORT+1 and up, Consul from PORT+10. "
        "A running Consul is used if CONSUL_HTTP_ADDR is set.",
    )
    port = environment.get("PORT") or str(DEFAULT_PORT)
    parser.add_argument("--port", default=port, help="the router's port (default: PORT, else %(default)s)")
    parser.add_argument(
        "--nodes", default="eu,us", metavar="NAMES", help="one node for each name (default: %(default)s)"
    )
    parser.add_argument("--static", action="store_true", help="no Consul: the router gets a static list of nodes")
    parser.add_argument(
        "--release",
        type=Path,
        default=ROOT / "releases/smollm2-135m",
        metavar="FOLDER",
        help="what the nodes serve (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if not (parsed.port.isascii() and parsed.port.isdigit()):
        raise PlanError(f"PORT={parsed.port} is no port: give a number, e.g. PORT={DEFAULT_PORT}.")
    return parsed


def request_from(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Request:
    """Turn the command line into a request, after looking for a Consul and the release. Raises PlanError."""
    release: Path = arguments.release.resolve()
    model = model_of(release)
    nodes = arguments.nodes.split(",")
    return Request(
        python=sys.executable,
        root=str(ROOT),
        port=int(arguments.port),
        nodes=nodes,
        discovery=None if arguments.static else find_discovery(ROOT, environment),
        release=str(release),
        model=model,
        threads=max(1, len(os.sched_getaffinity(0)) // len(nodes)),
        environment=environment,
    )


def model_of(release: Path) -> str:
    """Name what clients call the model of a release. Raises PlanError if there is none."""
    try:
        return str(json.loads((release / "manifest.json").read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        hint = "`make up` exports the small model, --release names another folder"
        raise PlanError(f"no release in {release}: {hint}.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{release}/manifest.json cannot be read ({error!r}): export the model again.") from error


def main(arguments: Sequence[str]) -> int:
    """Run the fleet; returns 0 after an orderly stop, 2 when it cannot be started."""
    try:
        parsed = parse(arguments, os.environ)
        request = request_from(parsed, os.environ)
        processes = fleet(request)
        check_ports(processes, request.port)
        make_secret(Path(secret_file(request.root)))
    except PlanError as error:
        print(f"up: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"up: cannot write {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    if request.discovery is None and not parsed.static:
        bold = ("\x1b[1;33m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        print(f"{bold[0]}{NO_CONSUL}{bold[1]}", file=sys.stderr, flush=True)
    Runner(processes, welcome(request), request.root).run()
    return 0
