"""The unmodified openai SDK against a router with scripted nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.resources.responses.responses import AsyncResponsesConnection
from openai.types.responses import Response

from tests.router.fakes import MODEL, FakeRouter, failing, running_router, saying


@pytest.fixture
async def router() -> AsyncIterator[FakeRouter]:
    async with running_router() as router:
        yield router


@pytest.fixture
async def client(router: FakeRouter) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="dev", max_retries=0) as client:
        yield client


async def test_a_response_arrives_over_the_web_socket_event_by_event(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Rhine", ", Elbe", ", Oder")).come_up()
    async with client.responses.connect() as connection:
        await connection.response.create(model=MODEL, input="Name three rivers.")
        types, text = [], ""
        async for event in connection:
            types.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.completed":
                assert event.response.output_text == text
                break
    assert text == "Rhine, Elbe, Oder"
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


async def test_two_turns_on_one_connection_share_a_conversation(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hello", ".")).come_up()
    async with client.responses.connect() as connection:
        await connection.response.create(model=MODEL, input="I am Ada.", instructions="Be brief.")
        first = await _completed(connection)
        await connection.response.create(model=MODEL, input="Who am I?", previous_response_id=first.id)
        second = await _completed(connection)
    assert second.previous_response_id == first.id
    await router.links.generates.get()
    _, frame = await router.links.generates.get()
    assert [(item.role, item.text) for item in frame.items] == [
        ("user", "I am Ada."),
        ("assistant", "Hello."),
        ("user", "Who am I?"),
    ]
    assert frame.items[1].ids == [100, 101]


async def _completed(connection: AsyncResponsesConnection) -> Response:
    async for event in connection:
        assert event.type != "error", event
        if event.type == "response.completed":
            return event.response
    raise AssertionError("the connection ended before the response")


async def test_the_same_events_come_as_sse(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hi", " there")).come_up()
    stream = await client.responses.create(model=MODEL, input="Hello", stream=True)
    assert stream.response.headers["x-edge-node"] == "eu"
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == "Hi there"


async def test_a_response_can_be_awaited_whole_retrieved_and_deleted(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    made = await client.responses.create(model=MODEL, input="Hello")
    assert made.output_text == "Hi"
    assert made.usage is not None
    assert made.usage.input_tokens_details.cached_tokens == 2
    assert (await client.responses.retrieve(made.id)).model_dump() == made.model_dump()
    await client.responses.delete(made.id)
    with pytest.raises(NotFoundError):
        await client.responses.retrieve(made.id)


async def test_a_chat_completion_streams_and_ends_with_usage(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hi", " there")).come_up()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hi there"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8
    assert router.store.kept == {}


async def test_a_chat_completion_arrives_whole_and_names_its_length_limit(
    router: FakeRouter, client: AsyncOpenAI
) -> None:
    router.links.node("eu", saying("Hi", finish="length")).come_up()
    made = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_completion_tokens=2, stop=["\n"], seed=-1
    )
    assert made.choices[0].message.content == "Hi"
    assert made.choices[0].finish_reason == "length"
    _, frame = await router.links.generates.get()
    assert (frame.max_output_tokens, frame.stop, frame.seed) == (2, ["\n"], 2**63 - 1)


async def test_an_unknown_model_is_a_404_that_lists_the_models(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    with pytest.raises(NotFoundError, match="models: tiny") as caught:
        await client.responses.create(model="gpt-9", input="Hello")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_too_long_is_a_400_with_both_numbers(
    router: FakeRouter, client: AsyncOpenAI, stream: bool
) -> None:
    sentence = "The conversation has 9000 tokens, the model's context holds 2048; shorten it."
    router.links.node("eu", failing("context_length_exceeded", sentence)).come_up()
    with pytest.raises(BadRequestError, match=r"9000 tokens.*2048") as caught:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], stream=stream)
    assert caught.value.code == "context_length_exceeded"


async def test_the_models_are_listed_and_found_by_name(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "edgechat"
    with pytest.raises(NotFoundError):
        await client.models.retrieve("gpt-9")
