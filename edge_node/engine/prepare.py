"""From a request to an answer that can be scheduled: refused, rendered, cut to the context, its given ids heard.

Nothing here changes once it is made, so requests are prepared on another thread than the one that steps.
Does not know what runs, waits or is resident.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from core.conversation import Item
from core.errors import ContextTooLong, ServiceError, UnsupportedParameter
from core.frames import Generate
from core.limits import MAX_LOGIT_BIASES, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, MAX_TOP_LOGPROBS
from core.manifest import Manifest
from edge_node.engine.answer import Answer
from edge_node.engine.grammar import Grammars, Guide
from edge_node.engine.limits import EngineLimits
from edge_node.engine.prefix_store import block_keys
from edge_node.engine.sequence import Sequence
from edge_node.engine.speculation import Speculator
from edge_node.engine.speech import Rendered, Setting, Speech
from edge_node.engine.window import Fitted, fit, fit_by_dropping

_STRUCTURED = ("json_object", "json_schema")


class ReleaseNotServed(ServiceError):
    """The request names a release that this node has not got (any more)."""

    code = "model_not_found"
    status = 404
    retryable = True


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, rendered and ready to be scheduled, or the error that it ends with.

    ends: how many prompt ids there are when each item has been said; [] for a conversation that was cut.
    """

    request: Generate
    answer: Answer | None = None
    ends: list[int] = field(default_factory=list)
    error: Exception | None = None


class Preparer:
    """Prepares the requests of one engine; the arguments are the engine's."""

    def __init__(self, manifest: Manifest, speech: Speech, limits: EngineLimits, grammars: Grammars | None) -> None:
        self._manifest = manifest
        self._speech = speech
        self._limits = limits
        self._grammars = grammars

    def prepare(self, request: Generate, received_s: float) -> Prepared:
        """Never raises: what goes wrong is the request's end."""
        try:
            return self._prepared(request, received_s)
        except Exception as error:  # a fault of one request must not end the others
            return Prepared(request, error=error)

    def _prepared(self, request: Generate, received_s: float) -> Prepared:
        self._refuse(request)
        guide = self._guide(request)
        fitted = self._fit(request)
        prompt = fitted.prompt.ids
        if not prompt:
            raise ServiceError("The release's chat template made no token of this conversation; use another release.")
        if not all(0 <= token < self._manifest.tokenizer_size for token in (*prompt, *request.output_ids)):
            raise ServiceError("The request holds token ids that this release does not know; send it to another node.")
        sequence = self._sequence(request, prompt, guide)
        parser = self._speech.start(request.stop)
        answer = Answer(request, sequence, parser, guide, fitted.dropped_items, received_s)
        answer.replay(request.output_ids)
        return Prepared(request, answer, [] if fitted.dropped_items else fitted.prompt.ends)

    def _refuse(self, request: Generate) -> None:
        """Raise for what cannot be served, before any work is done for it."""
        if request.release != self._manifest.release:
            raise ReleaseNotServed(
                f"This node serves {self._manifest.release}, not {request.release}; send the request to another node."
            )
        if len(request.stop) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARACTERS for stop in request.stop):
            raise UnsupportedParameter(
                f"At most {MAX_STOP_STRINGS} stop strings of at most {MAX_STOP_CHARACTERS} characters are taken.",
                param="stop",
            )
        if request.sampling.top_logprobs > MAX_TOP_LOGPROBS or len(request.sampling.logit_bias) > MAX_LOGIT_BIASES:
            raise UnsupportedParameter(
                f"At most {MAX_TOP_LOGPROBS} log-probabilities an id and {MAX_LOGIT_BIASES} biases are taken.",
                param="top_logprobs" if request.sampling.top_logprobs > MAX_TOP_LOGPROBS else "logit_bias",
            )

    def _guide(self, request: Generate) -> Guide | None:
        """What holds the answer to the format asked for."""
        form = request.format or {}
        if form.get("type") not in _STRUCTURED:
            return None
        if self._grammars is None:
            raise UnsupportedParameter(
                f"This model cannot be held to the format {form['type']!r}; leave it out.", param="text.format"
            )
        return self._grammars.guide(form)

    def _sequence(self, request: Generate, prompt: list[int], guide: Guide | None) -> Sequence:
        keys = block_keys(request.cache_salt, prompt)
        limit = min(len(prompt) + request.max_output_tokens, self._limits.context_tokens)
        drafts = self._limits.speculation and not request.exact and guide is None
        return Sequence(prompt, keys, limit, request.priority, Speculator(prompt) if drafts else None)

    def _fit(self, request: Generate) -> Fitted:
        """A continued response keeps the cut that its first ids were generated under."""
        release, most = self._manifest.release, self._limits.context_tokens
        setting = setting_of(request)

        def lay_out(items: list[Item]) -> Rendered:
            # Megabytes would take seconds to encode, in which nobody else is answered.
            least = self._speech.least_tokens(items, release, setting)
            if least >= most:
                raise ContextTooLong(least, most, at_least=True)
            return self._speech.lay_out(items, release, setting)

        if request.truncation == "disabled" or request.output_ids:
            return fit(request.items, lay_out, most, request.dropped_items)
        room = max(1, min(request.max_output_tokens, most // 4))
        return fit_by_dropping(request.items, lay_out, most, room, request.dropped_items)


def setting_of(request: Generate) -> Setting:
    """What the request says about its answer as a whole."""
    return Setting(request.tools, request.format, request.effort)
