"""Which store a configuration asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import ConfigError
from router.config import StoreSection
from router.store.opening import open_store
from router.store.redis import RedisStore
from router.store.sqlite import SqliteStore
from tests.router.store.conftest import RedisServer
from tests.router.store.entries import ended


async def test_without_a_redis_it_is_a_file(tmp_path: Path) -> None:
    store = await open_store(StoreSection(path=str(tmp_path / "s.sqlite")), "a", "1")
    assert isinstance(store, SqliteStore)
    await store.close()
    assert (tmp_path / "s.sqlite").exists()


async def test_a_redis_may_be_named_in_a_file_of_its_own(tmp_path: Path, redis: RedisServer) -> None:
    (tmp_path / "redis-url").write_text(redis.url + "\n")
    settings = StoreSection(redis_file=str(tmp_path / "redis-url"), redis_prefix="p", path=str(tmp_path / "s.sqlite"))
    store = await open_store(settings, "a", "1")
    assert isinstance(store, RedisStore)
    await store.write([ended(created_at=2**40)])
    await store.close()
    with redis.client() as other:
        assert other.exists("p:done:4:acme:resp_r_1")
    assert not (tmp_path / "s.sqlite").exists()


async def test_responses_are_kept_as_many_days_as_configured(tmp_path: Path) -> None:
    for days, stays in ((0, True), (30, False)):
        path = str(tmp_path / f"{days}.sqlite")
        store = await open_store(StoreSection(path=path, keep_days=days), "a", "1")
        await store.write([ended()])
        assert (await store.get("acme", "resp_r_1") is not None) == stays
        await store.close()


@pytest.mark.parametrize("text", ["", "localhost:6379", "http://:hush@h:1", None])
async def test_a_file_without_an_address_is_named_and_what_it_says_is_not_repeated(
    tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "redis-url"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"store\.redis_file") as refused:
        await open_store(StoreSection(redis_file=str(path)), "a", "1")
    assert str(path) in refused.value.message
    assert "hush" not in refused.value.message
