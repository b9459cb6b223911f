from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from export.errors import SourceError
from export.forms.experts import ExpertFp4
from export.forms.matrix import Symmetric
from export.graphs.builder import Matrix, Table, Vector, View, Weight
from export.release.places import lay_out
from export.spec import Kind, TensorInfo

PAGE = 4096
FLOAT32 = np.dtype(np.float32)
TENSORS = {
    tensor.name: tensor
    for tensor in (
        TensorInfo("q", (96, 64), Kind.BF16),
        TensorInfo("k", (32, 64), Kind.BF16),
        TensorInfo("norm", (64,), Kind.BF16),
        TensorInfo("experts", (3, 10, 64), Kind.MXFP4),
        TensorInfo("odd", (4, 50), Kind.BF16),
    )
}


def test_initialisers_follow_each_other_page_by_page_in_the_order_of_the_graph() -> None:
    weights: list[Weight] = [
        Table("cos", np.zeros((1025, 1), np.float32)),
        Matrix("qkv", ("q", "k"), Symmetric(8, 32, FLOAT32, exact=False)),
        View("qkv.table", "qkv.codes", (128, 64)),
        Vector("norm", ("norm",), (64,), np.dtype(np.float16)),
        Matrix("experts", ("experts",), ExpertFp4(), experts=3),
    ]
    layout = lay_out(weights, TENSORS, PAGE)
    spans = {place.name: place.span for places in layout.places.values() for place in places}
    assert spans == {
        "cos": (0, 4100),
        "qkv.codes": (2 * PAGE, 128 * 64),
        "qkv.scales": (4 * PAGE, 128 * 2 * 4),
        "norm": (5 * PAGE, 128),
        "experts.codes": (6 * PAGE, 3 * 64 * 5),
        "experts.scales": (7 * PAGE, 3 * 10 * 2),
    }
    assert layout.size_bytes == 8 * PAGE
    made = {tensor.name: tensor for tensor in layout.initialisers(weights, "data")}
    assert made["qkv.codes"].dims == [128, 2, 32]
    assert made["qkv.table"].dims == [128, 64]
    assert made["qkv.table"].external_data == made["qkv.codes"].external_data
    assert made["experts.codes"].dims == [3, 64, 5]
    assert made["experts.scales"].data_type == TensorProto.FLOAT8E8M0
    assert made["norm"].data_type == TensorProto.FLOAT16


def test_a_matrix_that_its_form_cannot_hold_is_named_before_anything_is_read() -> None:
    weights = [Matrix("down", ("odd",), Symmetric(8, 32, FLOAT32, exact=False))]
    with pytest.raises(SourceError, match=r"'odd' cannot be stored as 8-bit blocks of 32 .*50.*another --recipe"):
        lay_out(weights, TENSORS, PAGE)
