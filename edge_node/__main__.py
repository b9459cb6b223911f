"""`python -m edge_node --config configs/edge.toml`: start one node.

Exit codes: 0 = shut down as asked, 1 = the release or the device cannot be served, 2 = the configuration or the
port cannot be used. Every one of them comes with one sentence on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import ssl
import sys
from pathlib import Path

from core.errors import ConfigError, EdgechatError
from edge_node.config import EdgeSettings, ListenSection, read_settings
from edge_node.logs import setup_logging
from edge_node.node import Node
from edge_node.release.model_store import Release, open_release, verify
from edge_node.runtime.child import WORKER, Child

log = logging.getLogger("edge_node")


def main(worker: str = WORKER) -> int:
    """The exit code. worker: the module that engine processes run."""
    # Until the event loop takes over, Ctrl-C just ends the process: no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    arguments = _arguments()
    try:
        settings = _read_config(arguments.config)
        if arguments.check_config:
            _read_secret(settings.link.secret_file)
            _tls(settings.listen, settings.link.client_ca)
            print(f"{arguments.config} is fine: node {settings.node.name!r}, port {settings.listen.port}.")
            return 0
        if arguments.verify:
            return _verify(settings)
        return _serve(settings, worker)
    except ConfigError as error:
        print(error.message, file=sys.stderr)
        return 2
    except EdgechatError as error:
        print(error.message, file=sys.stderr)
        return 1


def _serve(settings: EdgeSettings, worker: str) -> int:
    setup_logging(settings.log.level)
    secret = _read_secret(settings.link.secret_file)
    tls = _tls(settings.listen, settings.link.client_ca)
    release = open_release(Path(settings.node.release))
    with _bind(settings.listen) as listener:
        asyncio.run(_run(settings, release, worker, secret, listener, tls))
    return 0


async def _run(
    settings: EdgeSettings,
    release: Release,
    worker: str,
    secret: str,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
) -> None:
    node = Node(settings, release.manifest, lambda: Child.spawn(settings.log.level, worker), secret)
    signals = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            # The engine process ends with us: it sees the end of file, and the kernel kills it.
            os._exit(128 + number)
        log.info("stopping signal=%s", number.name)
        node.stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await node.run(listener, tls)


def _verify(settings: EdgeSettings) -> int:
    release = open_release(Path(settings.node.release))
    verify(release)
    manifest, folder = release.manifest, settings.node.release
    print(f"{folder} is {manifest.release} ({manifest.variant}); its {len(manifest.files)} files are intact.")
    return 0


def _read_config(path: str) -> EdgeSettings:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path!r} cannot be read: {_why(error)}.") from error
    return read_settings(text, os.environ, path)


def _read_secret(path: str) -> str:
    """The link secret, "" when none is configured; warns when others on this machine can read it."""
    if not path:
        return ""
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
        mode = os.stat(path).st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The link secret {path!r} cannot be read ({_why(error)}); mend link.secret_file.") from error
    if not secret:
        raise ConfigError(f"The link secret {path!r} is empty; put a long random string into it.")
    if mode & 0o077:
        log.warning("secret_readable_by_others file=%s mode=%o advice='chmod 600'", path, mode & 0o777)
    return secret


def _tls(listen: ListenSection, client_ca: str) -> ssl.SSLContext | None:
    if not listen.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(listen.tls_cert, listen.tls_key)
    except (OSError, ssl.SSLError) as error:
        pair = f"{listen.tls_cert!r} and {listen.tls_key!r}"
        raise ConfigError(f"The certificate and key {pair} cannot be used: {_why(error)}.") from error
    if client_ca:
        # Optional here, demanded by the link: Consul asks /readyz on the same port and has no certificate.
        context.verify_mode = ssl.CERT_OPTIONAL
        try:
            context.load_verify_locations(client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"link.client_ca {client_ca!r} cannot be used: {_why(error)}.") from error
    return context


def _bind(listen: ListenSection) -> socket.socket:
    """Take the port before anything slow happens."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        return socket.create_server((listen.host, listen.port), family=family, backlog=256)
    except OSError as error:
        where = f"{listen.host}:{listen.port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"{where} is taken by another process; set listen.port to a free port.") from error
        raise ConfigError(f"The node cannot listen on {where}: {_why(error)}; mend [listen].") from error


def _why(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m edge_node", description="Serve one model release to routers.")
    parser.add_argument("--config", required=True, metavar="FILE", help="TOML, see configs/edge.toml")
    parser.add_argument("--check-config", action="store_true", help="say whether the file would be accepted, and exit")
    parser.add_argument("--verify", action="store_true", help="compare the release with its manifest, and exit")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
