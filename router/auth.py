"""Who is asking, and may they: keys, roles, and which pages a browser may call from.

Pure. Does not know HTTP beyond the values of four headers.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

import msgspec

from core.errors import Forbidden, NotAuthorised
from core.settings import is_loopback
from router.config import Auth, Key, Role
from router.errors import HostRefused, OriginRefused

DEV_KEY = "dev"
KEY_SUBPROTOCOL = "openai-insecure-api-key."


class Principal(msgspec.Struct, frozen=True):
    """A key that was accepted; `key_id` may be logged, the key itself never is."""

    key_id: str
    tenant: str
    roles: frozenset[Role]

    def require(self, role: Role) -> None:
        """Raises Forbidden unless the key has `role`."""
        if role not in self.roles:
            raise Forbidden(role)


def digest(key: str) -> str:
    # A header may hold any bytes; those that are no UTF-8 come here as surrogates.
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


class Keyring:
    """The accepted keys; only their digests are known."""

    def __init__(self, auth: Auth) -> None:
        dev = [Key("dev", digest(DEV_KEY), "dev", ["chat", "admin"])] if auth.dev_key else []
        self._keys = [*auth.keys, *dev]

    def authenticate(self, presented: str | None) -> Principal:
        """The key's owner; raises NotAuthorised.

        Every key is compared in constant time and none ends the loop early: the time taken says nothing.
        """
        offered = digest(presented or "")
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(offered, key.sha256):
                found = key
        if found is None or not presented:
            raise NotAuthorised
        return Principal(found.id, found.tenant, frozenset(found.roles))


def presented_key(authorization: str | None, subprotocols: Iterable[str]) -> str | None:
    """The key of a request: from `Authorization: Bearer`, or (browsers) from a WebSocket subprotocol."""
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        return key.strip() if scheme.lower() == "bearer" else None
    for offered in subprotocols:
        if offered.startswith(KEY_SUBPROTOCOL):
            return offered.removeprefix(KEY_SUBPROTOCOL)
    return None


def is_router(authorization: str | None, link_secret: str) -> bool:
    """Whether a request is another router's: it shows the secret that all routers share. Nobody's is, without one."""
    offered = digest(presented_key(authorization, ()) or "")
    return hmac.compare_digest(offered, digest(link_secret)) and bool(link_secret)


def subprotocols(header: str | None) -> list[str]:
    """What a client offers in `Sec-WebSocket-Protocol`, in its order."""
    return [offered.strip() for offered in (header or "").split(",") if offered.strip()]


def check_origin(origin: str | None, host: str | None, allowed: Iterable[str], *, loopback_only: bool) -> None:
    """Refuse a browser's page that is neither ours nor allowed; raises OriginRefused or HostRefused.

    Programs send no Origin and pass. loopback_only: the router trusts everybody who can reach it, so a name
    that somebody else pointed at 127.0.0.1 (DNS rebinding) must not count as ours. A page under such a name
    sends no Origin with a GET: only its Host gives it away.
    """
    if origin is not None and origin in set(allowed):
        return
    if origin is not None and not (host and _netloc(origin) == host.lower()):
        raise OriginRefused(origin)
    if loopback_only and host is not None and not is_loopback(_hostname(host)):
        raise HostRefused(host)


def _netloc(origin: str) -> str:
    """`host:port` of an origin; empty for "null" and for nonsense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
