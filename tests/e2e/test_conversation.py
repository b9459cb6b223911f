"""A person's first conversation: real processes, the unmodified SDK, every way in."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai
import pytest
from websockets.sync.client import connect

from tests.e2e.clients import MODEL, answer, check_log, raw_socket, receive, say, sdk, text_of, until_terminal
from tests.e2e.processes import Fleet
from tests.e2e.waiting import http

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24}


def test_the_sdk_streams_an_answer_over_websocket(fleet: Fleet) -> None:
    types: list[str] = []
    text = ""
    with sdk(fleet).responses.connect() as connection:
        connection.response.create(model=MODEL, input="Name three rivers.", max_output_tokens=32)
        for event in connection:
            types.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type in {"response.completed", "response.incomplete"}:
                assert event.response.output_text == text
                break
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types.count("response.output_text.delta") > 3
    assert text.strip()


def test_websocket_sse_json_and_chat_completions_say_the_same(fleet: Fleet) -> None:
    client: Any = sdk(fleet)
    question = "What is the capital of France?"
    with raw_socket(fleet) as socket:
        over_websocket = text_of(answer(socket, input=question, **GREEDY))
    with client.responses.create(model=MODEL, input=question, stream=True, **GREEDY) as stream:
        over_sse = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    as_json = client.responses.create(model=MODEL, input=question, **GREEDY).output_text
    messages = [{"role": "user", "content": question}]
    limits = {"temperature": 0, "max_tokens": 24}
    chat = client.chat.completions.create(model=MODEL, messages=messages, **limits)
    chunks = client.chat.completions.create(model=MODEL, messages=messages, stream=True, **limits)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert over_websocket
    assert {over_sse, as_json, chat.choices[0].message.content, streamed} == {over_websocket}


def test_every_raw_frame_is_valid_for_the_sdks_own_models(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        events = answer(socket, input="Say hello.", max_output_tokens=16)
    check_log(events)
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["text"] == text_of(events)
    usage = events[-1]["response"]["usage"]
    assert usage["output_tokens"] <= 16
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_sse_carries_the_same_events_and_names_the_node(fleet: Fleet) -> None:
    body = {"model": MODEL, "input": "Say hello.", "stream": True, "max_output_tokens": 8}
    reply = http(f"{fleet.base_url}/responses", method="POST", body=body)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-edge-node"] in fleet.nodes
    lines = reply.body.decode().splitlines()
    check_log([json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")])


def test_a_second_turn_continues_the_first_as_if_all_of_it_had_been_sent_again(fleet: Fleet) -> None:
    client: Any = sdk(fleet)
    first = client.responses.create(model=MODEL, input="My name is Ada.", **GREEDY)
    second = client.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, instructions="Be brief.", **GREEDY
    )
    whole = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    resent = client.responses.create(model=MODEL, input=whole, instructions="Be brief.", **GREEDY)
    assert second.output_text == resent.output_text
    assert second.usage.input_tokens == resent.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text


def test_a_deleted_response_is_gone(fleet: Fleet) -> None:
    client: Any = sdk(fleet)
    made = client.responses.create(model=MODEL, input="Hello", max_output_tokens=4)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_an_unstored_response_lives_as_long_as_its_connection(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        first = answer(socket, input="My name is Ada.", store=False, **GREEDY)[-1]["response"]
        follow = {"input": "What is my name?", "previous_response_id": first["id"], "store": False}
        second = answer(socket, **follow, **GREEDY)[-1]["response"]
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    with raw_socket(fleet) as socket:
        say(socket, **follow)
        refusal = receive(socket)
    assert (refusal["type"], refusal["code"]) == ("error", "previous_response_not_found")
    assert (refusal["status"], refusal["param"]) == (400, "previous_response_id")


def test_seeded_sampling_repeats_itself_and_another_seed_does_not(fleet: Fleet) -> None:
    def story(seed: int) -> str:
        with raw_socket(fleet) as socket:
            return text_of(answer(socket, input="Tell me a story.", temperature=1, seed=seed, max_output_tokens=32))

    assert story(7) == story(7) != story(8)


def test_eight_chats_at_once_say_what_each_says_alone(fleet: Fleet) -> None:
    prompts = [f"Write {count} sentences about the number {count}." * count for count in range(1, 9)]
    fields = {"temperature": 0.9, "max_output_tokens": 32, "store": False}

    def ask(index: int) -> str:
        with raw_socket(fleet) as socket:
            return text_of(answer(socket, input=prompts[index], seed=index, **fields))

    alone = [ask(index) for index in range(8)]
    together = [""] * 8

    def ask_beside_others(index: int) -> None:
        together[index] = ask(index)

    threads = [threading.Thread(target=ask_beside_others, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_chinese_and_emoji_arrive_whole(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        events = answer(socket, input="Repeat exactly: 你好，世界 🌍🎉", temperature=0, max_output_tokens=48)
    assert "\ufffd" not in "".join(event.get("delta", "") for event in events[:-1])
    check_log(events)


def test_lanes_of_one_connection_run_side_by_side(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        for lane in ("a", "b"):
            say(socket, input="Count to ten.", stream_id=lane, max_output_tokens=12, store=False)
        logs: dict[str, list[dict[str, Any]]] = {"a": [], "b": []}
        order: list[str] = []
        while len(order) < 2:
            event = receive(socket)
            logs[event["stream_id"]].append(event)
            if event["type"] in {"response.completed", "response.incomplete"}:
                order.append(event["stream_id"])
    assert sorted(order) == ["a", "b"]
    for log in logs.values():
        assert [event["sequence_number"] for event in log] == list(range(len(log)))


def test_extensions_name_the_node_only_to_those_who_asked(fleet: Fleet) -> None:
    with raw_socket(fleet, extensions=True) as socket:
        say(socket, input="Hi", max_output_tokens=4)
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["type"] not in {"response.completed", "response.incomplete"}:
            seen.append(receive(socket))
    node = next(event for event in seen if event["type"] == "edgechat:node")
    assert node["node"] in fleet.nodes
    assert "sequence_number" not in node
    check_log([event for event in seen if not event["type"].startswith("edgechat:")])
    with raw_socket(fleet) as socket:
        assert not [event for event in answer(socket, input="Hi", max_output_tokens=4) if ":" in event["type"]]


def test_a_cancelled_response_ends_as_cancelled_and_keeps_what_it_said(fleet: Fleet) -> None:
    with raw_socket(fleet) as socket:
        say(socket, input="Tell me a very long story.", max_output_tokens=512)
        created = receive(socket)
        while receive(socket)["type"] != "response.output_text.delta":
            pass
        response_id = created["response"]["id"]
        say(socket, type="response.cancel", response_id=response_id)
        events = until_terminal(socket)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["status"] == "cancelled"
    kept = sdk(fleet).responses.retrieve(response_id)
    assert kept.status == "cancelled"
    assert kept.output_text


def test_ten_lines_of_javascript_would_do_on_the_plain_shim(fleet: Fleet) -> None:
    offered = ["edgechat.plain.v1", "openai-insecure-api-key.dev"]
    url = fleet.url.replace("http", "ws", 1) + "/ws"
    with connect(url, subprotocols=offered, proxy=None) as socket:  # type: ignore[arg-type]
        assert socket.subprotocol == "edgechat.plain.v1"
        socket.send(json.dumps({"text": "My name is Ada."}))
        assert json.loads(socket.recv(timeout=60))["reply"]
        socket.send(json.dumps({"text": "What is my name?"}))
        assert json.loads(socket.recv(timeout=60))["reply"]


def test_models_are_listed(fleet: Fleet) -> None:
    assert [model.id for model in sdk(fleet).models.list()] == [MODEL]
