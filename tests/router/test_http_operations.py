"""The page, and what operators ask."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp import ClientSession
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from router.config import Discovery
from router.http import pages
from router.registry import RouterAddress
from tests.router.fakes import BODY, CONFIG, MODEL, FakeRouter, running_router, saying, with_key


@pytest.fixture
def web_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "index.html").write_text("<!doctype html><title>chat</title>")
    (folder / "chat.js").write_text("export {};")
    (folder / "notes.py").write_text("secret = 1")
    (tmp_path / "outside.js").write_text("secret")
    monkeypatch.setattr(pages, "WEB_FOLDER", folder)
    return folder


@pytest.mark.usefixtures("web_folder")
async def test_the_page_is_served_without_a_key_and_may_do_nothing_but_talk_to_us(router: FakeRouter) -> None:
    async with ClientSession(router.url) as http, http.get("/") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    async with ClientSession(router.url) as http, http.get("/web/chat.js") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/javascript; charset=utf-8")


@pytest.mark.usefixtures("web_folder")
@pytest.mark.parametrize(
    "path",
    [
        *("../outside.js", "%2e%2e/outside.js", "..%2foutside.js", "%2fetc%2fpasswd", "notes.py", "none.js", "a%00.js"),
        "a" * 300 + ".js",
    ],
)
async def test_only_files_of_the_page_are_served(router: FakeRouter, path: str) -> None:
    async with ClientSession() as http, http.get(URL(f"{router.url}/web/{path}", encoded=True)) as answer:
        assert answer.status == 404
        assert "secret" not in await answer.text()


async def test_ready_means_that_a_node_can_be_given_work(router: FakeRouter) -> None:
    async with ClientSession(router.url) as http:
        assert (await http.get("/livez")).status == 200
        assert (await http.get("/readyz")).status == 503
        router.links.node("eu").come_up()
        assert (await http.get("/readyz")).status == 200


async def test_the_fleet_shows_every_node_to_operators(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up(0.002)
    router.links.node("us").come_up()
    router.links.nodes["ws://us:1/link"].go_down()
    async with http.get("/fleet", headers=with_key("ops")) as answer:
        eu, us = (await answer.json())["nodes"]
    assert (eu["name"], eu["region"], eu["release"]) == ("eu", "region-eu", "tiny@0123456789ab")
    assert (eu["variant"], eu["pid"], eu["engine_pid"], eu["state"]) == ("cpu-int8", 4242, 77, "ready")
    assert (eu["running"], eu["waiting"], eu["slots"], eu["rtt_ms"]) == (0, 0, 2, 2.0)
    assert us["state"] == "down"


async def test_the_edges_are_shown_to_any_key(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu").come_up(0.002)
    for name in ("alice", "ops"):
        async with http.get("/v1/edges", headers=with_key(name)) as answer:
            (edge,) = (await answer.json())["data"]
        assert edge == {"name": "eu", "region": "region-eu", "models": [MODEL], "available": True, "rtt_ms": 2.0}


async def test_the_edges_list_nameless_routers_as_they_are_configured() -> None:
    listed = Discovery(routers=["https://eu.example", "us=https://us.example"])
    async with (
        running_router(structs.replace(CONFIG, discovery=listed)) as router,
        ClientSession(router.url, headers=with_key("alice")) as http,
    ):
        router.context.routers.set_addresses([RouterAddress("us", "https://us.example")])
        async with http.get("/v1/edges") as answer:
            assert (await answer.json())["routers"] == [
                {"name": "us", "url": "https://us.example"},
                {"name": "", "url": "https://eu.example"},
            ]


async def test_metrics_count_what_happened_and_hold_no_text(router: FakeRouter, http: ClientSession) -> None:
    router.links.node("eu", saying("Sesame")).come_up()
    (await http.post("/v1/responses", json=BODY | {"input": "Mellon"})).close()
    (await http.post("/v1/responses", json={})).close()
    async with http.get("/metrics", headers=with_key("ops")) as answer:
        text = await answer.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["edgechat_router_first_token_seconds"].type == "histogram"
    assert 'edgechat_router_responses_total{status="completed"} 1.0' in text
    assert 'edgechat_router_refusals_total{code="invalid_request"} 1.0' in text
    assert 'edgechat_router_nodes{state="ready"} 1.0' in text
    assert "Sesame" not in text
    assert "Mellon" not in text


async def test_a_history_that_no_model_could_read_is_refused_before_it_fills_the_memory(
    router: FakeRouter, http: ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.dispatch.MAX_HISTORY_CHARACTERS", 100)
    router.links.node("eu", saying("Hi")).come_up()
    async with http.post("/v1/responses", json=BODY | {"input": "x" * 60}) as answer:
        first = (await answer.json())["id"]
    async with http.post("/v1/responses", json=BODY | {"input": "x" * 60, "previous_response_id": first}) as answer:
        second = (await answer.json())["id"]
    async with http.post("/v1/responses", json=BODY | {"previous_response_id": second}) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["param"]) == (400, "previous_response_id")
