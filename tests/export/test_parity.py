"""The real small model against independent implementations: transformers, and llama.cpp's rules written out; then
against itself in float32, and in a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, pre_tokenizers

from core.frames import Sampling
from core.manifest import MANIFEST_NAME, Golden, Manifest, decode_manifest
from edge_node.engine.sampling import sample
from edge_node.engine.step import Chunk, Decode, Logits, StepPlan
from edge_node.runtime.runner import Runner
from export.build import Order, export
from export.checks.report import Verdict
from export.checks.verify import verify
from export.forms.values import Floats
from export.recipes import Recipe
from export.trial.quality import Distance, Part, Score, score
from export.trial.quality_report import QualityReport, decode_report
from export.trial.run import text_ids
from tests.export.byte_alphabet import BYTE_LETTERS
from tests.export.graph_runner import logits_of
from tests.export.strings import strings

COUNT_STRINGS = 3000
SLOTS = 3

# Reading a GGUF takes transformers 20 s on an idle machine, several times that beside other tests.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def manifest_of(release: Path) -> Manifest:
    return decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))


def report_of(release: Path) -> QualityReport:
    return decode_report((release / "quality.json").read_bytes(), "quality.json")


@pytest.fixture(scope="module")
def tokenizer(smollm2_release: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2_release / "tokenizer.json"))


@pytest.fixture(scope="module")
def ids(smollm2_release: Path) -> list[int]:
    passage = text_ids(smollm2_release, manifest_of(smollm2_release))
    assert 700 < len(passage) < 900
    return passage


@pytest.fixture(scope="module")
def their_model(smollm2_gguf: Path) -> Any:
    """transformers' model, dequantised to float32."""
    import torch  # takes seconds: only for the tests that ask for it
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)


@pytest.fixture(scope="module")
def expected(their_model: Any, ids: list[int]) -> Floats:
    """Its logits of every id of the passage but the last."""
    import torch

    with torch.no_grad():
        logits: Floats = their_model(torch.tensor([ids[:-1]])).logits[0].numpy()
    return logits


@pytest.fixture(scope="module")
def their_tokenizer(smollm2_gguf: Path) -> Any:
    """What transformers makes of the same file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def hf_folder(their_model: Any, their_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as people have it from the hub: safetensors in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = their_model.config.to_dict()
    settings.pop("quantization_config", None)  # transformers does not save what it has read from a GGUF
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(their_model.state_dict())
    folder = tmp_path_factory.mktemp("hf") / "smollm2"
    model.to(torch.bfloat16).save_pretrained(folder)
    their_tokenizer.save_pretrained(folder)
    return folder


def distance_of(name: str, found: Score) -> Distance:
    """Print and return how far a release is from its reference."""
    distance = found.distance
    assert distance is not None
    print(
        f"\n{name}: KL {distance.kl_divergence:.2e}, top-1 {distance.top1_agreement:.2%}, perplexity "
        f"{found.perplexity:.3f} (reference {distance.perplexity:.3f}), largest difference "
        f"{distance.largest_difference:.2e}"
    )
    return distance


def from_transformers(release: Path, expected: Floats, ids: list[int]) -> Distance:
    """The distance of a release's logits from transformers'."""
    manifest = manifest_of(release)
    found = logits_of(release / manifest.graph, manifest.kv, ids[:-1]).astype(np.float32)
    return distance_of(manifest.variant, score([Part(found, np.array(ids[1:]), expected)]))


def test_the_oracle_form_agrees_with_transformers_on_every_token(
    tmp_path: Path, smollm2_gguf: Path, expected: Floats, ids: list[int]
) -> None:
    manifest = export(Order(str(smollm2_gguf), tmp_path / "release", "smollm2-135m", Recipe.GGUF_PARITY)).manifest
    # Float kernels take another path for a single row: that is why this form is an oracle and not served.
    assert manifest.claims["chunks"].startswith("bit-identical")
    distance = from_transformers(tmp_path / "release", expected, ids)
    assert distance.top1_agreement == 1
    assert distance.kl_divergence < 1e-9
    assert distance.largest_difference < 1e-3


def test_the_served_form_is_near_transformers(smollm2_release: Path, expected: Floats, ids: list[int]) -> None:
    distance = from_transformers(smollm2_release, expected, ids)
    assert distance.kl_divergence < 0.01
    assert distance.top1_agreement > 0.94


def test_the_served_form_is_batch_invariant(smollm2_release: Path) -> None:
    assert manifest_of(smollm2_release).batch_invariant


def test_quality_json_says_how_near_the_served_form_is_to_float32(smollm2_release: Path) -> None:
    report = report_of(smollm2_release)
    assert not isinstance(report.run, str), report.run
    assert report.run.score.positions > 700
    distance = distance_of("quality.json", report.run.score)
    assert distance.kl_divergence < 0.01
    assert distance.top1_agreement > 0.94
    assert abs(report.run.score.perplexity / distance.perplexity - 1) < 0.01
    assert all(tensor.exact for tensor in report.tensors.values())


@pytest.mark.parametrize(
    ("recipe", "most_kl", "least_top1", "largest_relative_error"),
    [(Recipe.CPU_INT8, 0.01, 0.94, 0.01), (Recipe.CPU_INT4, 0.5, 0.6, 0.12)],
)
def test_a_folder_of_floats_is_quantised_as_well_as_its_recipe_says(
    tmp_path: Path, hf_folder: Path, recipe: Recipe, most_kl: float, least_top1: float, largest_relative_error: float
) -> None:
    export(Order(str(hf_folder), tmp_path / "release", "smollm2-135m", recipe))
    report = report_of(tmp_path / "release")
    assert not isinstance(report.run, str), report.run
    distance = distance_of(recipe, report.run.score)
    assert distance.kl_divergence < most_kl
    assert distance.top1_agreement > least_top1
    assert 0 < max(tensor.relative_rms for tensor in report.tensors.values()) < largest_relative_error


def test_the_served_form_is_what_verify_expects(smollm2_release: Path, smollm2_gguf: Path) -> None:
    report = verify(smollm2_release, str(smollm2_gguf))
    assert [check.line() for check in report.checks if check.verdict is not Verdict.OK] == []


def test_a_node_gives_the_very_ids_of_the_golden_prompts(smollm2_release: Path) -> None:
    manifest = manifest_of(smollm2_release)
    with ThreadPoolExecutor(max_workers=1) as thread:  # it will round denormals to zero
        said = thread.submit(ids_of_a_node, smollm2_release, manifest, manifest.golden).result()
    assert len(said) == 4
    assert said == [golden.ids for golden in manifest.golden]


def ids_of_a_node(release: Path, manifest: Manifest, goldens: Sequence[Golden]) -> list[list[int]]:
    """What a node's own runner continues the prompts with, in its last slot, beside others."""
    runner = Runner.open(release, manifest, "cpu", 2, SLOTS, 256)
    return [_continue(runner, manifest, golden) for golden in goldens]


def _continue(runner: Runner, manifest: Manifest, golden: Golden) -> list[int]:
    prompt, ids = golden.prompt_ids, list[int]()
    for slot in range(SLOTS):
        chunk = Chunk(slot, 0, prompt, [len(prompt) - 1])
        read = runner.run(StepPlan(0, chunk, None, 0.0)).chunk_logits
    assert read is not None
    logits = read[0]
    while len(ids) < len(golden.ids):
        ids.append(_best(logits, manifest))
        end = len(prompt) + len(ids)
        decode = Decode(0, [5, 6, ids[-1]], [len(prompt) + 1, len(prompt) + 1, end], [SLOTS - 1])
        decoded = runner.run(StepPlan(0, None, decode, 0.0)).decode_logits
        assert decoded is not None
        logits = decoded[0]
    return ids


def _best(logits: Logits, manifest: Manifest) -> int:
    return sample(logits, Sampling(0.0), manifest.tokenizer_size, 0, 0)


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
    fields = gguf.GGUFReader(path).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    ids = {token: index for index, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
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
