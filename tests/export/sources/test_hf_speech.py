"""What a folder's files say about text, and what they say when they contradict each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.errors import SourceError
from export.sources.hf_config import read_config, read_spec
from export.sources.hf_speech import SpeechFiles, read_speech
from export.sources.speech import Speech
from export.spec import DecoderSpec
from tests.export.tiny_gguf import MERGES, SPECIAL_TOKENS, TEMPLATE, TOKENS
from tests.tools.byte_level import SpecialToken, write_byte_level
from tests.tools.gpt_oss_checkpoint import TINY, generation_config, model_config
from tests.tools.gpt_oss_tokenizer import write_tiny

VOCAB = len(TOKENS) + 5
ENDOFTEXT, IM_START, IM_END = range(3)
#: More digits than Python takes for a number.
NUMBER = "{{ " + "9" * 5000 + " }}"


def spec_of(vocab: int) -> DecoderSpec:
    """Any llama of that vocabulary."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        **dict.fromkeys(sizes, 8),
        "head_dim": 2,
        "max_position_embeddings": 64,
    }
    return read_spec(read_config(json.dumps(config).encode(), "config.json"), "config.json")


SPEC = spec_of(VOCAB)


@pytest.fixture
def files(tmp_path: Path) -> SpeechFiles:
    """A folder as transformers saves it."""
    special = [SpecialToken(index, text) for index, text in enumerate(SPECIAL_TOKENS)]
    write_byte_level(tmp_path, TOKENS, MERGES, special)
    return SpeechFiles(
        folder="model",
        config=packed({"eos_token_id": IM_END}),
        tokenizer=(tmp_path / "tokenizer.json").read_bytes(),
        tokenizer_config=packed({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}),
        chat_template=None,
        generation_config=packed({"eos_token_id": [IM_END, ENDOFTEXT]}),
    )


def packed(value: object) -> bytes:
    return json.dumps(value).encode()


def bent(files: SpeechFiles, name: str, **changes: Any) -> SpeechFiles:
    """One of the JSON files says something else; ... takes a key away."""
    value = json.loads(getattr(files, name)) | changes
    return with_file(files, name, packed({key: item for key, item in value.items() if item is not ...}))


def with_file(files: SpeechFiles, name: str, data: bytes) -> SpeechFiles:
    changes: dict[str, Any] = {name: data}
    return replace(files, **changes)


def refused(files: SpeechFiles, words: str, spec: DecoderSpec = SPEC) -> None:
    with pytest.raises(SourceError, match=words):
        read_speech(files, spec)


def test_a_folder_speaks_as_its_files_say(files: SpeechFiles) -> None:
    assert files.tokenizer is not None
    assert read_speech(files, SPEC) == Speech(files.tokenizer, TEMPLATE, (IM_END, ENDOFTEXT), IM_START, len(TOKENS))


def test_the_tokenizer_is_carried_byte_for_byte(files: SpeechFiles) -> None:
    assert files.tokenizer is not None
    spaced = files.tokenizer + b"\n\n"
    assert read_speech(replace(files, tokenizer=spaced), SPEC).tokenizer_json == spaced


class TestWhereGenerationStops:
    def test_what_the_template_calls_eos_comes_first_and_the_others_ascend(self, files: SpeechFiles) -> None:
        several = bent(files, "config", eos_token_id=[7, 5])
        assert read_speech(several, SPEC).stop_ids == (IM_END, ENDOFTEXT, 5, 7)

    def test_without_an_eos_token_the_configs_first_id_is_it(self, files: SpeechFiles) -> None:
        nameless = bent(bent(files, "tokenizer_config", eos_token=...), "config", eos_token_id=[7, 5])
        assert read_speech(nameless, SPEC).stop_ids == (7, ENDOFTEXT, IM_END, 5)

    def test_then_the_generation_configs(self, files: SpeechFiles) -> None:
        nameless = bent(bent(files, "tokenizer_config", eos_token=None), "config", eos_token_id=...)
        assert read_speech(nameless, SPEC).stop_ids[0] == IM_END
        one = bent(nameless, "generation_config", eos_token_id=9)
        assert read_speech(one, SPEC).stop_ids == (9, ENDOFTEXT, IM_END)

    def test_texts_that_end_a_turn_stop_it_though_no_file_says_so(self, files: SpeechFiles) -> None:
        silent = bent(replace(files, generation_config=None), "config", eos_token_id=...)
        assert read_speech(silent, SPEC).stop_ids == (IM_END, ENDOFTEXT)

    def test_such_a_text_that_is_no_special_token_is_only_text(self, files: SpeechFiles) -> None:
        tokenizer = json.loads(files.tokenizer or b"")
        tokenizer["added_tokens"][ENDOFTEXT]["special"] = False
        plain = replace(files, tokenizer=packed(tokenizer), generation_config=None)
        assert read_speech(plain, SPEC).stop_ids == (IM_END,)

    def test_a_folder_that_names_no_end_is_refused(self, files: SpeechFiles) -> None:
        endless = bent(bent(files, "tokenizer_config", eos_token=...), "config", eos_token_id=...)
        refused(replace(endless, generation_config=None), "names no end-of-sequence token")

    @pytest.mark.parametrize("name", ["config", "generation_config"])
    @pytest.mark.parametrize("ids", [-1, VOCAB, [0, 1 << 40]])
    def test_an_end_that_the_tokenizer_does_not_have_is_refused(self, files: SpeechFiles, name: str, ids: Any) -> None:
        refused(bent(files, name, eos_token_id=ids), rf"model/{name}.json says eos_token_id")


class TestTokensByText:
    def test_they_may_be_written_out_as_objects(self, files: SpeechFiles) -> None:
        written = {"__type": "AddedToken", "content": "<|im_start|>", "lstrip": False}
        assert read_speech(bent(files, "tokenizer_config", bos_token=written), SPEC).bos_id == IM_START

    def test_a_model_may_have_no_beginning(self, files: SpeechFiles) -> None:
        assert read_speech(bent(files, "tokenizer_config", bos_token=None), SPEC).bos_id is None

    @pytest.mark.parametrize("key", ["bos_token", "eos_token"])
    def test_one_that_the_tokenizer_does_not_have_is_refused(self, files: SpeechFiles, key: str) -> None:
        refused(bent(files, "tokenizer_config", **{key: "<s>"}), "model/tokenizer_config.json names the token '<s>'")


class TestTemplates:
    def test_a_file_of_its_own_comes_first(self, files: SpeechFiles) -> None:
        own = replace(files, chat_template="{{ messages }} é".encode())
        assert read_speech(own, SPEC).chat_template == "{{ messages }} é"

    def test_of_several_the_default_is_taken(self, files: SpeechFiles) -> None:
        several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        assert read_speech(bent(files, "tokenizer_config", chat_template=several), SPEC).chat_template == "yes"

    @pytest.mark.parametrize("template", [..., None, "", [], [{"name": "tool_use", "template": "no"}]])
    def test_a_folder_without_one_is_refused(self, files: SpeechFiles, template: Any) -> None:
        refused(bent(files, "tokenizer_config", chat_template=template), "model has no chat template .* instruct model")

    def test_a_folder_with_a_tokenizer_alone_needs_one_too(self, files: SpeechFiles) -> None:
        refused(replace(files, tokenizer_config=None), "model has no chat template")

    @pytest.mark.parametrize("template", ["{% for", "{{ x", "{% unknown %}", "{% if x %}", NUMBER])
    def test_one_that_is_no_jinja_is_refused(self, files: SpeechFiles, template: str) -> None:
        own = replace(files, chat_template=template.encode())
        refused(own, "model/chat_template.jinja cannot be used")
        inside = bent(files, "tokenizer_config", chat_template=template)
        refused(inside, "model/tokenizer_config.json cannot be used")

    def test_one_that_is_longer_than_any_models_is_refused(self, files: SpeechFiles) -> None:
        longest = " " * (1 << 20)
        assert read_speech(replace(files, chat_template=longest.encode()), SPEC).chat_template == longest
        own = replace(files, chat_template=longest.encode() + b" ")
        refused(own, "model/chat_template.jinja has 1048577 characters, more than this exporter's limit of 1048576")

    def test_one_that_leaves_a_loop_early_is_jinja(self, files: SpeechFiles) -> None:
        own = replace(files, chat_template=b"{% for m in messages %}{% break %}{% endfor %}")
        assert read_speech(own, SPEC).chat_template is not None

    def test_one_that_is_no_text_is_refused(self, files: SpeechFiles) -> None:
        refused(replace(files, chat_template=b"\xff"), "model/chat_template.jinja is not UTF-8")


class TestTokenizers:
    def test_a_folder_without_one_is_told_how_to_make_one(self, files: SpeechFiles) -> None:
        refused(replace(files, tokenizer=None), r"model has no tokenizer.json; .*AutoTokenizer.*save_pretrained")

    @pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"{", b"\xff", b'{"model": {"type": "SPM"}}', b"[" * 9999])
    def test_what_is_none_is_refused(self, files: SpeechFiles, data: bytes) -> None:
        refused(replace(files, tokenizer=data), "model/tokenizer.json (cannot be read|is not a tokenizer)")

    def test_one_without_tokens_is_refused(self, files: SpeechFiles) -> None:
        tokenizer = json.loads(files.tokenizer or b"") | {"added_tokens": []}
        tokenizer["model"] |= {"vocab": {}, "merges": []}
        refused(replace(files, tokenizer=packed(tokenizer)), "model/tokenizer.json has no tokens")

    def test_a_merge_of_unknown_tokens_is_refused(self, files: SpeechFiles) -> None:
        tokenizer = json.loads(files.tokenizer or b"")
        tokenizer["model"]["merges"].append(["ab", "cd"])
        refused(replace(files, tokenizer=packed(tokenizer)), "model/tokenizer.json is not a tokenizer")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("truncation", {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 10}),
            ("padding", {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0, "pad_token": "x"}),
        ],
    )
    def test_one_that_would_cut_or_fill_prompts_is_refused(self, files: SpeechFiles, key: str, value: Any) -> None:
        refused(bent(files, "tokenizer", **{key: value}), f"model/tokenizer.json sets '{key}', which would change")
        assert read_speech(bent(files, "tokenizer", **{key: None}), SPEC).size == len(TOKENS)

    def test_one_that_the_library_panics_over_is_refused(self, files: SpeechFiles) -> None:
        normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        refused(bent(files, "tokenizer", normalizer=normalizer), "model/tokenizer.json is not a tokenizer")

    def test_ids_that_the_library_would_move_are_refused(self, files: SpeechFiles) -> None:
        tokenizer = json.loads(files.tokenizer or b"")
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": len(TOKENS) + 2, "content": "<|far|>"})
        moved = Tokenizer.from_str(json.dumps(tokenizer)).token_to_id("<|far|>")
        assert moved == len(TOKENS)
        refused(
            replace(files, tokenizer=packed(tokenizer)), rf"'<\|far\|>' the id {moved + 2}, but it is loaded as {moved}"
        )

    def test_more_tokens_than_the_model_has_are_refused(self, files: SpeechFiles) -> None:
        refused(
            files,
            rf"gives '.*' the id {len(TOKENS) - 1}, but config.json has a vocab_size of",
            spec_of(len(TOKENS) - 1),
        )
        assert read_speech(files, spec_of(len(TOKENS))).size == len(TOKENS)


class TestHarmony:
    @pytest.fixture
    def oss(self, tmp_path: Path) -> SpeechFiles:
        write_tiny(tmp_path, TINY.first_special)
        return SpeechFiles(
            folder="oss",
            config=packed(model_config(TINY)),
            tokenizer=(tmp_path / "tokenizer.json").read_bytes(),
            tokenizer_config=(tmp_path / "tokenizer_config.json").read_bytes(),
            chat_template=(tmp_path / "chat_template.jinja").read_bytes(),
            generation_config=packed(generation_config(TINY)),
        )

    @pytest.fixture
    def spec(self) -> DecoderSpec:
        return read_spec(read_config(packed(model_config(TINY)), "config.json"), "config.json")

    def test_it_has_a_renderer_of_its_own(self, oss: SpeechFiles, spec: DecoderSpec) -> None:
        assert oss.chat_template is not None
        assert read_speech(oss, spec).chat_template is None
        assert read_speech(replace(oss, chat_template=None), spec).chat_template is None

    def test_it_stops_at_return_and_call_and_not_at_the_end_of_a_message(
        self, oss: SpeechFiles, spec: DecoderSpec
    ) -> None:
        return_, call, endoftext = (TINY.id_of(text) for text in ("<|return|>", "<|call|>", "<|endoftext|>"))
        assert read_speech(oss, spec).stop_ids == (return_, endoftext, call)
        alone = replace(oss, generation_config=None)
        assert read_speech(alone, spec).stop_ids == (return_, call)

    def test_a_tokenizer_without_its_marks_is_refused(self, files: SpeechFiles, spec: DecoderSpec) -> None:
        refused(files, r"no special token '<\|return\|>', which the harmony format needs", spec)

    def test_padding_above_the_tokenizers_ids_is_not_counted(self, oss: SpeechFiles, spec: DecoderSpec) -> None:
        assert read_speech(oss, spec).size == TINY.first_special + 21 < spec.vocab


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["config", "tokenizer", "tokenizer_config", "generation_config"]),
    flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_flipped_bytes_give_a_refusal_or_speech(files: SpeechFiles, name: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(getattr(files, name))
    for place, value in flips:
        data[place % len(data)] = value
    try:
        speech = read_speech(with_file(files, name, bytes(data)), SPEC)
    except SourceError as refusal:
        assert len(refusal.message) < 2000
    else:
        assert all(0 <= stop < VOCAB for stop in speech.stop_ids)
