"""Speculation on and off in turn: text that is copied, and text that is not."""

from __future__ import annotations

from itertools import takewhile

from core.frames import Sampling
from edge_node.engine.engine import EngineLimits
from edge_node.runtime.runner import Runner
from tests.bench.bare_loop import read_manifest
from tests.bench.engine.loops import (
    DEFAULT_SAMPLING,
    GREEDY,
    RELEASE,
    Answer,
    EngineLoop,
    all_ended,
    request,
    speech_of,
    story,
)
from tests.bench.engine.rows import Found, Row, Scale, at_least, ratios, row, tell
from tests.bench.report import THREADS

CONTEXT_TOKENS = 2048
MOST_TOKENS = 200
TEXTS = (
    "The ferry leaves the old harbour at a quarter past six. On Mondays it carries letters and bread; on Thursdays it "
    "carries nothing but the mayor, who is afraid of bridges. In winter the captain, Ilse Brandt, sells tickets "
    "herself, at four crowns each, and knows every passenger by name.",
    "Orders that arrive before noon are packed the same day. The parcel waits at the counter for eight days and then "
    "goes back to the sender. Bring the card with the number, or the person whose name is on the parcel. Dogs may "
    "come in, except for the one that knows why.",
    "The museum was built in 1911 by two brothers who did not speak to each other. One of them planned the stairs, the "
    "other the windows, and so each window looks onto a wall. Visitors like it all the same. The lamp in the hall was "
    "a gift of the fishermen, who wanted it to be seen from the sea.",
    "To reset the heater, hold the red button for five seconds and wait for the second click. The display shows the "
    "year, then the pressure. If the pressure is below one bar, open the valve under the sink by a quarter turn. Never "
    "open it further, and never while the pump is running.",
)
ORDINARY = (
    story(1),
    "Explain why the sky is blue and sunsets are red.",
    "Write a short letter to my landlord about a broken heater.",
    "What should somebody know who moves from a city to a village?",
)


def measure(scale: Scale) -> Found:
    """Both engines run one answer after another over one runner, each prompt by both."""
    manifest = read_manifest(RELEASE)
    speech = speech_of(RELEASE, manifest)
    runner = Runner.open(RELEASE, manifest, "cpu", THREADS, 1, CONTEXT_TOKENS)
    warm = runner.warm_up(True)

    def engine(speculation: bool) -> EngineLoop:
        limits = EngineLimits(slots=1, context_tokens=CONTEXT_TOKENS, max_waiting=0, speculation=speculation)
        loop = EngineLoop(runner, manifest, speech, limits)
        loop.learn(warm)
        return loop

    drafting, plain = engine(True), engine(False)
    same: list[float] = []

    def compare(name: str, prompts: tuple[str, ...], sampling: Sampling, least: float) -> list[Row]:
        fast: list[float] = []
        slow: list[float] = []
        for number in range(scale(3, 1)):
            tell(f"{name}, round {number + 1}")
            for index, prompt in enumerate(prompts[: scale(len(prompts), 2)]):
                asked = request(manifest, f"{name} {number} {index}", prompt, MOST_TOKENS, sampling)
                answers = []
                # Who goes first changes, as each finds the caches that the other has left.
                for loop in (drafting, plain) if (number + index) % 2 else (plain, drafting):
                    answers.append(loop.submit(asked))
                    loop.until(all_ended(answers[-1:]))
                    (fast if loop is drafting else slow).append(decode_tokens_s(answers[-1]))
                same.append(100 * agreement(*answers))
        return [
            row(f"{name}: on over off", ratios(fast, slow), "x", at_least(least), 2),
            row(f"{name}: on", fast, "tokens/s"),
            row(f"{name}: off", slow, "tokens/s"),
        ]

    copied = tuple(f"{text}\n\n{text}\n\nRepeat the text above." for text in TEXTS)
    rows = [
        *compare("copies, greedy", copied, GREEDY, 1.5),
        *compare("ordinary, greedy", ORDINARY, GREEDY, 0.97),
        *compare("ordinary, temperature 0.7, top-p 0.95", ORDINARY, DEFAULT_SAMPLING, 0.97),
        row("ids up to the first that differs, of all", same, "%"),
    ]
    notes = [
        f"One stream, {THREADS} threads, at most {MOST_TOKENS} tokens; tokens/s from the first id to the last. "
        "Copies: a paragraph, twice, and `Repeat the text above.`, which SmolLM2 does by itself, as far as it goes. "
        "Ordinary prompts: a story, an explanation, a letter, advice."
    ]
    return Found("drafts", "Speculation", rows, notes)


def decode_tokens_s(answer: Answer) -> float:
    return (len(answer.ids) - 1) / (answer.times_s[-1] - answer.times_s[0])


def agreement(one: Answer, other: Answer) -> float:
    """How much of the longer answer is the same in both, from its beginning."""
    pairs = zip(one.ids, other.ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) / max(len(one.ids), len(other.ids))
