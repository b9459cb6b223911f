"""What keys the nodes' prefix stores per tenant: the same on every router that shares the link secret."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable


def salts(link_secret: str) -> Callable[[str], str]:
    """The function from a tenant to its salt; neither the tenant nor the secret can be told from it."""
    key = link_secret.encode()
    return lambda tenant: hmac.new(key, tenant.encode(), hashlib.sha256).hexdigest()
