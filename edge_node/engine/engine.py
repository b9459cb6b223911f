"""The engine of one release: requests in, steps out, frames back.

    submit / cancel      ->  frames that can be said at once
    plan                 ->  what the runner shall compute next, None when idle
    commit(plan, result) ->  what the streams say because of it

Everything is a function of the calls: no clock, no randomness, no model. One caller at a time.
Does not know links, routers or ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from core.conversation import Item
from core.errors import ContextTooLong, EdgechatError, Overloaded, RequestError, ServiceError
from core.frames import Delta, Done, Failed, Finish, Generate, Progress, Rates, Row, Started
from core.manifest import Manifest
from edge_node.engine.costs import StepCosts
from edge_node.engine.limits import EngineLimits
from edge_node.engine.sampling import sample
from edge_node.engine.scheduler import Advanced, Scheduler
from edge_node.engine.sequence import Sequence
from edge_node.engine.speech import Setting, Speech
from edge_node.engine.step import Logits, StepPlan, StepResult
from edge_node.engine.window import Fitted, fit, fit_by_dropping

__all__ = ["Engine", "EngineLimits", "Fault", "Output"]

Output: TypeAlias = Row | Started | Progress | Done | Failed

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
_STRUCTURED = ("json_object", "json_schema")


class ReleaseNotServed(ServiceError):
    """The request names a release that this node has not got (any more)."""

    code = "model_not_found"
    status = 404
    retryable = True


class UnsupportedParameter(RequestError):
    """The request asks for something that this release cannot do."""

    code = "unsupported_parameter"


@dataclass(frozen=True, slots=True)
class Fault:
    """An exception that ended one stream, for the log."""

    stream: str
    epoch: int
    error: Exception


class Engine:
    """Invariant: every accepted (stream, epoch) that is not replaced ends with exactly one Done or Failed."""

    def __init__(self, manifest: Manifest, speech: Speech, limits: EngineLimits) -> None:
        self._manifest = manifest
        self._speech = speech
        self._limits = limits
        self._costs = StepCosts()
        self._scheduler = Scheduler(limits, self._costs)
        self._sequences: dict[str, Sequence] = {}
        self._faults: list[Fault] = []

    @property
    def running(self) -> int:
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting

    @property
    def rates(self) -> Rates:
        return self._costs.rates()

    def take_faults(self) -> list[Fault]:
        """Exceptions that ended single streams since the last call; log their type and trace, never text."""
        faults, self._faults = self._faults, []
        return faults

    def learn(self, plan: StepPlan, result: StepResult) -> None:
        """Take the cost of a step that was not planned here, such as a warm-up's."""
        self._costs.observe(plan, result)

    def submit(self, request: Generate, now_s: float) -> list[Output]:
        """Accept a stream, or a newer epoch of a known one; older and equal epochs are dropped.

        Returns a Progress of nothing when it was queued, which is a promise to answer it; a Failed when it was
        refused; Started and Done when its given ids already end it; [] when it was dropped.
        """
        known = self._sequences.get(request.stream)
        if known is not None:
            if request.epoch <= known.request.epoch:
                return []
            self._forget(known)
        try:
            sequence = self._accept(request, now_s)
        except (RequestError, ReleaseNotServed, Overloaded) as error:
            return [_failed(request, error)]
        except Exception as error:  # a fault of one request must not end the others
            return [self._fault(request, error)]
        if sequence.finish is not None:
            return [_started(sequence), _done(sequence, sequence.finish, now_s)]
        self._sequences[request.stream] = sequence
        self._scheduler.add(sequence)
        return [_progress(sequence)]

    def cancel(self, stream: str, epoch: int, now_s: float) -> list[Output]:
        """End a stream unless it has a newer epoch than the one meant."""
        sequence = self._sequences.get(stream)
        if sequence is None or epoch < sequence.request.epoch:
            return []
        self._forget(sequence)
        return [_done(sequence, "cancelled", now_s)]

    def plan(self, now_s: float) -> StepPlan | None:
        """What to run next, None when idle; every plan must be committed before the next."""
        return self._scheduler.plan(now_s)

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Output]:
        """Take the result of the plan; streams that ended meanwhile say nothing."""
        self._costs.observe(plan, result)
        outputs: list[Output] = []
        for advanced in self._scheduler.commit(plan, result):
            try:
                outputs.extend(self._outputs(advanced, now_s))
            except Exception as error:  # a fault of one sequence must not end the others
                self._forget(advanced.sequence)
                outputs.append(self._fault(advanced.sequence.request, error))
        return outputs

    def check_invariants(self) -> None:
        """For tests after each step, and for service when idle."""
        self._scheduler.check_invariants()
        assert len(self._sequences) == self.running + self.waiting

    # -- accepting --------------------------------------------------------------------------

    def _accept(self, request: Generate, now_s: float) -> Sequence:
        self._refuse(request)
        fitted = self._fit(request)
        if not fitted.ids:
            raise ServiceError("The release's chat template made no token of this conversation; use another release.")
        ids = (*fitted.ids, *request.output_ids)
        if not all(0 <= token < self._manifest.tokenizer_size for token in ids):
            raise ServiceError("The request holds token ids that this release does not know; send it to another node.")
        parser = self._speech.start(request.stop)
        sequence = Sequence(request, fitted, parser, self._limits.context_tokens, now_s)
        sequence.replay(request.output_ids)
        if sequence.finish is None and not self._scheduler.has_room():
            raise Overloaded(
                f"All {self._limits.slots} slots are busy and the waiting line is full; try again shortly."
            )
        return sequence

    def _refuse(self, request: Generate) -> None:
        """Raise for what cannot be served, before any work is done for it."""
        if request.release != self._manifest.release:
            raise ReleaseNotServed(
                f"This node serves {self._manifest.release}, not {request.release}; send the request to another node."
            )
        kind = (request.format or {}).get("type")
        if kind in _STRUCTURED:
            raise UnsupportedParameter(
                f"This model cannot be held to the format {kind!r}; leave it out.", param="text.format"
            )
        if len(request.stop) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARACTERS for stop in request.stop):
            raise UnsupportedParameter(
                f"At most {MAX_STOP_STRINGS} stop strings of at most {MAX_STOP_CHARACTERS} characters are taken.",
                param="stop",
            )

    def _fit(self, request: Generate) -> Fitted:
        """A continued response keeps the cut that its first ids were generated under."""

        release, most = self._manifest.release, self._limits.context_tokens
        setting = Setting(request.tools, request.format, request.effort)

        def render(items: list[Item]) -> list[int]:
            # Megabytes would take seconds to encode, in which nobody else is answered.
            least = self._speech.least_tokens(items, release, setting)
            if least >= most:
                raise ContextTooLong(least, most, at_least=True)
            return self._speech.render(items, release, setting)

        if request.truncation == "disabled" or request.output_ids:
            return fit(request.items, render, most, request.dropped_items)
        room = max(1, min(request.max_output_tokens, most // 4))
        return fit_by_dropping(request.items, render, most, room, request.dropped_items)

    # -- advancing --------------------------------------------------------------------------

    def _outputs(self, advanced: Advanced, now_s: float) -> list[Output]:
        sequence, outputs = advanced.sequence, list[Output]()
        if not sequence.announced:
            sequence.announced = True
            outputs.append(_started(sequence))
        if sequence.reading:
            outputs.append(_progress(sequence))
        if advanced.logits is not None:
            outputs.extend(self._sampled(sequence, advanced.logits, now_s))
        return outputs

    def _sampled(self, sequence: Sequence, logits: Logits, now_s: float) -> list[Output]:
        request, seq = sequence.request, len(sequence.output)
        token = sample(logits, request.sampling, self._manifest.tokenizer_size, request.seed, seq)
        deltas: list[Delta] = sequence.write(token, now_s)
        outputs: list[Output] = [Row(request.stream, request.epoch, seq, [token], [deltas])]
        if sequence.finish is not None:
            self._forget(sequence)
            outputs.append(_done(sequence, sequence.finish, now_s))
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.stream]
        self._scheduler.remove(sequence)

    def _fault(self, request: Generate, error: Exception) -> Failed:
        self._faults.append(Fault(request.stream, request.epoch, error))
        if isinstance(error, EdgechatError):
            return _failed(request, error)
        return _failed(
            request, ServiceError("This answer failed inside the node and was stopped; the log names the cause.")
        )


def _started(sequence: Sequence) -> Started:
    request = sequence.request
    return Started(request.stream, request.epoch, len(sequence.prompt), 0, sequence.dropped_items)


def _progress(sequence: Sequence) -> Progress:
    return Progress(sequence.request.stream, sequence.request.epoch, sequence.computed, len(sequence.prompt))


def _done(sequence: Sequence, finish: Finish, now_s: float) -> Done:
    request = sequence.request
    return Done(request.stream, request.epoch, finish, sequence.usage(), sequence.timings(now_s))


def _failed(request: Generate, error: EdgechatError) -> Failed:
    have, most = getattr(error, "have", 0), getattr(error, "most", 0)
    return Failed(request.stream, request.epoch, error.code, error.retryable, error.message, have, most)
