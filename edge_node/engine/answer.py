"""One request being answered: its ids become what is said.

Whatever the engine knows of a request beside its place in the schedule is here, and every part of it is a
function of the request and the ids so far: a stream that moves is rebuilt by pushing the same ids again.
Does not know slots, steps or other requests.
"""

from __future__ import annotations

from core.frames import Delta, Finish, Generate, ItemEnd, ItemStart, Logprobs, Timings, Usage
from edge_node.engine.grammar import Guide
from edge_node.engine.penalties import History, needs_history
from edge_node.engine.sampling import sample
from edge_node.engine.sequence import Sequence
from edge_node.engine.speech import Parser
from edge_node.engine.step import Logits


class Answer:
    """Invariant: `said` has as many entries as the sequence has output ids.

    guide: holds the answer to a format, None where none was asked for.
    """

    def __init__(
        self,
        request: Generate,
        sequence: Sequence,
        parser: Parser,
        guide: Guide | None,
        dropped_items: int,
        now_s: float,
    ) -> None:
        self.request = request
        self.sequence = sequence
        self.dropped_items = dropped_items
        self.announced = False
        self.said: list[list[Delta]] = []
        self._parser = parser
        self._guide = guide
        self._history = History(sequence.prompt) if needs_history(request.sampling) else None
        self._received_s = now_s
        self._answered_s: float | None = None

    @property
    def finish(self) -> Finish | None:
        """Why it is complete, None if it is not."""
        if self._parser.stopped:
            return "stop"
        return "length" if self.sequence.tokens >= self.sequence.limit_tokens else None

    @property
    def answering(self) -> bool:
        """Whether the next id would be text of the answer itself."""
        return self._parser.answering

    @property
    def overdue_s(self) -> float:
        """When its deadline is over; infinite if it has none."""
        return self._received_s + self.request.deadline_s if self.request.deadline_s > 0 else float("inf")

    def replay(self, output_ids: list[int]) -> None:
        """Take ids that the client already has: the parser hears them, nobody else does."""
        for token in output_ids:
            if self.finish is not None:
                return
            self._push(token)

    def choose(self, logits: Logits, tokenizer_size: int) -> int:
        """The next id; logits [vocab]."""
        allowed = self._guide.allowed() if self._guide is not None and self.answering else None
        request, position = self.request, len(self.sequence.output)
        return sample(logits, request.sampling, tokenizer_size, request.seed, position, self._history, allowed)

    def write(self, token: int, logprobs: Logprobs | None, now_s: float) -> list[Delta]:
        """Take a chosen id; what it makes the model say, its log-probabilities before its text."""
        if self._answered_s is None:
            self._answered_s = now_s
        self._push(token)
        deltas = self.said[-1]
        if logprobs is not None and not any(isinstance(delta, ItemEnd) for delta in deltas):
            opened = sum(isinstance(delta, ItemStart) for delta in deltas)
            deltas.insert(opened, logprobs)
        return deltas

    def _push(self, token: int) -> None:
        if self._guide is not None and self.answering:
            self._guide.push(token)
        self.sequence.append(token)
        if self._history is not None:
            self._history.push(token)
        last = self.sequence.tokens >= self.sequence.limit_tokens
        self.said.append(self._parser.push(token, last))

    def usage(self) -> Usage:
        return Usage(
            input_tokens=len(self.sequence.prompt),
            cached_tokens=self.sequence.cached_tokens,
            output_tokens=len(self.sequence.output),
            reasoning_tokens=self._parser.reasoning_tokens,
        )

    def timings(self, now_s: float) -> Timings:
        """Up to now; a stage that was not reached lasted until now or not at all."""
        admitted_s = now_s if self.sequence.admitted_s is None else self.sequence.admitted_s
        answered_s = now_s if self._answered_s is None else self._answered_s
        return Timings(
            queue_ms=1e3 * (admitted_s - self._received_s),
            prefill_ms=1e3 * (answered_s - admitted_s),
            decode_ms=1e3 * (now_s - answered_s),
        )
