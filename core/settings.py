"""Configuration: msgspec Structs read from TOML, every key overridable by an environment variable.

    [listen]
    port = 8080          <->      ROUTER__LISTEN__PORT=8080

Does not read files or the environment: the caller hands both in.
"""

from __future__ import annotations

import ipaddress
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec

from core.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def load_settings(kind: type[T], text: str, environ: Mapping[str, str], *, prefix: str, where: str) -> T:
    """Parse `text` (TOML), lay `PREFIX__SECTION__KEY` variables over it, convert to `kind`.

    Raises ConfigError, one sentence: which key, what is wrong, where it came from.
    """
    try:
        tree: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}.") from error
    sources = _overlay(tree, environ, prefix)
    try:
        return msgspec.convert(tree, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error), sources, where)) from error


def is_loopback(host: str) -> bool:
    """Whether a listen address can be reached from this machine only; a name other than `localhost` cannot be told."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_and_port(address: str, port: int) -> tuple[str, int]:
    """Split `host`, `host:port`, `[ipv6]` or `[ipv6]:port`; `port` where none is written. Raises ValueError."""
    bare_ipv6 = address.count(":") > 1 and not address.startswith("[")
    parts = urlsplit(f"//[{address}]" if bare_ipv6 else f"//{address}")
    if not parts.hostname or parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{address!r} is no host with a port")
    return parts.hostname, port if parts.port is None else parts.port


def _overlay(tree: dict[str, Any], environ: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Write overrides into `tree`; return {"section.key": variable} for error messages."""
    sources: dict[str, str] = {}
    for variable in sorted(environ):
        if not variable.startswith(prefix + "__"):
            continue
        path = [part.lower() for part in variable.split("__")[1:]]
        if len(path) != 2 or not all(path):
            raise ConfigError(f"The environment variable {variable} is not of the form {prefix}__SECTION__KEY.")
        section, key = path
        table = tree.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"The environment variable {variable} overrides [{section}], which is not a section.")
        table[key] = _value(environ[variable])
        sources[f"{section}.{key}"] = variable
    return sources


def _value(text: str) -> Any:
    """Arrays, tables and quoted strings as TOML; anything else stays text and is converted by type."""
    if text[:1] in "[{\"'" and text:
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return text


def _explain(message: str, sources: dict[str, str], where: str) -> str:
    """msgspec says "... - at `$.listen.port`"; turn that into a sentence with the key and its source."""
    problem, _, path = message.partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    unknown = problem.removeprefix("Object contains unknown field `")
    if unknown != problem:
        name = unknown.rstrip("`")
        key = f"{key}.{name}" if key else name
        return (
            f"{_source(key, sources, where)} sets {key!r}, which is not a known key; remove it or check its spelling."
        )
    if not key:
        return f"{where} is incomplete: {problem}."
    return f"{_source(key, sources, where)} sets {key!r} to something unusable: {problem}."


def _source(key: str, sources: dict[str, str], where: str) -> str:
    """Who set `section.key`, of which `key` may be an element: the variable, or the file."""
    return sources.get(".".join(key.partition("[")[0].split(".")[:2]), where)
