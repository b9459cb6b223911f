from __future__ import annotations

import pytest

from export.choice import Hardware, choose, needed_bytes, weights_bytes
from export.errors import SourceError
from export.recipes import Dense, Plan, Recipe
from export.spec import Kind, Role
from tests.export.numbers import mxfp4
from tests.export.specs import GPT_OSS_20B, llama, tensors_of

GB = 10**9
GPT_OSS_TENSORS = tensors_of(GPT_OSS_20B, Kind.BF16)
SMALL = llama(hidden=576, intermediate=1536, layers=30, heads=9)
LARGE = llama()


def for_gpt_oss(hardware: Hardware) -> tuple[Recipe, str]:
    return choose(GPT_OSS_20B, GPT_OSS_TENSORS, hardware)


class TestGptOss:
    def test_without_a_gpu_experts_are_exact_if_memory_allows(self) -> None:
        recipe, why = for_gpt_oss(Hardware(None, 32 * GB))
        assert recipe is Recipe.CPU_INT8
        assert why == (
            "the values of the experts are exact in 8 bits; it takes about 25.0 GB of this machine's 32.0 GB of memory"
        )

    def test_with_24_gib_they_are_not_and_that_is_said(self) -> None:
        recipe, why = for_gpt_oss(Hardware(None, 24 * 2**30))
        assert recipe is Recipe.CPU_INT4
        assert why.startswith(
            "4 bits are lossy (expert weights are off by about 7 %); cpu-mxfp4 would be lossless, but"
        )
        assert why.endswith("cpu-int8 would take about 25.0 GB of this machine's 25.8 GB of memory")

    def test_where_nothing_fits_the_smallest_is_taken_and_that_is_said(self) -> None:
        recipe, why = for_gpt_oss(Hardware(None, 8 * GB))
        assert recipe is Recipe.CPU_INT4
        assert "nothing smaller is left to take; cpu-int8 would take about" in why

    @pytest.mark.parametrize(
        ("memory", "capability", "expected"),
        [
            (141 * GB, (9, 0), Recipe.CUDA_INT8),
            (141 * GB, (12, 0), Recipe.CUDA_FP4),
            (24 * GB, (8, 9), Recipe.CUDA_FP4),
            (16 * GB, (12, 0), Recipe.CUDA_FP4),
            (8 * GB, (12, 0), Recipe.CPU_INT8),
        ],
    )
    def test_a_gpu_gets_what_fits_and_what_it_multiplies_fast(
        self, memory: int, capability: tuple[int, int], expected: Recipe
    ) -> None:
        assert for_gpt_oss(Hardware(memory, 64 * GB, capability))[0] is expected

    def test_a_gpu_that_is_too_small_is_mentioned(self) -> None:
        _, why = for_gpt_oss(Hardware(8 * GB, 64 * GB, (8, 6)))
        assert "cuda-int8 would take about 23.4 GB of the GPU's 8.0 GB of memory" in why
        assert "cuda-fp4 would take about 13.3 GB of the GPU's 8.0 GB of memory" in why

    def test_the_native_recipe_is_never_taken_by_itself(self) -> None:
        for memory in (4, 16, 24, 64):
            assert for_gpt_oss(Hardware(None, memory * GB))[0] is not Recipe.CPU_MXFP4


class TestOthers:
    def test_a_gguf_is_carried_as_it_stands(self) -> None:
        tensors = tensors_of(LARGE, Kind.Q4_K)
        assert choose(LARGE, tensors, Hardware(None, 16 * GB))[0] is Recipe.GGUF_EXACT
        assert choose(LARGE, tensors, Hardware(16 * GB, 16 * GB))[0] is Recipe.CUDA_INT8
        assert choose(LARGE, tensors, Hardware(2 * GB, 16 * GB))[0] is Recipe.GGUF_EXACT

    def test_floats_get_8_bits_or_4_if_8_do_not_fit(self) -> None:
        tensors = tensors_of(LARGE, Kind.BF16)
        assert choose(LARGE, tensors, Hardware(None, 16 * GB))[0] is Recipe.CPU_INT8
        assert choose(LARGE, tensors, Hardware(None, 12 * GB))[0] is Recipe.CPU_INT4
        assert choose(LARGE, tensors, Hardware(16 * GB, 16 * GB))[0] is Recipe.CUDA_INT8
        assert choose(LARGE, tensors, Hardware(8 * GB, 16 * GB))[0] is Recipe.CUDA_INT4
        assert choose(SMALL, tensors_of(SMALL, Kind.BF16), Hardware(None, 4 * GB))[0] is Recipe.CPU_INT8

    def test_rows_without_whole_blocks_stay_floats(self) -> None:
        odd = llama(hidden=72, intermediate=100, layers=1, heads=2)
        recipe, why = choose(odd, tensors_of(odd, Kind.BF16), Hardware(16 * GB, 16 * GB))
        assert recipe is Recipe.FP32
        assert why.startswith("rows that cannot be cut into blocks of 32 cannot be quantised")

    def test_exact_dense_tensors_are_counted(self) -> None:
        tensors = tensors_of(LARGE, Kind.BF16)
        just_enough = Hardware(None, 147 * GB // 10)
        assert choose(LARGE, tensors, just_enough, Dense.INT8)[0] is Recipe.CPU_INT8
        assert choose(LARGE, tensors, just_enough, Dense.EXACT)[0] is Recipe.CPU_INT4


class TestSizes:
    def test_weights_are_counted_as_they_are_stored(self) -> None:
        """The experts of one matrix, encoded: codes and scales."""
        plan = Plan(Recipe.CPU_INT8)
        tensor = GPT_OSS_TENSORS["model.layers.0.mlp.experts.down_proj"]
        form = plan.form(GPT_OSS_20B, Role.EXPERTS, tensor.kind)
        arrays = form.encode(mxfp4(rows=2880, columns=2880))
        of_all = weights_bytes(plan, GPT_OSS_20B, GPT_OSS_TENSORS)
        experts = 3 * 24 * 32 * sum(array.nbytes for array in arrays.values())
        assert tensor.shape == (32, 2880, 2880)
        assert 0 < of_all - experts < 0.1 * of_all

    def test_a_conversation_and_room_to_work_come_on_top(self) -> None:
        plan = Plan(Recipe.CPU_INT8)
        cache_bytes = 2 * 24 * 8 * 64 * 4 * 4096
        weights = weights_bytes(plan, GPT_OSS_20B, GPT_OSS_TENSORS)
        assert needed_bytes(plan, GPT_OSS_20B, GPT_OSS_TENSORS) == weights + cache_bytes + GB

    def test_a_tensor_that_cannot_be_stored_is_named(self) -> None:
        odd = llama(hidden=72, intermediate=100, layers=1, heads=2)
        with pytest.raises(SourceError, match=r"'model.embed_tokens.weight' cannot be stored .*rows of 72 weights"):
            weights_bytes(Plan(Recipe.CPU_INT8), odd, tensors_of(odd, Kind.BF16))
