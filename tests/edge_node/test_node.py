"""The node around a fake engine: real sockets, real WebSocket routers, no model."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from core.errors import EdgechatError
from core.frames import (
    MAX_FRAME_BYTES,
    PROTOCOL,
    Cancel,
    Done,
    Drain,
    Failed,
    Generate,
    Hello,
    Ping,
    Progress,
    Started,
    Status,
    Timings,
    Tokens,
    Usage,
    encode,
)
from edge_node.__main__ import _tls
from edge_node.config import ListenSection
from edge_node.runtime.pipe import Fatal, Load, Loaded, Outputs, Residents, outputs
from tests.e2e.waiting import Answer, eventually_async, http
from tests.edge_node.fake_engine import HOST, RELEASE, RouterLink, Served, dial, generate, open_link, row, settings_with

SECRET = "a-long-random-string"
EPOCHS_PER_OWNER = 1_000_000
"""How far a router that adopts a stream goes ahead of the one before."""
TLS = Path(__file__).parent / "tls"


def done(stream: str, epoch: int = 1) -> Outputs:
    return outputs([Done(stream, epoch, "stop", Usage(1, 0, 1), Timings())])


async def get(port: int, path: str, secret: str | None = None) -> Answer:
    return await asyncio.to_thread(http, f"http://{HOST}:{port}{path}", key=secret)


async def closing_of(link: RouterLink) -> tuple[int, str]:
    """Code and reason that the node closes with."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            await link.connection.recv()
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


# -- who is let in ---------------------------------------------------------------------------


@pytest.mark.parametrize("secret", ["", "wrong", SECRET + "x", SECRET[:-1], "gehe\u00efm"])
async def test_a_router_without_the_link_secret_is_answered_401(secret: str) -> None:
    async with Served(settings_with(), SECRET) as served:
        with pytest.raises(InvalidStatus) as caught:
            async with open_link(served.port, secret):
                pass
        assert caught.value.response.status_code == 401
        async with dial(served.port, secret=SECRET) as link:
            assert link.hello.name == "eu"


async def test_hello_says_what_the_node_serves() -> None:
    settings = settings_with(engine={"context_tokens": 4096})
    async with Served(settings) as served, dial(served.port) as link:
        hello = link.hello
        assert (hello.name, hello.region, hello.instance) == ("eu", "europe", served.node.instance)
        assert (hello.releases, hello.variants) == ([RELEASE], ["test"])
        assert hello.context_tokens == 256, "the release's own limit caps the configured one"
        assert hello.slots == 4


async def test_a_router_of_another_protocol_is_told_so() -> None:
    async with Served(settings_with()) as served, open_link(served.port) as connection:
        link = RouterLink(connection)
        await link.send(Hello(PROTOCOL + 6, "r1", "i", "eu"))
        code, reason = await closing_of(link)
        assert code == 1002
        assert reason == "This node speaks link protocol 1, the router 7; run the same version."


@pytest.mark.parametrize(
    ("first", "code"),
    [
        ("text", 1003),
        (b"\xc1", 1002),
        (encode(Ping(1)), 1002),
        (encode(Drain(1.0)), 1002),
    ],
)
async def test_a_router_that_speaks_nonsense_is_closed(first: str | bytes, code: int) -> None:
    async with Served(settings_with()) as served, open_link(served.port) as connection:
        await connection.send(first)
        assert (await closing_of(RouterLink(connection)))[0] == code


async def test_an_oversized_frame_is_refused_by_its_header() -> None:
    async with Served(settings_with()) as served, open_link(served.port) as connection:
        masked_binary, length, mask = b"\x82\xff", (MAX_FRAME_BYTES + 1).to_bytes(8, "big"), bytes(4)
        connection.transport.write(masked_binary + length + mask)
        assert (await closing_of(RouterLink(connection)))[0] == 1009


async def test_nonsense_after_hello_ends_that_link_only() -> None:
    async with Served(settings_with()) as served, dial(served.port) as bad, dial(served.port) as good:
        await bad.connection.send(b"\xc1")
        code, reason = await closing_of(bad)
        assert code == 1002
        assert "cannot read" in reason
        await good.send(Ping(5))
        await status_with_echo(good, 5)


async def test_the_link_is_served_over_tls_when_configured() -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
    client = ssl.create_default_context(cafile=TLS / "cert.pem")
    async with Served(settings_with(), SECRET, server) as served, dial(served.port, secret=SECRET, tls=client) as link:
        assert link.hello.name == "eu"


async def test_with_a_client_ca_a_router_must_show_a_certificate_and_consul_need_not() -> None:
    server = _tls(ListenSection(tls_cert=str(TLS / "cert.pem"), tls_key=str(TLS / "key.pem")), str(TLS / "cert.pem"))
    assert server is not None
    settings = settings_with(
        listen={"tls_cert": TLS / "cert.pem", "tls_key": TLS / "key.pem"}, link={"client_ca": TLS / "cert.pem"}
    )
    client = ssl.create_default_context(cafile=TLS / "cert.pem")
    async with Served(settings, SECRET, server) as served:
        with pytest.raises(InvalidStatus) as refused:
            async with dial(served.port, secret=SECRET, tls=client):
                pass
        assert refused.value.response.status_code == 403
        status = await asyncio.to_thread(https_status, f"https://{HOST}:{served.port}/livez", client)
        assert status == 200
        client.load_cert_chain(TLS / "cert.pem", TLS / "key.pem")
        async with dial(served.port, secret=SECRET, tls=client) as link:
            assert link.hello.name == "eu"


def https_status(url: str, trusting: ssl.SSLContext) -> int:
    with urllib.request.urlopen(url, context=trusting) as answer:
        status: int = answer.status
        return status


# -- status ----------------------------------------------------------------------------------


async def status_with_echo(link: RouterLink, nonce: int) -> Status:
    while True:
        status = await link.receive(Status)
        if status.echo == nonce:
            return status


async def status_where(link: RouterLink, **fields: object) -> Status:
    """The next Status with these values."""
    while True:
        status = await link.receive(Status)
        if all(getattr(status, name) == value for name, value in fields.items()):
            return status


async def test_a_ping_is_echoed_by_a_status() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        await link.send(Ping(4711))
        await status_with_echo(link, 4711)


async def test_status_comes_unasked_and_follows_the_engine() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        assert (await link.receive(Status)).state == "loading"
        engine = await served.engines.ready()
        status = await status_where(link, state="ready")
        assert (status.vouched, status.engine_pid) == (True, engine.pid)
        await status_where(link, vouched=False)  # no beats come from a fake engine of its own accord
        engine.die()
        await status_where(link, state="failed", engine_pid=0)


async def test_load_counts_a_request_as_soon_as_it_is_admitted() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await link.send(Ping(1))
        assert (await status_with_echo(link, 1)).load == 0.25


async def chains_told(link: RouterLink) -> list[tuple[str, int]]:
    """What the next Status says that says anything of the prefix store."""
    while not (status := await link.receive(Status)).chains:
        pass
    return status.chains


async def test_all_links_hear_what_changes_in_the_prefix_store_and_a_new_one_what_the_others_know() -> None:
    async with Served(settings_with()) as served, dial(served.port) as old:
        engine = await served.engines.ready()
        engine.say(Residents([("a", 64), ("b", 128)]))
        assert await chains_told(old) == [("a", 64), ("b", 128)]
        async with dial(served.port) as new:
            assert (await new.receive(Status)).chains == [("a", 64), ("b", 128)]
            engine.say(Residents([("b", 64)]), Residents([("a", 0), ("c", 64)]))
            changes: dict[str, int] = {}
            while len(changes) < 3:  # one Status or two
                changes |= await chains_told(new)
            assert changes == {"a": 0, "b": 64, "c": 64}
            assert dict(await chains_told(old)).items() <= changes.items()


async def test_the_answer_to_a_ping_says_nothing_of_the_prefix_store() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        for nonce in range(1, 20):
            engine.say(Residents([(f"key {nonce}", 64)]))
            await link.send(Ping(nonce))
            assert (await status_with_echo(link, nonce)).chains == []


async def test_the_prefix_store_ends_with_its_engine_process() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        engine.say(Residents([("a", 64)]))
        assert await chains_told(link) == [("a", 64)]
        engine.die()
        assert await chains_told(link) == [("a", 0)]


# -- streams ---------------------------------------------------------------------------------


async def test_two_routers_get_their_own_streams_and_one_frame_a_step() -> None:
    async with Served(settings_with()) as served, dial(served.port) as one, dial(served.port) as two:
        engine = await served.engines.ready()
        await status_where(one, state="ready")
        for link, stream in ((one, "a1"), (two, "b1"), (one, "a2")):
            await link.send(generate(stream))
            assert (await engine.was_told(Generate)).stream == stream
        engine.say(outputs([Started("a1", 1, 3, 0), row("a1", 0), row("b1", 0), Progress("a2", 1, 2, 3), row("a2", 0)]))
        assert (await one.receive(Tokens)).rows == [row("a1", 0), row("a2", 0)]
        assert (await two.receive(Tokens)).rows == [row("b1", 0)]


async def test_a_cancelled_stream_ends_with_done() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await link.send(Cancel("s", 1))
        assert await engine.was_told(Cancel) == Cancel("s", 1)
        engine.say(done("s"))
        assert (await link.receive(Done)).stream == "s"


async def test_a_stream_moves_to_the_link_with_the_higher_epoch() -> None:
    async with Served(settings_with()) as served, dial(served.port) as old, dial(served.port) as new:
        engine = await served.engines.ready()
        await status_where(old, state="ready")
        await old.send(generate("s", epoch=1))
        assert (await engine.was_told(Generate)).epoch == 1
        await new.send(generate("s", epoch=2))
        assert (await engine.was_told(Generate)).epoch == 2
        engine.say(outputs([row("s", 0, "late", epoch=1)]), outputs([row("s", 0, "new", epoch=2)]))
        assert (await new.receive(Tokens)).rows == [row("s", 0, "new", epoch=2)]
        await old.connection.close()
        await new.send(Ping(1))
        await status_with_echo(new, 1)
        assert engine.told.empty(), "the old link's end does not cancel what has moved away"


async def test_a_router_that_adopts_a_stream_has_it_alone_whatever_the_half_open_link_of_the_old_one_still_does() -> (
    None
):
    async with Served(settings_with()) as served, dial(served.port) as new:
        engine = await served.engines.ready()
        await status_where(new, state="ready")
        async with dial(served.port) as old:
            await old.send(generate("s", epoch=3))
            assert (await engine.was_told(Generate)).epoch == 3
            adopted = 3 + 4_000_000 * EPOCHS_PER_OWNER
            await new.send(generate("s", epoch=adopted))
            assert (await engine.was_told(Generate)).epoch == adopted
            await old.send(Cancel("s", 3))
            await old.send(Cancel("s", adopted))
            await old.send(generate("s", epoch=4))
            await old.send(Ping(1))
            await status_with_echo(old, 1)
            engine.say(outputs([row("s", 0, "old", epoch=3)]), outputs([row("s", 0, "new", epoch=adopted)]))
            assert (await new.receive(Tokens)).rows == [row("s", 0, "new", epoch=adopted)]
            old.connection.transport.abort()
        await eventually_async(lambda: served.node.facts().links == 1)
        assert engine.told.empty(), "neither a late Cancel nor the old link's end reaches what was adopted"
        engine.say(outputs([row("s", 1, epoch=adopted)]), done("s", epoch=adopted))
        assert (await new.receive(Tokens)).rows == [row("s", 1, epoch=adopted)]
        assert (await new.receive(Done)).epoch == adopted


async def test_a_lost_link_cancels_its_streams() -> None:
    async with Served(settings_with()) as served, dial(served.port) as other:
        engine = await served.engines.ready()
        await status_where(other, state="ready")
        async with dial(served.port) as link:
            await link.send(generate("s"))
            await engine.was_told(Generate)
            link.connection.transport.abort()
            assert await engine.was_told(Cancel) == Cancel("s", 1)


async def test_a_router_that_does_not_read_is_cut_off() -> None:
    async with Served(settings_with()) as served, dial(served.port) as reader:
        engine = await served.engines.ready()
        await status_where(reader, state="ready")
        async with dial(served.port) as link:
            await link.send(generate("s"))
            await engine.was_told(Generate)
            link.connection.transport.pause_reading()
            for seq in range(64):
                engine.say(outputs([row("s", seq, "x" * 1024 * 1024)]))
            assert await engine.was_told(Cancel) == Cancel("s", 1)
            link.connection.transport.abort()
        await reader.send(Ping(1))
        await status_with_echo(reader, 1)


@pytest.mark.parametrize(
    ("release", "ready", "code"),
    [("tiny@ba9876543210", True, "model_not_found"), (RELEASE, False, "overloaded")],
)
async def test_a_request_that_others_may_serve_is_refused_retryably(release: str, ready: bool, code: str) -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        if ready:
            await served.engines.ready()
            await status_where(link, state="ready")
        await link.send(generate("s", release=release))
        failed = await link.receive(Failed)
        assert (failed.stream, failed.epoch, failed.code, failed.retryable) == ("s", 1, code, True)


async def test_a_request_for_an_engine_that_does_not_read_is_refused() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        engine.backed_up = True
        await link.send(generate("s"))
        assert (await link.receive(Failed)).code == "overloaded"
        assert engine.told.empty()


# -- the engine process ----------------------------------------------------------------------


async def test_a_dead_engine_fails_its_streams_and_is_started_again() -> None:
    async with Served(settings_with()) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await engine.was_told(Generate)
        engine.die()
        failed = await link.receive(Failed)
        assert (failed.stream, failed.code, failed.retryable) == ("s", "engine_lost", True)
        second = await served.engines.ready(2)
        await status_where(link, state="ready", engine_pid=second.pid)
        await link.send(generate("s", epoch=2))
        assert (await second.was_told(Generate)).epoch == 2


async def test_an_engine_that_hangs_is_killed() -> None:
    async with Served(settings_with(node={"hang_s": 0.2})) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await served.engines.nth(2)
        assert engine.killed
        await status_where(link, state="loading")


@pytest.mark.parametrize("stuck", [False, True])
async def test_the_streams_of_an_engine_that_hangs_fail_as_stalled_as_soon_as_it_is_killed(stuck: bool) -> None:
    async with Served(settings_with(node={"hang_s": 0.2})) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        engine.stuck = stuck
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await engine.was_told(Generate)
        failed = await link.receive(Failed)
        assert (failed.stream, failed.code, failed.retryable) == ("s", "engine_stalled", True)
        assert failed.message == "The engine of node 'eu' hung while it was answering; send the request again."
        await link.send(generate("s", epoch=2))
        refused = await link.receive(Failed)
        assert (refused.epoch, refused.code) == (2, "overloaded")
        if stuck:
            assert len(served.engines.started) == 1, "never two at once"
            engine.say(Loaded(0.1), outputs([row("s", 0, "late")]))
            engine.die()
        await served.engines.ready(2)
        await status_where(link, state="ready", engine_pid=1001)


async def test_what_the_first_engine_cannot_serve_ends_the_node_with_its_sentence() -> None:
    async with Served(settings_with()) as served:
        engine = await served.engines.nth(1)
        engine.say(Fatal("device_unavailable", "There is no such device."))
        with pytest.raises(EdgechatError, match="no such device"):
            await served.running


async def test_what_a_later_engine_cannot_serve_is_tried_again() -> None:
    async with Served(settings_with()) as served:
        (await served.engines.ready()).die()
        second = await served.engines.nth(2)
        second.say(Fatal("release_invalid", "It is damaged."))
        second.die()
        await served.engines.ready(3)
        assert not served.running.done()


async def test_an_engine_is_told_to_load_what_the_configuration_says() -> None:
    settings = settings_with(
        engine={
            "slots": 3,
            "threads": 2,
            "max_waiting": 9,
            "kv_cache_bytes": 5_000_000_000,
            "speculation": False,
            "spin_us": 7,
            "verify": False,
            "failover_exact_s": 2.5,
        },
        node={"release": "x/y"},
    )
    async with Served(settings) as served:
        await eventually_async(lambda: served.engines.started)
        load = await served.engines.started[0].was_told(Load)
        assert load == Load("x/y", RELEASE, "test", "cpu", 2, 3, 256, 9, 0.0, 5_000_000_000, False, 7, False, 2.5)


# -- shutting down ---------------------------------------------------------------------------


async def test_a_draining_node_lets_answers_finish_and_takes_no_new_ones() -> None:
    async with Served(settings_with(node={"drain_s": 60.0})) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await engine.was_told(Generate)
        served.node.stop()
        assert (await link.receive(Drain)).deadline_s == 60.0
        assert json.loads((await get(served.port, "/readyz")).body)["reason"] == "draining"
        await link.send(generate("t"))
        assert (await link.receive(Failed)).code == "draining"
        # Handed over by a router that had not heard of this drain yet: it has nowhere to go back to.
        await link.send(generate("u", epoch=2))
        assert (await engine.was_told(Generate)).stream == "u"
        engine.say(outputs([row("s", 0)]), done("s"), done("u", 2))
        assert {(await link.receive(Done)).stream for _ in "su"} == {"s", "u"}
        assert (await closing_of(link))[0] == 1012
        await served.running


async def test_every_router_is_told_of_a_drain_and_one_that_links_up_later_sees_it() -> None:
    async with Served(settings_with(node={"drain_s": 3600.0})) as served:
        async with dial(served.port) as one, dial(served.port) as two:
            engine = await served.engines.ready()
            await status_where(one, state="ready")
            await one.send(generate("s"))
            await engine.was_told(Generate)
            served.node.stop()
            for link in (one, two):
                assert (await link.receive(Drain)).deadline_s == 3600.0
            async with dial(served.port) as late:
                assert (await late.receive(Status)).draining
            engine.say(outputs([row("s", 0)]))
            assert (await one.receive(Tokens)).rows == [row("s", 0)], "who is being answered is answered on"
        await served.running


@pytest.mark.parametrize("how", ["answered", "handed off", "its router lost", "its engine lost"])
async def test_a_drain_ends_with_the_last_stream_however_that_goes(how: str) -> None:
    async with Served(settings_with(node={"drain_s": 3600.0})) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        for stream in ("first", "last"):
            await link.send(generate(stream))
            await engine.was_told(Generate)
        served.node.stop()
        await link.receive(Drain)
        engine.say(done("first"))
        await link.receive(Done)
        assert not served.running.done()
        match how:
            case "answered":
                engine.say(done("last"))
            case "handed off":
                await link.send(Cancel("last", 1))
                assert await engine.was_told(Cancel) == Cancel("last", 1)
                engine.say(done("last"))
            case "its router lost":
                link.connection.transport.abort()
            case "its engine lost":
                engine.die()
        await served.running


async def test_a_node_that_is_stopped_while_it_loads_ends_at_once() -> None:
    async with Served(settings_with(node={"drain_s": 3600.0})) as served, dial(served.port) as link:
        await served.engines.nth(1)
        served.node.stop()
        await link.receive(Drain)
        assert (await closing_of(link))[0] == 1012
        await served.running


async def test_answers_that_outlast_the_drain_fail_retryably() -> None:
    async with Served(settings_with(node={"drain_s": 0.05})) as served, dial(served.port) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await engine.was_told(Generate)
        served.node.stop()
        failed = await link.receive(Failed)
        assert (failed.stream, failed.code, failed.retryable) == ("s", "draining", True)
        assert (await closing_of(link))[0] == 1012


# -- HTTP ------------------------------------------------------------------------------------


async def test_readyz_follows_the_engine_and_livez_does_not() -> None:
    async with Served(settings_with()) as served:
        assert (await get(served.port, "/livez")).status == 200
        loading = await get(served.port, "/readyz")
        assert (loading.status, loading.json()["reason"]) == (503, "loading")
        engine = await served.engines.ready()
        await eventually_async(lambda: is_ready(served.port))
        engine.die()
        lost = await get(served.port, "/readyz")
        assert (lost.status, lost.json()["reason"]) == (503, "engine_lost")
        assert (await get(served.port, "/livez?probe=1")).status == 200


async def is_ready(port: int) -> bool:
    return (await get(port, "/readyz")).status == 200


async def test_metrics_need_the_link_secret_off_loopback() -> None:
    settings = settings_with(listen={"host": "0.0.0.0"}, link={"secret_file": "somewhere"})
    async with Served(settings, SECRET) as served:
        assert (await get(served.port, "/metrics")).status == 401
        answer = await get(served.port, "/metrics", SECRET)
        assert answer.status == 200
        assert b'edgechat_node_info{node="eu"' in answer.body


async def test_metrics_are_open_on_loopback_and_count() -> None:
    async with Served(settings_with(), SECRET) as served, dial(served.port, secret=SECRET) as link:
        engine = await served.engines.ready()
        await status_where(link, state="ready")
        await link.send(generate("s"))
        await engine.was_told(Generate)
        engine.say(outputs([row("s", 0)]))
        await link.receive(Tokens)
        body = (await get(served.port, "/metrics")).body
        assert b"edgechat_output_tokens_total 1.0" in body
        assert b"edgechat_links 1.0" in body


async def test_another_path_is_answered_404() -> None:
    async with Served(settings_with()) as served:
        assert (await get(served.port, "/")).status == 404
