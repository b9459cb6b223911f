"""The store that the configuration asks for. Does not know what is done with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from core.errors import ConfigError
from router.config import StoreSection, is_redis_url
from router.journal import Store
from router.store.redis import RedisStore
from router.store.sqlite import SqliteStore

DAY_S = 86_400.0
BELIEVED_S = 3600.0


async def open_store(settings: StoreSection, name: str, instance: str) -> Store:
    """Open it for the router `name`, of which `instance` names this very process.

    Raises ConfigError for what an operator must mend, StoreUnavailable for a file or a Redis that cannot be used.
    """
    keep_s = settings.keep_days * DAY_S
    url, wall = redis_url(settings), calendar()
    if url:
        return await RedisStore.open(
            url, name, instance, prefix=settings.redis_prefix, keep_s=keep_s, max_bytes=settings.max_bytes, wall=wall
        )
    return await SqliteStore.open(
        Path(settings.path),
        name,
        instance,
        keep_s=keep_s,
        max_bytes=settings.max_bytes,
        durability=settings.durability,
        wall=wall,
    )


def calendar(
    wall: Callable[[], float] = time.time,
    elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
) -> Callable[[], float]:
    """Unix seconds to forget by: the wall's, but never more than `BELIEVED_S` ahead of what has passed since now.

    A clock that jumps to next year must not empty the store. elapsed: seconds since any moment, sleep included.
    """
    began = wall() - elapsed()
    return lambda: min(wall(), began + elapsed() + BELIEVED_S)


def redis_url(settings: StoreSection) -> str:
    """The Redis to use, from the configuration or from the file it names; "" = none. Raises ConfigError."""
    if not settings.redis_file:
        return settings.redis
    try:
        url = Path(settings.redis_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`store.redis_file` {settings.redis_file} cannot be read: {error}.") from error
    if not is_redis_url(url):
        raise ConfigError(
            f"`store.redis_file` {settings.redis_file} holds no address of a Redis; "
            "write one line like redis://:password@host:6379/0 into it (rediss:// for TLS)."
        )
    return url
