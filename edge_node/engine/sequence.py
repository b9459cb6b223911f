"""One request inside the engine.

    positions   0 ............ prompt ............ P ...... output ...... P + len(output)
    in the KV   [------- computed -------)

A sequence is *reading* while computed < P, else *writing*. Whatever its history, its computed tokens
catch up with its tokens: prompt positions through the chunk path, output positions through the
one-token path, ids that were given like ids that were sampled.
Does not know slots beyond the number it holds, nor other sequences.
"""

from __future__ import annotations

from core.frames import Delta, Finish, Generate, Timings, Usage
from edge_node.engine.speech import Parser
from edge_node.engine.window import Fitted


class Sequence:
    """Invariant: 0 <= computed < tokens while it is not finished."""

    def __init__(self, request: Generate, fitted: Fitted, parser: Parser, context_tokens: int, now_s: float) -> None:
        self.request = request
        self.prompt = fitted.ids
        self.dropped_items = fitted.dropped_items
        self.output: list[int] = []
        self.computed = 0
        self.slot: int | None = None
        self.announced = False
        self.admitted_s: float | None = None
        self._parser = parser
        self._most_output = min(request.max_output_tokens, context_tokens - len(fitted.ids))
        self._received_s = now_s
        self._answered_s: float | None = None

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def reading(self) -> bool:
        return self.computed < len(self.prompt)

    @property
    def wants_sample(self) -> bool:
        """Whether the next position to compute is the last one known."""
        return self.computed + 1 == self.tokens

    @property
    def next_id(self) -> int:
        """The output id whose position is computed next; only while writing."""
        return self.output[self.computed - len(self.prompt)]

    @property
    def finish(self) -> Finish | None:
        """Why it is complete, None if it is not."""
        if self._parser.stopped:
            return "stop"
        return "length" if len(self.output) >= self._most_output else None

    def replay(self, output_ids: list[int]) -> None:
        """Take ids that the client already has: the parser hears them, nobody else does."""
        for token in output_ids:
            if self.finish is not None:
                return
            self._push(token)

    def write(self, token: int, now_s: float) -> list[Delta]:
        """Take a sampled id; what it makes the model say."""
        if self._answered_s is None:
            self._answered_s = now_s
        return self._push(token)

    def _push(self, token: int) -> list[Delta]:
        self.output.append(token)
        return self._parser.push(token, last=len(self.output) >= self._most_output)

    def usage(self) -> Usage:
        return Usage(
            input_tokens=len(self.prompt),
            cached_tokens=0,
            output_tokens=len(self.output),
            reasoning_tokens=self._parser.reasoning_tokens,
        )

    def timings(self, now_s: float) -> Timings:
        """Up to now; a stage that was not reached lasted until now or not at all."""
        admitted_s = now_s if self.admitted_s is None else self.admitted_s
        answered_s = now_s if self._answered_s is None else self._answered_s
        return Timings(
            queue_ms=1e3 * (admitted_s - self._received_s),
            prefill_ms=1e3 * (answered_s - admitted_s),
            decode_ms=1e3 * (now_s - answered_s),
        )

    def check_invariants(self) -> None:
        assert 0 <= self.computed < self.tokens, (self.computed, self.tokens)
        assert self.finish is None
