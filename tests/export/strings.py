"""Three thousand strings that trip tokenizers, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Callable

_ENGLISH = (
    "the river rose during night and nobody in village slept; they'd moved cows uphill, hadn't they? "
    "I'll say it's fine, we've counted: You're Right. MAYBE McDonald's isn't naïve café résumé don't O'Neill"
).split()
_CHINESE = "春天来了，河边的柳树绿了。他说：“今天是星期三！”我们去北京、上海、广州吧？龘𠮷㐂"
_EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇳", "❤️", "☕", "🫠", "1️⃣"]
_CODE = [
    "def f(x):\n    return x**2  # ok\n",
    "for (int i=0;i<10;++i) {\n\tsum += a[i];\n}\n",
    "SELECT * FROM t WHERE id=42 AND name LIKE '%x%';",
    '{"a": [1, 2.5e-3, null], "b": {"c": "\\n"}}',
    "<div class='x'>&nbsp;</div>\r\n",
    "#!/bin/sh\nset -eu; echo \"${HOME}\" | sed 's/a/b/g'\n",
]
_SPACES = [" ", "  ", "   ", "\t", "\n", "\n\n", " \n", "\r\n", "\u00a0", "\u3000", "\u2009", "\u200b", "        "]
_DIGITS = [
    "0",
    "7",
    "42",
    "1984",
    "3.14159",
    "1,000,000",
    "0x1F",
    "٣٤٥",
    "²³",
    "½",
    "Ⅷ",
    "１２３",
    "2026-11-22",
    "v1.2.3",
]
_SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<file_sep>", "<empty_output>"),
    *("<|im_start", "|im_end|>", "<|IM_END|>", "< |im_end|>", "<|im_end|", "<|unknown|>", "<s>", "</s>"),
]
_ODD = [
    "\x00",
    "\x7f",
    "\ufeff",
    "\ufffd",
    "e\u0301",
    "\u202e",
    "ﬁ",
    "ß",
    "İ",
    "ǆ",
    "Ω≈ç√",
    "नमस्ते",
    "שלום",
    "สวัสดี",
    "'S",
    "'LL",
]


def strings(count: int) -> list[str]:
    """`count` strings: each kind in turn, then mixtures of all kinds. Seeded; needs no file."""
    source = random.Random(20261122)
    characters = [*range(0xD800), *range(0xE000, 0x11000)]
    kinds: list[Callable[[], str]] = [
        lambda: " ".join(source.choices(_ENGLISH, k=source.randint(1, 30))),
        lambda: "".join(source.choices(_CHINESE, k=source.randint(1, 40))),
        lambda: "".join(source.choices(_EMOJI, k=source.randint(1, 8))),
        lambda: "".join(source.choices(_CODE, k=source.randint(1, 3))),
        lambda: "".join(source.choices([*_SPACES, *_ENGLISH], k=source.randint(1, 25))),
        lambda: "".join(source.choices([*_DIGITS, " ", "a"], k=source.randint(1, 12))),
        lambda: "".join(source.choices([*_SPECIAL, " ", "x"], k=source.randint(1, 8))),
        lambda: "".join(source.choices(_ODD, k=source.randint(1, 10))),
        lambda: "".join(chr(source.choice(characters)) for _ in range(12)),
    ]
    mixture = [*_ENGLISH, *_CHINESE, *_EMOJI, *_CODE, *_SPACES, *_DIGITS, *_SPECIAL, *_ODD]
    made = ["", *(kinds[index % len(kinds)]() for index in range(count * 2 // 3))]
    made += ["".join(source.choices(mixture, k=source.randint(2, 40))) for _ in range(count - len(made))]
    return made
