"""The engine of one release: requests in, steps out, frames back.

    prepare                   ->  a request with all that can be done for it without the engine's state
    submit / cancel / expire  ->  frames that can be said at once
    plan                      ->  what the runner shall compute next, None when idle
    commit(plan, result)      ->  what the streams say because of it

Everything is a function of the calls: no clock, no randomness, no model. One caller at a time, but for `prepare`.
Does not know links, routers or ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from core.errors import DeadlineExceeded, EdgechatError, Overloaded, RequestError, ServiceError
from core.frames import Done, Failed, Finish, Generate, Logprobs, Progress, Rates, Row, Started
from core.manifest import Manifest
from edge_node.engine.answer import Answer
from edge_node.engine.chains import Chains
from edge_node.engine.costs import StepCosts
from edge_node.engine.grammar import Grammars
from edge_node.engine.limits import EngineLimits
from edge_node.engine.logprobs import logprobs
from edge_node.engine.prefix_store import PrefixStore, block_keys
from edge_node.engine.prepare import Prepared, Preparer, ReleaseNotServed
from edge_node.engine.rereading import Past, Pasts, past_of, what_follows
from edge_node.engine.scheduler import Advanced, Scheduler
from edge_node.engine.sequence import Sequence
from edge_node.engine.speech import Speech
from edge_node.engine.step import BLOCK_TOKENS, Logits, StepPlan, StepResult

__all__ = ["Engine", "EngineLimits", "Fault", "Output", "Prepared"]

Output: TypeAlias = Row | Started | Progress | Done | Failed


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception that ended one stream, for the log."""

    stream: str
    epoch: int
    error: Exception


class Engine:
    """Invariant: every accepted (stream, epoch) that is not replaced ends with exactly one Done or Failed."""

    def __init__(
        self, manifest: Manifest, speech: Speech, limits: EngineLimits, grammars: Grammars | None = None
    ) -> None:
        """grammars: None where no answer can be held to a format."""
        self._manifest = manifest
        self._speech = speech
        self._limits = limits
        self._preparer = Preparer(manifest, speech, limits, grammars)
        self._costs = StepCosts()
        self._store = PrefixStore(limits.prefix_blocks)
        self._chains = Chains(self._store)
        self._scheduler = Scheduler(limits, self._costs, self._store)
        self._answers: dict[Sequence, Answer] = {}
        self._streams: dict[str, Answer] = {}
        self._pasts = Pasts(limits.prefix_blocks)
        self._faults: list[Fault] = []

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def yielding(self) -> int:
        """Running and waiting streams of a priority below 0."""
        return self._scheduler.yielding

    @property
    def rates(self) -> Rates:
        return self._costs.rates()

    def take_faults(self) -> list[Fault]:
        """Exceptions that ended single streams since the last call; log their type and trace, never text."""
        faults, self._faults = self._faults, []
        return faults

    def take_chains(self) -> list[tuple[str, int]]:
        """Prefix keys whose resident tokens changed since the last call, 0 = gone."""
        return self._chains.changes()

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Take the cost of a step that was not planned here, such as a warm-up's."""
        self._costs.observe(plan, result)

    def full_for(self, priority: int) -> bool:
        """Whether a request of that priority would be refused for want of room; from another thread a hint."""
        return not self._scheduler.has_room() and self._scheduler.last_in_line(below=priority) is None

    def prepare(self, request: Generate, received_s: float) -> Prepared:
        """Render a request, compile its format, hear its given ids: what may take long. Never raises.

        Touches nothing that other calls change, so that it may run on another thread while steps go on.
        """
        return self._preparer.prepare(request, received_s)

    def submit(self, submitted: Generate | Prepared, now_s: float) -> list[Output]:
        """Accept a stream, or a newer epoch of a known one; older and equal epochs are dropped.

        Returns a Progress of nothing when it was queued, which is a promise to answer it unless a higher priority
        needs its place in a full line; a Failed when it was refused; Started and Done when its given ids already end
        it; [] when it was dropped.
        """
        request = submitted.request if isinstance(submitted, Prepared) else submitted
        known = self._streams.get(request.stream)
        if known is not None:
            if request.epoch <= known.request.epoch:
                return []
            self._forget(known)
        try:
            # Given ids may end it already, for which there is always room; anything else is refused unread.
            refused = None if request.output_ids else self._make_room(request)
            prepared = submitted if isinstance(submitted, Prepared) else self.prepare(submitted, now_s)
            answer = _answer_of(prepared)
            if answer.finish is None:
                refused = self._make_room(request)
        except (RequestError, ReleaseNotServed, Overloaded) as error:
            return [_failed(request, error)]
        except Exception as error:  # a fault of one request must not end the others
            return [self._fault(request, error)]
        if answer.finish is not None:
            return [_started(answer), _done(answer, answer.finish, now_s)]
        if refused is not None:
            self._forget(refused)
        if self._in_a_hurry(answer):
            _read_given(answer)
        self._streams[request.stream] = self._answers[answer.sequence] = answer
        self._scheduler.add(answer.sequence)
        self._chains.note(request.prefix_keys, prepared.ends, answer.sequence.keys)
        return [*([] if refused is None else [_failed(refused.request, self._overloaded())]), _progress(answer)]

    def cancel(self, stream: str, epoch: int, now_s: float) -> list[Output]:
        """End a stream unless it has a newer epoch than the one meant."""
        answer = self._streams.get(stream)
        if answer is None or epoch < answer.request.epoch:
            return []
        self._forget(answer)
        return [_done(answer, "cancelled", now_s)]

    def expire(self, now_s: float) -> list[Output]:
        """End what has passed its deadline; call before each plan."""
        overdue = [answer for answer in self._streams.values() if answer.overdue_s <= now_s]
        for answer in overdue:
            self._forget(answer)
        return [_failed(answer.request, DeadlineExceeded(answer.request.deadline_s)) for answer in overdue]

    def plan(self, now_s: float) -> StepPlan | None:
        """What to run next, None when idle; every plan must be committed before the next.

        With nobody to answer, conversations that have ended are re-read, the latest first: the likeliest to go on. At
        most one is rendered in a call, so None means that there is nothing to do only if the engine is `resting`.
        """
        plan = self._scheduler.plan(now_s)
        if plan is None and (past := self._pasts.take()) is not None:
            self._reread(past)
            plan = self._scheduler.plan(now_s)
        return plan

    @property
    def resting(self) -> bool:
        """Whether there is nothing to plan until something is submitted."""
        return not (self.running or self.waiting or self._scheduler.rereading or len(self._pasts))

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Output]:
        """Take the result of the plan; streams that ended meanwhile say nothing."""
        self._costs.observe(plan, result)
        outputs: list[Output] = []
        for advanced in self._scheduler.commit(plan, result):
            answer = self._answers[advanced.sequence]
            try:
                outputs.extend(self._outputs(answer, advanced, now_s))
            except Exception as error:  # a fault of one answer must not end the others
                self._forget(answer)
                outputs.append(self._fault(answer.request, error))
        return outputs

    def check_invariants(self) -> None:
        """For tests after each step, and for service when idle."""
        self._scheduler.check_invariants()
        assert len(self._streams) == len(self._answers) == self.running + self.waiting
        assert all(answer.finish is None for answer in self._streams.values())

    # -- accepting --------------------------------------------------------------------------

    def _make_room(self, request: Generate) -> Answer | None:
        """Who has to leave the full line for this request: somebody of lower priority for whom nothing was done yet.

        Before the request costs anything; raises Overloaded when it is the one that has to leave.
        """
        if self._scheduler.has_room():
            return None
        last = self._scheduler.last_in_line(below=request.priority)
        if last is None:
            raise self._overloaded()
        return self._answers[last]

    def _in_a_hurry(self, answer: Answer) -> bool:
        """Whether to continue an answer by reading what it was given, because one id after another takes too long."""
        if answer.request.exact or not answer.sequence.output:
            return False
        rows = min(self.running + self.waiting + 1, self._limits.slots)
        exact_s = len(answer.sequence.output) * self._costs.decode_s(rows)
        return exact_s >= self._limits.failover_exact_s

    def _overloaded(self) -> Overloaded:
        return Overloaded(f"All {self._limits.slots} slots are busy and the waiting line is full; try again shortly.")

    # -- advancing --------------------------------------------------------------------------

    def _outputs(self, answer: Answer, advanced: Advanced, now_s: float) -> list[Output]:
        outputs = list[Output]()
        if not answer.announced:
            answer.announced = True
            outputs.append(_started(answer))
        if answer.sequence.reading:
            outputs.append(_progress(answer))
        if advanced.logits:
            outputs.append(self._row(answer, advanced, now_s))
        if answer.finish is not None:
            self._forget(answer)
            self._remember(answer)
            outputs.append(_done(answer, answer.finish, now_s))
        return outputs

    def _row(self, answer: Answer, advanced: Advanced, now_s: float) -> Row:
        """What is chosen after the last known id, and after each drafted id as long as the choice is the draft."""
        request, sequence = answer.request, answer.sequence
        row = Row(request.stream, request.epoch, len(sequence.output), [], [])
        for logits, drafted in zip(advanced.logits, (*advanced.draft, None), strict=False):
            token = answer.choose(logits, self._manifest.tokenizer_size)
            row.ids.append(token)
            most = request.sampling.top_logprobs if answer.answering else -1
            row.deltas.append(answer.write(token, self._logprobs(logits, token, most), now_s))
            if token != drafted or answer.finish is not None:
                break
            sequence.written()  # the draft's position was computed with this very id
        return row

    def _logprobs(self, logits: Logits, token: int, most: int) -> Logprobs | None:
        if most < 0:
            return None
        chosen, top = logprobs(logits, token, most, self._manifest.tokenizer_size)
        texts = [self._speech.bytes_of(other) for other, _ in top]
        return Logprobs(chosen, top, self._speech.bytes_of(token), texts)

    def _forget(self, answer: Answer) -> None:
        del self._streams[answer.request.stream], self._answers[answer.sequence]
        self._scheduler.remove(answer.sequence)

    def _fault(self, request: Generate, error: Exception) -> Failed:
        self._faults.append(Fault(request.stream, request.epoch, error))
        if isinstance(error, EdgechatError):
            return _failed(request, error)
        return _failed(
            request, ServiceError("This answer failed inside the node and was stopped; the log names the cause.")
        )

    # -- what may be asked next -------------------------------------------------------------

    def _remember(self, answer: Answer) -> None:
        """Keep the conversation to be re-read, answer included, as its next turn will have it."""
        if not self._limits.prefix_blocks:
            return
        try:
            self._pasts.add(past_of(answer))
        except Exception as error:  # the answer is complete, and nobody waits for this; the log shall know
            self._faults.append(Fault(answer.request.stream, answer.request.epoch, error))

    def _reread(self, past: Past) -> None:
        """Have a conversation's beginning read through the chunk path, if it is not in the prefix store already."""
        try:
            fixed = what_follows(past, self._speech, self._manifest.release)
        except Exception as error:  # nobody waits for this; the log shall know
            self._faults.append(Fault(past.stream, past.epoch, error))
            return
        keys = block_keys(past.salt, fixed.ids)
        self._chains.note(past.keys, fixed.ends, keys)
        keys = keys[: min(self._limits.prefix_blocks, self._limits.context_tokens // BLOCK_TOKENS)]
        if self._store.resident(keys) < len(keys):
            ids = fixed.ids[: len(keys) * BLOCK_TOKENS]
            self._scheduler.reread(Sequence(ids, keys, len(ids)))


def _answer_of(prepared: Prepared) -> Answer:
    """Raises what went wrong."""
    if prepared.answer is None:
        raise prepared.error or ServiceError("The request was not prepared; please report this.")
    return prepared.answer


def _read_given(answer: Answer) -> None:
    sequence = answer.sequence
    sequence.read_output(block_keys(answer.request.cache_salt, [*sequence.prompt, *sequence.output]))


def _started(answer: Answer) -> Started:
    request, sequence = answer.request, answer.sequence
    return Started(request.stream, request.epoch, len(sequence.prompt), sequence.cached_tokens, answer.dropped_items)


def _progress(answer: Answer) -> Progress:
    request, sequence = answer.request, answer.sequence
    return Progress(request.stream, request.epoch, sequence.prompt_computed, len(sequence.prompt))


def _done(answer: Answer, finish: Finish, now_s: float) -> Done:
    request = answer.request
    return Done(request.stream, request.epoch, finish, answer.usage(), answer.timings(now_s))


def _failed(request: Generate, error: EdgechatError) -> Failed:
    have, most = getattr(error, "have", 0), getattr(error, "most", 0)
    names = request.stream, request.epoch
    return Failed(*names, error.code, error.retryable, error.message, have, most, error.param or "")
