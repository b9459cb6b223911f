"""The unmodified openai SDK against a router with scripted nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import APIStatusError, AsyncOpenAI, BadRequestError, NotFoundError
from openai.resources.responses.responses import AsyncResponsesConnection
from openai.types.responses import Response
from openai.types.responses.response_output_text import ResponseOutputText
from pydantic import BaseModel

from core.frames import Failed, Generate, Logprobs, Started
from tests.router.fakes import MODEL, FakeRouter, Said, Script, done, failing, running_router, saying, tokens, words


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


# -- settings, formats, log-probabilities -----------------------------------------------------------


def spelling(frame: Generate) -> list[Said]:
    """Say two words with their log-probabilities, if those were asked for."""
    ids, deltas = words("Hi", " there")
    if frame.sampling.top_logprobs >= 0:
        for index, text in enumerate((b"Hi", b" there")):
            top = [(ids[index], -0.5), (7, float("-inf"))][: frame.sampling.top_logprobs]
            deltas[index].insert(-1, Logprobs(-0.5, top, text, [text, b"\xf0"][: len(top)]))
    rows = [tokens(frame.stream, frame.epoch, seq, [ids[seq]], [deltas[seq]]) for seq in range(len(ids))]
    return [Started(frame.stream, frame.epoch, 5, 2), *rows, done(frame, len(ids))]


def overdue(*, after: str) -> Script:
    """A node that runs out of time, after it has said something or nothing."""

    def script(frame: Generate) -> list[Said]:
        failed = Failed(frame.stream, frame.epoch, "deadline_exceeded", False, "Too late.")
        ids, deltas = words(after)
        said: list[Said] = [tokens(frame.stream, frame.epoch, 0, ids[:1], deltas[:1])] if after else []
        return [Started(frame.stream, frame.epoch, 5, 2), *said, failed]

    return script


async def test_log_probabilities_arrive_with_the_text_and_with_the_whole(
    router: FakeRouter, client: AsyncOpenAI
) -> None:
    router.links.node("eu", spelling).come_up()
    streamed, whole = [], []
    async with client.responses.connect() as connection:
        await connection.response.create(
            model=MODEL, input="Hello", include=["message.output_text.logprobs"], top_logprobs=2
        )
        async for event in connection:
            if event.type == "response.output_text.delta":
                streamed += event.logprobs
            if event.type == "response.completed":
                (message,) = event.response.output
                assert message.type == "message"
                (part,) = message.content
                assert isinstance(part, ResponseOutputText)
                whole = part.logprobs or []
                assert event.response.top_logprobs == 2
                break
    assert [(entry.token, entry.bytes, entry.logprob) for entry in whole] == [
        ("Hi", list(b"Hi"), -0.5),
        (" there", list(b" there"), -0.5),
    ]
    assert [(top.token, top.logprob) for top in whole[0].top_logprobs] == [("Hi", -0.5), ("\ufffd", -9999.0)]
    assert [(entry.token, entry.logprob) for entry in streamed] == [("Hi", -0.5), (" there", -0.5)]


async def test_a_chat_has_its_log_probabilities(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", spelling).come_up()
    made = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1, logit_bias={"5": -100}
    )
    told = made.choices[0].logprobs
    assert told is not None and told.content is not None
    assert [(entry.token, len(entry.top_logprobs)) for entry in told.content] == [("Hi", 1), (" there", 1)]
    _, frame = await router.links.generates.get()
    assert (frame.sampling.top_logprobs, frame.sampling.logit_bias) == (1, [(5, -100.0)])


class River(BaseModel):
    name: str


async def test_an_answer_in_a_schema_is_parsed_by_the_sdk(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", saying('{"name":', '"Rhine"}')).come_up()
    response = await client.responses.parse(model=MODEL, input="A river.", text_format=River)
    chat = await client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "A river."}], response_format=River
    )
    assert response.output_parsed == chat.choices[0].message.parsed == River(name="Rhine")
    formats = [(await router.links.generates.get())[1].format for _ in range(2)]
    assert formats[0] == formats[1]
    assert formats[0] is not None
    assert (formats[0]["type"], formats[0]["name"]) == ("json_schema", "River")
    assert formats[0]["schema"]["required"] == ["name"]


async def test_extensions_travel_in_the_extra_body_and_the_tier_is_echoed(
    router: FakeRouter, client: AsyncOpenAI
) -> None:
    router.links.node("eu", saying("Hi")).come_up()
    extra = {"edgechat:exact": True, "edgechat:deadline_s": 2.5, "min_p": 0.1, "repetition_penalty": 1.2}
    made = await client.responses.create(model=MODEL, input="x", service_tier="flex", extra_body=extra)
    assert made.service_tier == "flex"
    _, frame = await router.links.generates.get()
    assert (frame.exact, frame.deadline_s, frame.priority) == (True, 2.5, -1)
    assert (frame.sampling.min_p, frame.sampling.repetition_penalty) == (0.1, 1.2)


async def test_a_response_that_ran_out_of_time_gives_what_it_said(router: FakeRouter, client: AsyncOpenAI) -> None:
    router.links.node("eu", overdue(after="Rhine")).come_up()
    made = await client.responses.create(model=MODEL, input="x", extra_body={"edgechat:deadline_s": 2.5})
    assert (made.status, made.output_text) == ("failed", "Rhine")
    assert made.error is not None
    assert made.error.message.startswith("deadline_exceeded: The answer was not complete within the 2.5 s")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_ran_out_of_time_in_silence_is_a_504_that_is_not_repeated(
    router: FakeRouter, stream: bool
) -> None:
    router.links.node("eu", overdue(after="")).come_up()
    async with AsyncOpenAI(base_url=f"{router.url}/v1", api_key="dev", max_retries=2) as client:
        with pytest.raises(APIStatusError, match=r"within the 2\.5 s") as caught:
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                stream=stream,
                extra_body={"edgechat:deadline_s": 2.5},
            )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert router.links.generates.qsize() == 1
