"""What is Redis's own: its restarts, leases that run out, keys that stay or go, passwords."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio.client import Pipeline

from core.errors import StoreUnavailable
from router.journal import Dropped, Entry, Owned, Unfinished
from router.store import redis as store_module
from router.store.redis import RedisStore
from tests.router.store.conftest import RedisServer
from tests.router.store.entries import SECRET_TEXT, began, ended, read, response, said


@contextlib.asynccontextmanager
async def opened(server: RedisServer, name: str = "a", instance: str = "1", **more: float) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(server.url, name, instance, **more)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        await store.close()


async def test_a_redis_that_was_killed_is_a_sentence_and_used_again_when_it_is_back(
    redis_of_its_own: RedisServer,
) -> None:
    redis_of_its_own.start()
    async with opened(redis_of_its_own) as store:
        assert await store.write([began()]) == ["kept"]
        redis_of_its_own.kill()
        where = f"redis://127.0.0.1:{redis_of_its_own.port}/0"
        for call in (store.write([said(0, 1)]), store.get("acme", "x"), store.beat(), store.unclaimed()):
            with pytest.raises(StoreUnavailable, match=f"The store at {where} cannot be used: .*") as refused:
                await call
            assert refused.value.retryable
        redis_of_its_own.start()
        assert await store.write([said(0, 1), ended()]) == ["lost", "lost"], "that Redis has forgotten everything"
        assert await store.write([began("resp_r_2"), ended("resp_r_2")]) == ["kept", "kept"]
        await store.beat()


async def test_a_redis_that_answers_no_more_is_not_waited_for_and_its_late_answers_reach_nobody(
    redis_of_its_own: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TIMEOUT_S", 0.5)
    redis_of_its_own.start()
    assert redis_of_its_own.process is not None
    async with opened(redis_of_its_own) as store:
        await store.write([ended("resp_r_2")])
        redis_of_its_own.process.send_signal(signal.SIGSTOP)
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            await store.write([began()])
        redis_of_its_own.process.send_signal(signal.SIGCONT)
        while await _is_down(store):
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*(store.get("acme", "resp_r_2") for _ in range(8))) == [response("resp_r_2")] * 8
        assert await store.unclaimed() in ([], [("acme", "resp_r_1")]), "it may have been written or not"


class Address:
    """Where clients connect to; which Redis that is may change, and connections that were made stay."""

    def __init__(self, port: int) -> None:
        self.leads_to = port

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        tasks: set[asyncio.Task[None]] = set()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer):
                while data := await reader.read(65536):
                    writer.write(data)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection("127.0.0.1", self.leads_to)
            tasks.update({asyncio.create_task(relay(reader, ours)), asyncio.create_task(relay(theirs, writer))})

        async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
            yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_master_that_became_a_replica_is_left_for_the_one_that_its_address_leads_to(
    redis_of_its_own: RedisServer, redis: RedisServer
) -> None:
    redis_of_its_own.start()
    address = Address(redis_of_its_own.port)
    async with address.listening() as url:
        store = await RedisStore.open(url, "a", "1")
        await asyncio.gather(store.write([began()]), store.get("acme", "x"), store.claim("acme", "x"))
        with redis_of_its_own.client() as old:
            old.replicaof("127.0.0.1", str(redis.port))
        address.leads_to = redis.port
        with pytest.raises(StoreUnavailable, match="read only replica"):
            await store.write([said(0, 1)])
        assert await store.write([began("resp_r_2"), ended("resp_r_2")]) == ["kept", "kept"]
        await store.beat()
        assert await store.get("acme", "resp_r_2") == response("resp_r_2")
        assert await store.claim("acme", "resp_r_1") is None
        with redis.client() as new:
            assert new.exists("edgechat:lease:a/1")
        await store.close()


async def test_a_store_that_hangs_does_not_keep_its_router_from_stopping(
    redis_of_its_own: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "TIMEOUT_S", 3600.0)
    monkeypatch.setattr(store_module, "CLOSE_S", 0.05)
    redis_of_its_own.start()
    assert redis_of_its_own.process is not None
    store = await RedisStore.open(redis_of_its_own.url, "a", "1")
    redis_of_its_own.process.send_signal(signal.SIGSTOP)
    writing = asyncio.create_task(store.write([ended()]))
    await asyncio.sleep(0)
    await store.close()
    assert "has not finished 1 calls" in caplog.text
    with pytest.raises(StoreUnavailable, match="was closed"):
        await writing


async def _is_down(store: RedisStore) -> bool:
    try:
        await store.beat()
    except StoreUnavailable:
        return True
    return False


async def test_a_redis_behind_tls_is_believed_only_with_its_certificate(
    redis_of_its_own: RedisServer, tmp_path: Path
) -> None:
    certificate, key = str(tmp_path / "redis.crt"), str(tmp_path / "redis.key")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*request, "-out", certificate, "-keyout", key], check=True, capture_output=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tls = ["--tls-port", port, "--tls-cert-file", certificate, "--tls-key-file", key, "--tls-auth-clients", "no"]
    redis_of_its_own.start(*tls)
    with pytest.raises(StoreUnavailable, match="certificate"):
        await RedisStore.open(f"rediss://127.0.0.1:{port}", "a", "1")
    store = await RedisStore.open(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}", "a", "1")
    assert await store.write([ended()]) == ["kept"]
    assert await store.get("acme", "resp_r_1") == response()
    await store.close()


async def test_scripts_that_redis_has_forgotten_are_sent_again(redis: RedisServer) -> None:
    async with opened(redis) as store:
        await store.write([began(), said(0, 1)])
        with redis.client() as other:
            other.script_flush()
            assert await store.write([said(1, 2), said(2, 3)]) == ["kept", "kept"]
            other.script_flush()
            found = await store.claim("acme", "resp_r_1")
            other.script_flush()
            await store.beat()
    assert isinstance(found, Unfinished)
    assert found.ids == [1, 2, 3]


async def test_a_lease_runs_out_by_itself_and_is_kept_by_beats(redis: RedisServer) -> None:
    async with opened(redis, "dying", lease_s=0.2) as dying, opened(redis, "heir") as heir:
        await dying.write([began()])
        assert await heir.claim("acme", "resp_r_1") == Owned("dying")
        await dying.beat()
        assert await heir.claim("acme", "resp_r_1") == Owned("dying")
        while await heir.unclaimed() == []:
            await asyncio.sleep(0.01)
        assert isinstance(await heir.claim("acme", "resp_r_1"), Unfinished)
        assert await dying.write([said(0, 1)]) == ["lost"]


async def test_an_entry_of_an_epoch_before_a_routers_own_claim_is_lost(redis: RedisServer) -> None:
    """One that lay in a connection which this router has given up already."""
    async with opened(redis) as store:
        await store.write([began()])
        ((_, late),) = store._pipelines([said(0, 1)], store._fences([said(0, 1)]))
        await store.claim("acme", "resp_r_1")
        assert await store._send(late) == [b"lost"]
        assert await store.write([said(0, 2)]) == ["kept"]


async def test_nothing_is_left_of_what_was_deleted_dropped_or_forgotten(redis: RedisServer) -> None:
    async with opened(redis, max_bytes=1) as store:
        for number in range(4):
            name = f"resp_r_{number}"
            await store.write([began(name), read(name), said(0, 1, response_id=name), said(1, 2, response_id=name)])
        await store.write([ended("resp_r_0", created_at=1), ended("resp_r_1", created_at=2), Dropped("resp_r_2")])
        assert await store.delete("acme", "resp_r_1")
        assert await store.delete("acme", "resp_r_3")
        await store.release()
        with redis.client() as other:
            assert set(other.keys()) == {b"edgechat:owners", b"edgechat:bytes"}
            assert other.get("edgechat:bytes") == b"0"
        async with opened(redis, "b") as heir:
            await heir.unclaimed()
            with redis.client() as other:
                assert b"edgechat:owners" not in set(other.keys()), "a router that left nothing is forgotten"


async def test_two_prefixes_share_a_redis_and_nothing_else(redis: RedisServer) -> None:
    async with opened(redis) as store:
        await store.write([ended()])
    other = await RedisStore.open(redis.url, "a", "1", prefix="other")
    assert await other.get("acme", "resp_r_1") is None
    assert await other.write([ended()]) == ["kept"]
    await other.close()
    with redis.client() as looking:
        assert {key.partition(b":")[0] for key in set(looking.keys())} == {b"edgechat", b"other"}


async def test_a_full_redis_keeps_nothing_of_an_entry_that_it_refuses(redis: RedisServer) -> None:
    async with opened(redis) as store:
        await store.write([began(), said(0, 1)])
        with redis.client() as other:
            before = {key: other.dump(key) for key in sorted(other.keys()) if b"lease" not in key}
            other.config_set("maxmemory", "1")
            try:
                with pytest.raises(StoreUnavailable, match="maxmemory"):
                    await store.write([read(), said(1, 2), ended()])
                assert await store.get("acme", "resp_r_1") is None
                assert {key: other.dump(key) for key in sorted(other.keys()) if b"lease" not in key} == before
                assert await store.delete("acme", "resp_r_1"), "making room is possible"
            finally:
                other.config_set("maxmemory", "0")


async def test_a_redis_that_throws_away_what_it_likes_is_warned_of(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.client() as other:
        other.config_set("maxmemory", "1gb")
        other.config_set("maxmemory-policy", "allkeys-lru")
        try:
            async with opened(redis):
                assert "set it to noeviction" in caplog.text
        finally:
            other.config_set("maxmemory", "0")
            other.config_set("maxmemory-policy", "noeviction")


async def test_a_damaged_unfinished_response_is_given_up_and_a_finished_one_an_error(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(redis) as store:
        await store.write([began(), said(0, 1), said(1, 2), ended("resp_r_2")])
        with redis.client() as other:
            other.lpop("edgechat:said:resp_r_1")
            other.set("edgechat:done:4:acme:resp_r_2", b"\xc1")
        assert await store.claim("acme", "resp_r_1") is None
        assert "resp_r_1 is damaged and given up" in caplog.text
        assert SECRET_TEXT not in caplog.text
        assert await store.unclaimed() == []
        with pytest.raises(StoreUnavailable, match="cannot read"):
            await store.get("acme", "resp_r_2")


@pytest.mark.parametrize("lost", ["said", "end of said", "opening"])
async def test_what_redis_has_thrown_away_of_an_unfinished_response_is_noticed(
    redis: RedisServer, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    async with opened(redis) as store:
        await store.write([began(), said(0, 1), said(1, 2)])
        with redis.client() as other:
            match lost:
                case "said":
                    other.delete("edgechat:said:resp_r_1")
                case "end of said":
                    other.rpop("edgechat:said:resp_r_1")
                case _:
                    other.hdel("edgechat:run:resp_r_1", "opening")
        assert await store.claim("acme", "resp_r_1") is None
        assert "resp_r_1 is damaged and given up" in caplog.text
        assert await store.unclaimed() == []


async def test_large_entries_go_one_by_one_and_have_time_for_it(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PIPELINE_BYTES", 10_000)
    async with opened(redis) as store:
        text = "x" * 4_000
        entries: list[Entry] = [
            began(),
            *(said(number, number, text=text) for number in range(4)),
            said(4, 4, text=text * 10),
        ]
        sizes = [len(commands) for _, commands in store._pipelines(entries, store._fences(entries))]
        assert sizes == [3, 2, 1]
        monkeypatch.setattr(store_module, "SLOWEST_BYTES_PER_S", 1_000_000)
        allowed: list[float | None] = []
        execute = Pipeline.execute

        async def noted(pipeline: Pipeline, raise_on_error: bool = True) -> object:
            assert pipeline.connection is not None
            allowed.append(pipeline.connection.socket_timeout)
            return await execute(pipeline, raise_on_error)

        monkeypatch.setattr(Pipeline, "execute", noted)
        assert await store.write(entries) == ["kept"] * 6
        first, _, large = allowed
        assert first is not None
        assert large is not None
        assert store_module.TIMEOUT_S < first < store_module.TIMEOUT_S + 0.04 <= large
        found = await store.claim("acme", "resp_r_1")
    assert isinstance(found, Unfinished)
    assert found.ids == [0, 1, 2, 3, 4]


async def test_of_a_batch_that_is_cut_in_the_middle_the_first_pipelines_are_kept(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PIPELINE_BYTES", 1)
    async with opened(redis) as store:
        send, sent = store._send, 0

        async def cut(commands: list[list[store_module.Argument]]) -> list[object]:
            nonlocal sent
            sent += 1
            if sent == 3:
                raise ConnectionResetError("cut")
            return await send(commands)

        monkeypatch.setattr(store, "_send", cut)
        assert await store.write([began(), said(0, 1), said(1, 2), ended("resp_r_2")]) == [
            *["kept"] * 2,
            *["refused"] * 2,
        ]
        found = await store.claim("acme", "resp_r_1")
    assert isinstance(found, Unfinished)
    assert found.ids == [1]


async def test_a_password_is_asked_for_and_never_repeated(
    redis_of_its_own: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    redis_of_its_own.start()
    with redis_of_its_own.client() as other:
        other.config_set("requirepass", "hush-hush")
    with_password = redis_of_its_own.url.replace("//", "//:hush-hush@")
    wrong = redis_of_its_own.url.replace("//", "//:wrong-word@")
    store = await RedisStore.open(with_password, "a", "1")
    assert await store.write([ended()]) == ["kept"]
    with pytest.raises(StoreUnavailable, match="invalid username-password") as refused:
        await RedisStore.open(wrong, "b", "1")
    assert "wrong-word" not in refused.value.message
    redis_of_its_own.kill()
    with pytest.raises(StoreUnavailable) as refused:
        await store.write([ended("resp_r_2")])
    await store.close()
    assert "hush" not in refused.value.message + caplog.text


async def test_close_finishes_every_write_that_was_accepted(redis: RedisServer) -> None:
    store = await RedisStore.open(redis.url, "a", "1")
    writes = [asyncio.create_task(store.write([ended(f"resp_r_{number}")])) for number in range(50)]
    await asyncio.sleep(0)
    for write in writes:
        write.cancel()
    await store.close()
    async with opened(redis, "b") as store:
        assert [await store.get("acme", f"resp_r_{number}") is None for number in range(50)] == [False] * 50


async def test_many_calls_at_once_share_few_connections_and_too_many_are_refused(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(redis) as store:
        await store.write([ended()])
        assert await asyncio.gather(*(store.get("acme", "resp_r_1") for _ in range(100))) == [response()] * 100
        with redis.client() as other:
            ours = store_module.READING_CONNECTIONS + store_module.JOURNAL_CONNECTIONS
            assert len(other.client_list()) <= ours + 1
        monkeypatch.setattr(store_module, "MAX_WAITING", 4)
        waiting = [asyncio.create_task(store.get("acme", "x")) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="4 calls behind"):
            await store.get("acme", "x")
        await store.beat()
        assert await store.write([ended("resp_r_2")]) == ["kept"], "what keeps responses waits for no reader"
        assert await asyncio.gather(*waiting) == [None] * 4
