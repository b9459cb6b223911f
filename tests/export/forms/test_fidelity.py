from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from export.forms.experts import ExpertBits, ExpertFloat, ExpertFp4, ExpertMxfp4
from export.forms.fidelity import Fidelity, measure
from export.forms.form import Form
from export.forms.matrix import Corrected, DenseFloat, Symmetric, ZeroPointed
from export.forms.values import Blocks, Mxfp4, Plain, Values
from tests.export.numbers import FLOAT16, FLOAT32, mxfp4, plain, q4_1, q4_k, q6_k, symmetric
from tests.export.one_node import Array

EXACT: list[tuple[Form, Values]] = [
    (DenseFloat(FLOAT32), plain()),
    (DenseFloat(FLOAT32, exact=False), q4_k()),
    (Symmetric(4, 32, FLOAT16), symmetric(4, 32)),
    (Symmetric(8, 32, FLOAT32), symmetric(8, 32)),
    (Symmetric(8, 16, FLOAT32), q6_k()),
    (Corrected(4, 32, FLOAT32), q4_1()),
    (Corrected(4, 32, FLOAT32), q4_k()),
    (ExpertFloat(FLOAT32), mxfp4()),
    (ExpertBits(8, 32, FLOAT32), mxfp4()),
    (ExpertBits(8, 32, FLOAT16), mxfp4()),
    (ExpertFp4(), mxfp4()),
    (ExpertMxfp4(), mxfp4()),
]
ROUNDED: list[tuple[Form, Values]] = [
    (DenseFloat(FLOAT16, exact=False), plain()),
    (Symmetric(8, 32, FLOAT32, exact=False), plain()),
    (Symmetric(4, 32, FLOAT16, exact=False), plain()),
    (Symmetric(8, 16, FLOAT16, exact=False), q6_k()),
    (Corrected(4, 32, FLOAT16), q4_k()),
    (ZeroPointed(4, 32, FLOAT32), q4_k()),
    (ExpertBits(4, 32, FLOAT16), mxfp4()),
]


def names(cases: list[tuple[Form, Values]]) -> list[str]:
    return [f"{form!r}"[:70] for form, _ in cases]


def weights_of(source: Values) -> int:
    return source.to_doubles().size


@pytest.mark.parametrize(("form", "source"), EXACT, ids=names(EXACT))
def test_what_is_carried_over_is_found_exact(form: Form, source: Values) -> None:
    found = measure(source, form.encode(source), form)
    assert (found.form, found.weights, found.broken, found.max_error) == (form.label, weights_of(source), 0, 0)
    assert found.exact
    assert found.relative_rms == 0


@pytest.mark.parametrize(("form", "source"), ROUNDED, ids=names(ROUNDED))
def test_what_is_rounded_is_within_its_bound_and_measured(form: Form, source: Values) -> None:
    arrays = form.encode(source)
    found, weights = measure(source, arrays, form), source.to_doubles()
    errors = form.decode(arrays) - weights
    assert (found.weights, found.broken, found.exact) == (weights.size, 0, False)
    assert found.max_error == np.abs(errors).max() > 0
    assert found.relative_rms == pytest.approx(np.sqrt((errors**2).sum() / (weights**2).sum()))


def damaged(form: Form, source: Values) -> Iterator[dict[str, Array]]:
    """The arrays with one bit changed, in each of them in turn."""
    for name in form.encode(source):
        arrays = {other: array.copy() for other, array in form.encode(source).items()}
        flat = arrays[name].reshape(-1).view(np.uint8)
        flat[flat.size * 3 // 4] ^= 0x10
        yield arrays


@pytest.mark.parametrize(("form", "source"), EXACT, ids=names(EXACT))
def test_one_changed_bit_in_any_array_is_found(form: Form, source: Values) -> None:
    for arrays in damaged(form, source):
        found = measure(source, arrays, form)
        errors = np.abs(form.decode(arrays) - source.to_doubles())
        assert found.max_error == errors.max() > 0
        assert found.broken == np.count_nonzero(errors > form.bound(source, arrays)) > 0


@pytest.mark.parametrize(("form", "source"), ROUNDED, ids=names(ROUNDED))
def test_a_code_that_is_one_step_off_breaks_a_bound_too(form: Form, source: Values) -> None:
    arrays = {name: array.copy() for name, array in form.encode(source).items()}
    first = next(iter(arrays))
    flat = arrays[first].reshape(-1)
    flat[flat.size // 2] = flat[flat.size // 2] ^ np.uint8(3) if flat.dtype == np.uint8 else flat[flat.size // 2] * 1.01
    assert measure(source, arrays, form).broken >= 1


@pytest.mark.parametrize(
    ("form", "source"),
    [
        (Symmetric(4, 32, FLOAT32), symmetric(4, 32)),
        (Corrected(4, 32, FLOAT32), q4_1()),
        (ExpertBits(4, 32, FLOAT32), mxfp4()),
        (ExpertFp4(), mxfp4()),
        (ExpertMxfp4(), mxfp4()),
    ],
    ids=lambda case: type(case).__name__,
)
def test_swapped_nibbles_are_found(form: Form, source: Values) -> None:
    """The mistake that an encoder is most likely to make."""
    arrays = form.encode(source)
    codes = arrays["codes"]
    swapped = arrays | {"codes": codes << np.uint8(4) | codes >> np.uint8(4)}
    assert measure(source, swapped, form).broken > weights_of(source) // 2


def test_swapped_neighbours_are_found() -> None:
    form, source = ExpertBits(8, 32, FLOAT32), mxfp4()
    arrays = form.encode(source)
    swapped = arrays["codes"].reshape(-1, 2)[:, ::-1].reshape(6, 96)
    assert measure(source, arrays | {"codes": swapped}, form).broken > weights_of(source) // 2


def test_a_transpose_of_bytes_instead_of_codes_is_found() -> None:
    source = mxfp4(rows=64, columns=64)
    arrays = ExpertFp4().encode(source)
    bytes_alone = np.ascontiguousarray(source.packed.reshape(64, 32).T.reshape(64, 32))
    assert measure(source, arrays | {"codes": bytes_alone}, ExpertFp4()).broken > 0


def test_weights_that_are_no_numbers_are_broken() -> None:
    form, source = Symmetric(8, 32, FLOAT32), symmetric(8, 32)
    arrays = form.encode(source)
    scales = arrays["scales"].copy()
    scales[2, 1] = np.nan
    found = measure(source, arrays | {"scales": scales}, form)
    assert (found.broken, found.exact) == (32, False)


def test_minus_zero_is_zero() -> None:
    source = Mxfp4(np.full((2, 1, 16), 0x80, np.uint8), np.full((2, 1), 120, np.uint8))
    for form in (ExpertBits(8, 32, FLOAT32), ExpertFp4(), ExpertFloat(FLOAT32)):
        assert measure(source, form.encode(source), form).exact


@pytest.mark.parametrize(("form", "source"), [*EXACT, *ROUNDED], ids=names([*EXACT, *ROUNDED]))
def test_slices_add_up_to_the_whole(form: Form, source: Values) -> None:
    parts = [source.rows(0, 2), source.rows(2, 6)]
    first, second = (measure(part, form.encode(part), form) for part in parts)
    both, whole = first + second, measure(source, form.encode(source), form)
    assert (both.form, both.weights, both.broken) == (whole.form, whole.weights, whole.broken)
    assert both.max_error == whole.max_error
    assert both.relative_rms == pytest.approx(whole.relative_rms)


def test_many_rows_are_compared_in_pieces_with_the_same_answer() -> None:
    source = mxfp4(rows=1500)
    for form in (ExpertBits(4, 32, FLOAT32), ExpertFp4()):
        arrays = {name: array.copy() for name, array in form.encode(source).items()}
        arrays["codes"][1:90:7] ^= 0x33
        errors = np.abs(form.decode(arrays) - source.to_doubles())
        found = measure(source, arrays, form)
        assert found.broken == np.count_nonzero(errors > form.bound(source, arrays)) > 0
        assert found.max_error == errors.max()


def test_a_vector_is_a_matrix_of_one_column() -> None:
    source = Plain(np.linspace(-1, 1, 70_001, dtype=np.float32)[:, None])
    assert measure(source, {"weight": source.weights}, DenseFloat(FLOAT32)).weights == 70_001
    rounded = DenseFloat(FLOAT16, exact=False)
    assert 0 < measure(source, rounded.encode(source), rounded).relative_rms < 2**-11


def test_equal_codes_say_nothing_of_another_middle() -> None:
    """Codes and scales as in the source, but the operator takes another code for zero."""
    source = symmetric(4, 32)
    shifted = Blocks(4, source.codes, source.scales, source.minimums + source.scales)
    form = Symmetric(4, 32, FLOAT32)
    assert measure(shifted, form.encode(source), form).broken > 0


def test_fidelity_survives_json() -> None:
    found = measure(plain(), DenseFloat(FLOAT16, exact=False).encode(plain()), DenseFloat(FLOAT16, exact=False))
    text = msgspec.json.encode(found)
    assert json.loads(text)["weights"] == found.weights
    assert msgspec.json.decode(text, type=Fidelity) == found
