"""The link: frames that router and node exchange, as MessagePack arrays with the tag first.

A frame is append-only: new fields go at its end and have defaults, so that protocol N speaks with
N-1. Does not know sockets; `encode` and `decode` are the whole wire format. docs/PROTOCOL.md
describes who sends what, when.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from core.conversation import Item
from core.errors import FrameError

PROTOCOL = 1
SPEECH_VERSION = 1
MAX_FRAME_BYTES = 16 * 1024 * 1024

Finish: TypeAlias = Literal["stop", "length", "cancelled"]
EngineState: TypeAlias = Literal["loading", "ready", "failed"]


class _Frame(msgspec.Struct, frozen=True, array_like=True):
    pass


# -- what the model said, one list of deltas per output id ------------------------------------


class ItemStart(_Frame, frozen=True, tag="s"):
    """An output item opens. phase: "", "commentary" or "final_answer"; name: of the called function."""

    kind: Literal["message", "reasoning", "function_call"]
    phase: str = ""
    name: str = ""


class Text(_Frame, frozen=True, tag="t"):
    """Text of the open message or reasoning item; never half a character."""

    text: str


class Arguments(_Frame, frozen=True, tag="a"):
    """A piece of the open function call's JSON arguments."""

    text: str


class ItemEnd(_Frame, frozen=True, tag="e"):
    """The open item is complete; the id that carries this delta is not part of the item."""


class Logprobs(_Frame, frozen=True, tag="l"):
    """The chosen id's log-probability and the most likely ids with theirs, as the model gave them: before penalties.

    text, top_texts: the bytes that the ids stand for.
    """

    chosen: float
    top: list[tuple[int, float]]
    text: bytes = b""
    top_texts: list[bytes] = []


Delta: TypeAlias = ItemStart | Text | Arguments | ItemEnd | Logprobs


# -- both ways ---------------------------------------------------------------------------------


class Hello(_Frame, frozen=True, tag="hello"):
    """First frame each way. A router leaves `releases` and what follows empty.

    `variants[i]` is the recipe of `releases[i]`. instance: new with every start of the process.
    """

    protocol: int
    name: str
    instance: str
    region: str
    releases: list[str] = []
    variants: list[str] = []
    context_tokens: int = 0
    slots: int = 0
    speech_version: int = 0
    pid: int = 0


# -- router -> node ----------------------------------------------------------------------------


class Sampling(_Frame, frozen=True):
    """temperature 0 = greedy; top_k 0, top_p 1, min_p 0 = off; repetition_penalty 1, other penalties 0 = off.

    logit_bias: ids and what is added to their logits. top_logprobs: -1 = no Logprobs are said, else how many of the
    most likely ids each of them names.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    top_logprobs: int = -1


class Generate(_Frame, frozen=True, tag="generate"):
    """Start or continue a stream; `output_ids` are already the client's and are replayed silently.

    deadline_s: seconds from receipt, 0 = none. cache_salt: keys the prefix store per tenant. prefix_keys[i]:
    core.conversation's key of items[0..i], or none. priority: higher goes first. exact: nothing whose numbers differ
    in their last bits: no speculation, and given ids are computed as they were when they were generated.
    """

    stream: str
    epoch: int
    release: str
    items: list[Item]
    output_ids: list[int]
    seed: int
    sampling: Sampling
    stop: list[str]
    max_output_tokens: int
    tools: list[dict[str, Any]] = []
    format: dict[str, Any] | None = None
    effort: str = ""
    truncation: Literal["auto", "disabled"] = "disabled"
    dropped_items: int = 0
    priority: int = 0
    cache_salt: str = ""
    prefix_keys: list[str] = []
    deadline_s: float = 0.0
    exact: bool = False


class Cancel(_Frame, frozen=True, tag="cancel"):
    stream: str
    epoch: int


class Ping(_Frame, frozen=True, tag="ping"):
    """Answered at once by a Status whose `echo` is this `nonce`: the router's RTT."""

    nonce: int


# -- node -> router ----------------------------------------------------------------------------


class Row(_Frame, frozen=True):
    """Output ids of one stream; `seq` is the position of `ids[0]` among the response's output ids."""

    stream: str
    epoch: int
    seq: int
    ids: list[int]
    deltas: list[list[Delta]]


class Tokens(_Frame, frozen=True, tag="tokens"):
    """One engine step's output for the streams of one router."""

    rows: list[Row]


class Started(_Frame, frozen=True, tag="started"):
    stream: str
    epoch: int
    input_tokens: int
    cached_tokens: int
    dropped_items: int = 0


class Progress(_Frame, frozen=True, tag="progress"):
    """Prompt tokens read so far."""

    stream: str
    epoch: int
    computed: int
    total: int


class Usage(_Frame, frozen=True):
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int = 0


class Timings(_Frame, frozen=True):
    """Milliseconds in the node: waiting for a slot, reading the prompt, generating."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class Done(_Frame, frozen=True, tag="done"):
    stream: str
    epoch: int
    finish: Finish
    usage: Usage
    timings: Timings


class Failed(_Frame, frozen=True, tag="failed"):
    """The stream ended in an error; `code` is one of core/errors, `have`/`most` for a context too long.

    param: the field that is to blame, as the Responses dialect has it ("text.format"), or "".
    """

    stream: str
    epoch: int
    code: str
    retryable: bool
    message: str
    have: int = 0
    most: int = 0
    param: str = ""


class Rates(_Frame, frozen=True):
    """Measured tokens per second; 0 = not known yet."""

    prefill_tokens_s: float = 0.0
    decode_tokens_s: float = 0.0


class Status(_Frame, frozen=True, tag="status"):
    """Every 250 ms. load: running and waiting over slots. vouched: the parent vouches for its child.

    chains: what changed of what the prefix store holds, by prefix key, all of it after Hello; 0 tokens = gone.
    yielding: of those running and waiting, how many give way to everybody else (priority below 0).
    """

    load: float
    running: int
    waiting: int
    rates: Rates
    chains: list[tuple[str, int]]
    vouched: bool
    draining: bool
    state: EngineState = "ready"
    engine_pid: int = 0
    echo: int = 0
    yielding: int = 0


class Drain(_Frame, frozen=True, tag="drain"):
    """The node wants its streams moved within `deadline_s`; it takes no new ones."""

    deadline_s: float


ToNode: TypeAlias = Hello | Generate | Cancel | Ping
ToRouter: TypeAlias = Hello | Tokens | Started | Progress | Done | Failed | Status | Drain
Frame: TypeAlias = ToNode | ToRouter

_encoder = msgspec.msgpack.Encoder()
_to_node: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


# Bytes from a peer can be wrong in more ways than MessagePack's own errors: strings that are no UTF-8,
# nesting deeper than the interpreter's stack.
_UNREADABLE = (msgspec.MsgspecError, UnicodeError, RecursionError)


def encode(frame: Frame) -> bytes:
    """The frame's bytes; raises FrameError for what MessagePack cannot hold (an integer above 64 bits,
    half a surrogate pair), which a client's free-form fields can contain.
    """
    try:
        return _encoder.encode(frame)
    except (msgspec.MsgspecError, OverflowError, UnicodeError, RecursionError) as error:
        raise FrameError(f"A {type(frame).__name__} frame holds a value that cannot be sent: {error}.") from error


def decode_to_node(data: bytes) -> ToNode:
    """A frame that a router sent; raises FrameError."""
    try:
        return _to_node.decode(data)
    except _UNREADABLE as error:
        raise FrameError(f"A router sent a frame that this node cannot read: {error}.") from error


def decode_to_router(data: bytes) -> ToRouter:
    """A frame that a node sent; raises FrameError."""
    try:
        return _to_router.decode(data)
    except _UNREADABLE as error:
        raise FrameError(f"A node sent a frame that this router cannot read: {error}.") from error
