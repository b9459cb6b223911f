from __future__ import annotations

import numpy as np
import pytest

from export.errors import SourceError
from export.forms.experts import ExpertBits, ExpertFloat, ExpertFp4, ExpertMxfp4
from export.forms.form import Form
from export.forms.matrix import Corrected, DenseFloat, Symmetric, ZeroPointed
from export.recipes import FROM_GGUF, Dense, Device, Plan, Recipe
from export.spec import Kind, Role
from tests.export.numbers import FLOAT16, FLOAT32
from tests.export.specs import GPT_OSS_20B, llama

LLAMA = llama()
FOR_EXPERTS = [recipe for recipe in Recipe if not recipe.startswith("gguf-")]
FOR_FLOATS = [recipe for recipe in FOR_EXPERTS if recipe not in (Recipe.CUDA_FP4, Recipe.CPU_MXFP4)]
FOR_GGUF = [recipe for recipe in Recipe if recipe not in (Recipe.CUDA_FP4, Recipe.CPU_MXFP4)]


def test_a_recipe_says_where_it_runs_and_what_it_is_for() -> None:
    for recipe in Recipe:
        assert recipe.device is (Device.CUDA if recipe.startswith("cuda") else Device.CPU)
        assert recipe.purpose and "\n" not in recipe.purpose and len(recipe.purpose) < 100
    assert len({recipe.purpose for recipe in Recipe}) == len(Recipe)


def test_cuda_computes_in_float16_and_the_cpu_in_float32() -> None:
    assert Plan(Recipe.CUDA_INT8).floats == np.float16
    assert Plan(Recipe.CPU_INT8).floats == np.float32


class TestExperts:
    @pytest.mark.parametrize(
        ("recipe", "form"),
        [
            (Recipe.CUDA_FP4, ExpertFp4()),
            (Recipe.CUDA_INT8, ExpertBits(8, 32, FLOAT16)),
            (Recipe.CUDA_INT4, ExpertBits(4, 32, FLOAT16)),
            (Recipe.CPU_INT8, ExpertBits(8, 32, FLOAT32)),
            (Recipe.CPU_INT4, ExpertBits(4, 32, FLOAT32)),
            (Recipe.CPU_MXFP4, ExpertMxfp4()),
            (Recipe.FP32, ExpertFloat(FLOAT32)),
        ],
    )
    def test_each_recipe_has_its_form(self, recipe: Recipe, form: Form) -> None:
        assert Plan(recipe).form(GPT_OSS_20B, Role.EXPERTS, Kind.MXFP4) == form

    @pytest.mark.parametrize("recipe", [Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
    def test_recipes_for_gguf_refuse_them(self, recipe: Recipe) -> None:
        with pytest.raises(SourceError, match=f"{recipe} has no form for MXFP4 experts; take cpu-int8"):
            Plan(recipe).form(GPT_OSS_20B, Role.EXPERTS, Kind.MXFP4)

    @pytest.mark.parametrize("recipe", [Recipe.CUDA_FP4, Recipe.CPU_MXFP4])
    def test_recipes_for_experts_refuse_models_without(self, recipe: Recipe) -> None:
        with pytest.raises(SourceError, match=f"{recipe} is for models with MXFP4 experts, this llama model has none"):
            Plan(recipe).check(LLAMA, {Kind.BF16, Kind.F32})

    @pytest.mark.parametrize("recipe", FOR_EXPERTS)
    def test_what_is_beside_them_has_8_bits_or_is_exact(self, recipe: Recipe) -> None:
        """Four bits are for the bulk alone."""
        for role in (Role.ATTENTION, Role.EMBEDDING, Role.HEAD):
            by_default = Plan(recipe).form(GPT_OSS_20B, role, Kind.BF16)
            exact = Plan(recipe, Dense.EXACT).form(GPT_OSS_20B, role, Kind.BF16)
            floats = Plan(recipe).floats
            assert exact == DenseFloat(floats, exact=floats == FLOAT32)
            assert by_default == (exact if recipe is Recipe.FP32 else Symmetric(8, 32, floats, exact=False))

    @pytest.mark.parametrize("recipe", FOR_EXPERTS)
    def test_the_router_stays_float32(self, recipe: Recipe) -> None:
        assert Plan(recipe).form(GPT_OSS_20B, Role.ROUTER, Kind.BF16) == DenseFloat(FLOAT32)


class TestFloats:
    @pytest.mark.parametrize("dense", Dense)
    @pytest.mark.parametrize("recipe", FOR_FLOATS)
    def test_the_bulk_has_the_recipes_bits(self, recipe: Recipe, dense: Dense) -> None:
        plan = Plan(recipe, dense)
        for role in (Role.ATTENTION, Role.FEED_FORWARD):
            form = plan.form(LLAMA, role, Kind.BF16)
            if recipe is Recipe.FP32:
                assert form == DenseFloat(FLOAT32)
            else:
                assert form == Symmetric(8 if "int8" in recipe else 4, 32, plan.floats, exact=False)

    @pytest.mark.parametrize("recipe", [Recipe.CPU_INT4, Recipe.CUDA_INT8])
    def test_dense_decides_about_embedding_and_head(self, recipe: Recipe) -> None:
        for role in (Role.EMBEDDING, Role.HEAD):
            assert isinstance(Plan(recipe, Dense.EXACT).form(LLAMA, role, Kind.F16), DenseFloat)
            assert Plan(recipe).form(LLAMA, role, Kind.F16) == Symmetric(8, 32, Plan(recipe).floats, exact=False)

    def test_float16_holds_float16_exactly_and_nothing_else(self) -> None:
        plan = Plan(Recipe.CUDA_INT8, Dense.EXACT)
        exact = {kind: plan.form(LLAMA, Role.HEAD, kind).exact for kind in (Kind.F16, Kind.BF16, Kind.F32)}
        assert exact == {Kind.F16: True, Kind.BF16: False, Kind.F32: False}

    @pytest.mark.parametrize("recipe", [Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
    def test_floats_of_a_gguf_stay_floats(self, recipe: Recipe) -> None:
        assert Plan(recipe).form(LLAMA, Role.HEAD, Kind.F16) == DenseFloat(FLOAT32)


class TestBlocks:
    """What is quantised in the checkpoint is carried as it stands, whatever bits the recipe has for floats."""

    @pytest.mark.parametrize("recipe", [recipe for recipe in FOR_GGUF if recipe is not Recipe.FP32])
    def test_each_kind_keeps_its_codes(self, recipe: Recipe) -> None:
        plan = Plan(recipe)
        forms = {kind: plan.form(LLAMA, Role.FEED_FORWARD, kind) for kind in FROM_GGUF}
        floats = plan.floats
        with_minimum = ZeroPointed if recipe is Recipe.GGUF_PARITY else Corrected
        assert forms == {
            Kind.Q4_0: Symmetric(4, 32, floats),
            Kind.Q8_0: Symmetric(8, 32, floats),
            Kind.Q6_K: Symmetric(8, 16, floats, exact=floats == FLOAT32),
            Kind.Q4_1: with_minimum(4, 32, floats),
            Kind.Q4_K: with_minimum(4, 32, floats),
        }

    @pytest.mark.parametrize("kind", FROM_GGUF)
    def test_fp32_multiplies_them_out(self, kind: Kind) -> None:
        assert Plan(Recipe.FP32).form(LLAMA, Role.HEAD, kind) == DenseFloat(FLOAT32, exact=False)


class TestMisfits:
    def test_recipes_for_gguf_are_for_quantised_checkpoints(self) -> None:
        for recipe in (Recipe.GGUF_EXACT, Recipe.GGUF_PARITY):
            assert recipe.misfit(LLAMA, {Kind.Q4_K, Kind.F32}) is None
            assert "this checkpoint has none" in (recipe.misfit(LLAMA, {Kind.BF16, Kind.F32}) or "")
            assert recipe.misfit(GPT_OSS_20B, {Kind.BF16, Kind.MXFP4}) is not None

    def test_what_fits_is_not_refused_and_what_does_not_is(self) -> None:
        Plan(Recipe.GGUF_EXACT).check(LLAMA, {Kind.Q4_K, Kind.F32})
        with pytest.raises(SourceError, match="gguf-exact carries the quantised tensors of a GGUF"):
            Plan(Recipe.GGUF_EXACT).check(LLAMA, {Kind.BF16, Kind.F32})

    def test_every_other_recipe_fits_what_it_has_forms_for(self) -> None:
        assert [recipe for recipe in Recipe if not recipe.misfit(LLAMA, {Kind.BF16})] == FOR_FLOATS
        assert [recipe for recipe in Recipe if not recipe.misfit(GPT_OSS_20B, {Kind.MXFP4})] == FOR_EXPERTS
        assert [recipe for recipe in Recipe if not recipe.misfit(LLAMA, {Kind.Q4_0})] == FOR_GGUF


class TestVariants:
    def test_an_option_that_changes_weights_shows(self) -> None:
        assert Plan(Recipe.CPU_INT8).variant == "cpu-int8"
        assert Plan(Recipe.CPU_INT8, Dense.EXACT).variant == "cpu-int8-dense-exact"

    @pytest.mark.parametrize("recipe", [Recipe.FP32, Recipe.GGUF_EXACT, Recipe.GGUF_PARITY])
    def test_an_option_that_changes_nothing_does_not(self, recipe: Recipe) -> None:
        assert Plan(recipe, Dense.EXACT).variant == recipe
        for role in (Role.EMBEDDING, Role.HEAD, Role.FEED_FORWARD):
            forms = [Plan(recipe, dense).form(LLAMA, role, Kind.F16) for dense in Dense]
            assert forms[0] == forms[1]


class TestPromises:
    @pytest.mark.parametrize("recipe", FOR_FLOATS)
    def test_nothing_is_called_lossless_in_a_model_without_experts(self, recipe: Recipe) -> None:
        promise = Plan(recipe).promise(LLAMA)
        assert promise
        assert "lossless" not in promise
        assert "experts" not in promise

    @pytest.mark.parametrize("recipe", FOR_EXPERTS)
    def test_experts_are_called_lossless_where_their_form_is_exact(self, recipe: Recipe) -> None:
        promise = Plan(recipe).promise(GPT_OSS_20B)
        is_exact = Plan(recipe).form(GPT_OSS_20B, Role.EXPERTS, Kind.MXFP4).exact
        assert promise.startswith("experts are lossless" if is_exact else "experts are requantised to 4 bits")
        assert promise.count("lossless") == is_exact

    def test_dense_is_told(self) -> None:
        assert (
            Plan(Recipe.CPU_INT8).promise(GPT_OSS_20B).endswith("attention, embedding and head are rounded to 8 bits")
        )
        exact = Plan(Recipe.CPU_INT8, Dense.EXACT).promise(GPT_OSS_20B)
        assert exact.endswith("attention, embedding and head are as in the checkpoint")
        assert Plan(Recipe.CUDA_INT8, Dense.EXACT).promise(LLAMA).endswith("; embedding and head are float16")
