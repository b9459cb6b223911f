"""`python -m router --config configs/router.toml`: read the configuration, then serve."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import uvloop

from core.errors import ConfigError, EdgechatError
from router.config import Config, load_config
from router.server import link_tls, listen_tls, make_registry, run
from router.store.opening import redis_url

EXIT_CONFIG = 2


def main() -> int:
    """Exit status: 0 after a signal, 2 when the configuration or the machine does not allow a start."""
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(_read(arguments.config), os.environ, arguments.config or "the environment")
        secret = _secret(config)
        if arguments.check_config:
            # What only the start would find out otherwise.
            listen_tls(config.listen)
            link_tls(config.link)
            make_registry(config, "", config.listen.port)
            redis_url(config.store)
            print(f"{arguments.config or 'the built-in configuration'} is good")
            return 0
        uvloop.run(run(config, secret))
    except EdgechatError as error:
        print(f"router: {error.message}", file=sys.stderr)
        return EXIT_CONFIG
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m router",
        description="Takes chat clients to a healthy edge node and carries their streams.",
        epilog="Every key can be overridden from the environment: [listen] port = 8080 is ROUTER__LISTEN__PORT=8080.",
    )
    parser.add_argument(
        "--config", metavar="FILE", default="", help="router.toml; without it only the environment counts"
    )
    parser.add_argument("--check-config", action="store_true", help="say whether the configuration is good, and stop")
    return parser.parse_args()


def _read(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}.") from error


def _secret(config: Config) -> str:
    """The link's bearer secret; empty on loopback without a file, as `router.config` has checked."""
    path = config.link.secret_file
    if not path:
        return ""
    try:
        secret = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`link.secret_file` {path} cannot be read: {error}.") from error
    if not secret:
        raise ConfigError(f"`link.secret_file` {path} is empty; put a long random line in it.")
    return secret


if __name__ == "__main__":
    sys.exit(main())
