"""The fields that both dialects take under the same names: how ids are drawn, and in which order people are served.

Ranges: OpenAI's reference; vLLM's for what OpenAI does not have (`top_k`, `min_p`, `repetition_penalty`).
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

from core.errors import RequestError
from core.limits import MAX_LOGIT_BIASES, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from router.config import Defaults

MAX_COUNT = 2**31 - 1
MAX_DEADLINE_S = 3600.0

Count: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Bias: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]


class CommonFields(msgspec.Struct, kw_only=True):
    """What is not OpenAI's in a dialect costs nothing there and is asked for; ours alone begins with `edgechat:`."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MAX_COUNT)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    # Much less would carry logits beyond what a float32 holds.
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=2)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_LOGIT_BIASES)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    stop: str | list[str] | None = None
    service_tier: str | None = None
    exact: bool | None = msgspec.field(default=None, name="edgechat:exact")
    deadline_s: Annotated[float, Meta(gt=0, le=MAX_DEADLINE_S)] | None = msgspec.field(
        default=None, name="edgechat:deadline_s"
    )


def common(fields: CommonFields, defaults: Defaults, *, seeded: bool) -> dict[str, Any]:
    """Them as fields of a `core.stream.Request`; raises RequestError.

    seeded: the client named a seed, which asks for the same answer again: then nothing is speculated unless it says so.
    """
    return {
        "temperature": defaults.temperature if fields.temperature is None else fields.temperature,
        "top_p": defaults.top_p if fields.top_p is None else fields.top_p,
        "top_k": fields.top_k or 0,
        "min_p": fields.min_p or 0.0,
        "repetition_penalty": fields.repetition_penalty or 1.0,
        "presence_penalty": fields.presence_penalty or 0.0,
        "frequency_penalty": fields.frequency_penalty or 0.0,
        "logit_bias": _biases(fields.logit_bias or {}),
        "top_logprobs": fields.top_logprobs or 0,
        "stop": _stop_strings(fields.stop),
        # Going last can be asked for, going first cannot; the answer says which it was.
        "service_tier": "flex" if fields.service_tier == "flex" else "default",
        "exact": seeded if fields.exact is None else fields.exact,
        "deadline_s": fields.deadline_s or 0.0,
    }


def _biases(asked: dict[str, float]) -> list[tuple[int, float]]:
    for key in asked:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and key == str(int(key))):
            raise RequestError(f"`logit_bias` has the key {key!r:.40}, which is no token id.", param="logit_bias")
    return [(int(key), bias) for key, bias in asked.items()]


def _stop_strings(stop: str | list[str] | None) -> list[str]:
    listed = [stop] if isinstance(stop, str) else list(stop or [])
    if len(listed) > MAX_STOP_STRINGS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in listed):
        sentence = f"`stop` takes up to {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARACTERS} characters."
        raise RequestError(sentence, param="stop")
    return listed
