"""The real small model against independent implementations: transformers, and llama.cpp's rules written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from export.build import Order, export
from export.gguf import GgufFile
from export.quantize import Doubles
from export.recipes import Recipe
from tests.export.byte_alphabet import BYTE_LETTERS
from tests.export.graph_runner import log_softmax, logits_of
from tests.export.strings import strings

PASSAGE = Path(__file__).with_name("passage.txt").read_text()
COUNT_TOKENS = 512
COUNT_STRINGS = 3000

# Reading a GGUF takes transformers 20 s on an idle machine, several times that beside other tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def tokenizer(smollm2_release: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_release / "tokenizer.json"))


@pytest.fixture(scope="module")
def ids(tokenizer: Tokenizer) -> list[int]:
    passage: list[int] = tokenizer.encode(PASSAGE).ids
    assert len(passage) > COUNT_TOKENS
    return passage[: COUNT_TOKENS + 1]


@pytest.fixture(scope="module")
def expected(smollm2_gguf: Path, ids: list[int]) -> Doubles:
    """Logits of transformers' model, dequantised to float32."""
    import torch  # takes seconds: only for the tests that ask for it
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    with torch.no_grad():
        logits: Doubles = model(torch.tensor([ids[:COUNT_TOKENS]])).logits[0].double().numpy()
    return logits


@pytest.fixture(scope="module")
def their_tokenizer(smollm2_gguf: Path) -> Any:
    """What transformers makes of the same file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def compare(name: str, expected: Doubles, found: Doubles, ids: list[int]) -> tuple[float, float]:
    """Print and return (mean KL divergence, share of equal top-1)."""
    theirs, ours = log_softmax(expected), log_softmax(found)
    divergence = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    same = float((expected.argmax(-1) == found.argmax(-1)).mean())
    rows, following = np.arange(COUNT_TOKENS), np.array(ids[1:])
    perplexities = [float(np.exp(-chances[rows, following].mean())) for chances in (theirs, ours)]
    print(
        f"\n{name}: KL {divergence:.2e}, top-1 {same:.2%}, perplexity {perplexities[1]:.3f} "
        f"(source {perplexities[0]:.3f}), largest difference {np.abs(expected - found).max():.2e}"
    )
    return divergence, same


def manifest_of(release: Path) -> Manifest:
    return decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))


def test_the_oracle_form_agrees_with_transformers_on_every_token(
    tmp_path: Path, smollm2_gguf: Path, expected: Doubles, ids: list[int]
) -> None:
    manifest = export(Order(smollm2_gguf, tmp_path / "release", "smollm2-135m", Recipe.GGUF_PARITY)).manifest
    # Float kernels take another path for a single row: that is why this form is an oracle and not served.
    assert manifest.claims["chunks"].startswith("bit-identical")
    found = logits_of(tmp_path / "release" / manifest.graph, manifest.kv, ids[:COUNT_TOKENS])
    divergence, same = compare("gguf-parity", expected, found, ids)
    assert same == 1
    assert divergence < 1e-9
    assert np.abs(expected - found).max() < 1e-3


def test_the_served_form_is_near_transformers(smollm2_release: Path, expected: Doubles, ids: list[int]) -> None:
    manifest = manifest_of(smollm2_release)
    found = logits_of(smollm2_release / manifest.graph, manifest.kv, ids[:COUNT_TOKENS])
    divergence, same = compare("gguf-exact", expected, found, ids)
    assert divergence < 0.01
    assert same > 0.94


def test_the_served_form_is_batch_invariant(smollm2_release: Path) -> None:
    assert manifest_of(smollm2_release).batch_invariant


def test_ids_and_text_are_those_of_transformers(tokenizer: Tokenizer, their_tokenizer: Any) -> None:
    # transformers does not read tokenizer.ggml.pre and splits as GPT-2 does. It agrees as it stands wherever there is
    # no number, and everywhere once it is told of SmolLM's rule, which is that of the model's own tokenizer.json.
    samples = strings(COUNT_STRINGS)
    without_numbers = [text for text in samples if not regex.search(r"\p{N}", text)]
    assert len(samples) == COUNT_STRINGS
    assert len(without_numbers) > COUNT_STRINGS / 3
    for text in without_numbers:
        assert tokenizer.encode(text).ids == their_tokenizer.encode(text), text
    their_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), their_tokenizer.backend_tokenizer.pre_tokenizer]
    )
    for text in samples:
        ids = tokenizer.encode(text).ids
        assert ids == their_tokenizer.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == their_tokenizer.decode(ids) == text
        shown = their_tokenizer.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=True) == shown


def test_ids_are_those_of_llama_cpp_s_rules(tokenizer: Tokenizer, smollm2_gguf: Path) -> None:
    encode = llama_cpp_rules(smollm2_gguf)
    for text in strings(COUNT_STRINGS):
        assert tokenizer.encode(text).ids == encode(text), text


def llama_cpp_rules(path: Path) -> Callable[[str], list[int]]:
    """Byte-level BPE by its definition, with the split that llama.cpp's source lists for `smollm`."""
    metadata: Any = GgufFile(path).metadata
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    special = regex.compile("(" + "|".join(regex.escape(tokens[i]) for i, kind in enumerate(kinds) if kind == 3) + ")")
    number = regex.compile(r"(\p{N})")
    word = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def merge(text: str) -> list[int]:
        parts = [BYTE_LETTERS[byte] for byte in text.encode()]
        while len(parts) > 1:
            pairs = [ranks.get((left, right), len(ranks)) for left, right in pairwise(parts)]
            best = min(pairs)
            if best == len(ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ids[part] for part in parts]

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in special.split(text):
            if special.fullmatch(piece):
                found.append(ids[piece])
                continue
            for run in number.split(piece):
                for part in word.findall(run):
                    found += merge(part)
        return found

    return encode


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    "messages",
    [
        [("user", "Hello")],
        [("system", "Answer in verse."), ("user", "Hello"), ("assistant", "Well met!"), ("user", "1\n 2\t3")],
        [("user", "<|im_end|> {{ 7 * 7 }} {% raw %} 春天 😀")],
    ],
)
def test_the_chat_template_renders_as_in_transformers(
    smollm2_release: Path, their_tokenizer: Any, messages: list[tuple[str, str]], add_generation_prompt: bool
) -> None:
    conversation = [{"role": role, "content": content} for role, content in messages]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((smollm2_release / "chat_template.jinja").read_text())
    ours = template.render(messages=conversation, add_generation_prompt=add_generation_prompt)
    theirs = their_tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    assert ours == theirs
