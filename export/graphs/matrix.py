"""Products with a matrix, and look-ups of its rows, for each form that a matrix is stored in.

    DenseFloat    FusedMatMul with the rows as they lie        Gather
    Symmetric     MatMulNBits                                  GatherBlockQuantized
    Corrected     MatMulNBits                                  GatherBlockQuantized
                  + sums of blocks of x @ corrections          + corrections, one a block
    ZeroPointed   MatMulNBits with zero points                 GatherBlockQuantized
                                                               + (half - zero point) * scale, one a block

Forms of experts are not here: one operator takes all of them (`export/graphs/gptoss.py`).
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from export.forms.matrix import Corrected, DenseFloat, Symmetric, ZeroPointed
from export.graphs.builder import MICROSOFT, Matrix, View
from export.graphs.draft import Draft, path_of

FLOAT32 = np.dtype(np.float32)


def product(draft: Draft, name: str, tensors: tuple[str, ...], x: str, biases: tuple[str, ...] = ()) -> str:
    """x [batch, tokens, columns] times the stacked tensors, transposed, plus their biases: [batch, tokens, rows].

    Neighbours of one form are one matrix. When the plan gives them several, each matrix is multiplied by itself and
    the results are joined.
    """
    path = path_of(name)
    runs = [tuple(run) for _, run in groupby(tensors, draft.form)]
    if len(runs) == 1:
        return _declare_and_multiply(draft, name, tensors, x, biases)
    parts, done = [], 0
    for index, run in enumerate(runs):
        parts.append(_declare_and_multiply(draft, f"{name}.{index}", run, x, biases[done : done + len(run)]))
        done += len(run)
    return draft.graph.node("Concat", path, parts, axis=-1)


def _declare_and_multiply(draft: Draft, name: str, tensors: tuple[str, ...], x: str, biases: tuple[str, ...]) -> str:
    return multiply(draft, draft.matrix(name, tensors), x, path_of(name), biases)


def multiply(
    draft: Draft, matrix: Matrix, x: str, path: str, biases: tuple[str, ...] = (), output: str = "", axes: int = 3
) -> str:
    """x, of so many axes, times a declared matrix, transposed, plus biases; called `output`, by default as `path`."""
    output = output or path
    match matrix.form:
        case DenseFloat() as form:
            return _multiply_floats(draft, matrix, form, x, path, biases, output)
        case Symmetric() as form:
            return _mat_mul_n_bits(draft, matrix, form, x, path, biases, output)
        case ZeroPointed() as form:
            return _mat_mul_n_bits(draft, matrix, form, x, path, biases, output)
        case Corrected() as form:
            return _multiply_corrected(draft, matrix, form, x, path, biases, output, axes)
    raise ValueError(f"no operator multiplies by {matrix.name!r}, which is stored as {matrix.form.label}")


def _multiply_floats(
    draft: Draft, matrix: Matrix, form: DenseFloat, x: str, path: str, biases: tuple[str, ...], output: str
) -> str:
    """Computed in the form's own type: a float32 matrix in a float16 graph (the router) has casts around it."""
    graph, casts = draft.graph, draft.floats != form.floats
    biased, biased_output = (f"{path}/biased",) * 2 if casts else (path, output)
    first, first_output = (f"{path}/unbiased",) * 2 if biases else (biased, biased_output)
    x = draft.cast(f"{path}/float32", x, draft.floats, form.floats)
    y = graph.node("FusedMatMul", first, [x, f"{matrix.name}.weight"], [first_output], domain=MICROSOFT, transB=1)
    if biases:
        y = graph.node("Add", biased, [y, draft.vector(f"{matrix.name}.bias", biases, form.floats)], [biased_output])
    return draft.cast(path, y, form.floats, draft.floats, output)


def _mat_mul_n_bits(
    draft: Draft,
    matrix: Matrix,
    form: Symmetric | Corrected | ZeroPointed,
    x: str,
    path: str,
    biases: tuple[str, ...],
    output: str,
) -> str:
    inputs = [x, f"{matrix.name}.codes", f"{matrix.name}.scales"]
    if isinstance(form, ZeroPointed):
        inputs.append(f"{matrix.name}.zero_points")
    if biases:
        bias = draft.vector(f"{matrix.name}.bias", biases)
        inputs += [""] * (5 - len(inputs)) + [bias]
    return draft.graph.node(
        "MatMulNBits",
        path,
        inputs,
        [output],
        domain=MICROSOFT,
        N=draft.rows(matrix),
        K=draft.columns(matrix),
        bits=form.bits,
        block_size=form.block,
        accuracy_level=draft.accuracy_level,
    )


def _multiply_corrected(
    draft: Draft, matrix: Matrix, form: Corrected, x: str, path: str, biases: tuple[str, ...], output: str, axes: int
) -> str:
    """A block's correction is the same for all its columns: it takes the sum of the block's part of x, in float32."""
    graph, uncorrected = draft.graph, f"{path}/uncorrected"
    _mat_mul_n_bits(draft, matrix, form, x, uncorrected, biases, uncorrected)
    x = draft.cast(f"{path}/float32", x, draft.floats, FLOAT32)
    blocks = graph.node("Reshape", f"{path}/blocks", [x, _blocks_shape(draft, matrix, form, axes)])
    sums = graph.node("ReduceSum", f"{path}/block_sums", [blocks, _last_axis(draft)], keepdims=0)
    correction = graph.node("MatMul", f"{path}/correction", [sums, f"{matrix.name}.corrections"])
    correction = draft.cast(f"{path}/correction/cast", correction, FLOAT32, draft.floats)
    return graph.node("Add", path, [uncorrected, correction], [output])


def look_up(draft: Draft, matrix: Matrix, ids: str, path: str) -> str:
    """Rows of a declared matrix: ids [batch, tokens] -> [batch, tokens, columns]."""
    match matrix.form:
        case DenseFloat():
            return draft.graph.node("Gather", path, [f"{matrix.name}.weight", ids], axis=0)
        case Symmetric() as form:
            return _gather_blocks(draft, matrix, form, ids, path)
        case Corrected() as form:
            uncorrected = _gather_blocks(draft, matrix, form, ids, f"{path}/uncorrected")
            correction = _gathered_corrections(draft, matrix, ids, path)
            return _add_to_blocks(draft, matrix, form, uncorrected, correction, path)
        case ZeroPointed() as form:
            uncorrected = _gather_blocks(draft, matrix, form, ids, f"{path}/uncorrected")
            correction = _gathered_zeros(draft, matrix, form, ids, path)
            return _add_to_blocks(draft, matrix, form, uncorrected, correction, path)
    raise ValueError(f"no operator looks up rows of {matrix.name!r}, which is stored as {matrix.form.label}")


def _gather_blocks(draft: Draft, matrix: Matrix, form: Symmetric | Corrected | ZeroPointed, ids: str, path: str) -> str:
    """(code - half) * scale. The operator wants rows of bytes, not of blocks: the same bytes in another shape."""
    shape = (draft.rows(matrix), draft.columns(matrix) * form.bits // 8)
    table = draft.graph.weight(View(f"{matrix.name}.table", f"{matrix.name}.codes", shape))
    return draft.graph.node(
        "GatherBlockQuantized",
        path,
        [table, ids, f"{matrix.name}.scales"],
        domain=MICROSOFT,
        bits=form.bits,
        block_size=form.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _gathered_corrections(draft: Draft, matrix: Matrix, ids: str, path: str) -> str:
    """[batch, tokens, blocks] out of corrections [blocks, rows], which lie so for the product of a tied head."""
    graph = draft.graph
    columns = graph.node("Gather", f"{path}/corrections", [f"{matrix.name}.corrections", ids], axis=1)
    correction = graph.node("Transpose", f"{path}/correction", [columns], perm=[1, 2, 0])
    return draft.cast(f"{path}/correction/cast", correction, FLOAT32, draft.floats)


def _gathered_zeros(draft: Draft, matrix: Matrix, form: ZeroPointed, ids: str, path: str) -> str:
    """(half - zero point) * scale [batch, tokens, blocks]: GatherBlockQuantized knows no float zero points."""
    graph = draft.graph
    half = graph.constant(f"half_of_{form.bits}_bits", np.array(1 << (form.bits - 1), form.floats))
    zeros = graph.node("Gather", f"{path}/zero_points", [f"{matrix.name}.zero_points", ids], axis=0)
    scales = graph.node("Gather", f"{path}/scales", [f"{matrix.name}.scales", ids], axis=0)
    distance = graph.node("Sub", f"{path}/distance", [half, zeros])
    return graph.node("Mul", f"{path}/correction", [distance, scales])


def _add_to_blocks(
    draft: Draft, matrix: Matrix, form: Corrected | ZeroPointed, rows: str, correction: str, path: str
) -> str:
    """rows [batch, tokens, columns] plus one number [batch, tokens, blocks] for all columns of a block."""
    graph, columns = draft.graph, draft.columns(matrix)
    whole = graph.constant(f"rows_of_{columns}", np.array([0, 0, columns], np.int64))
    blocks = graph.node("Reshape", f"{path}/blocks", [rows, _blocks_shape(draft, matrix, form, axes=3)])
    each = graph.node("Unsqueeze", f"{path}/correction/each", [correction, _last_axis(draft)])
    corrected = graph.node("Add", f"{path}/corrected", [blocks, each])
    return graph.node("Reshape", path, [corrected, whole])


def _blocks_shape(draft: Draft, matrix: Matrix, form: Corrected | ZeroPointed, axes: int) -> str:
    """Shape that cuts the last of so many axes into blocks."""
    blocks = draft.columns(matrix) // form.block
    shape = np.array([0] * (axes - 1) + [blocks, form.block], np.int64)
    return draft.graph.constant(f"{blocks}_blocks_of_{form.block}_in_{axes}_axes", shape)


def _last_axis(draft: Draft) -> str:
    return draft.graph.constant("last_axis", np.array([-1], np.int64))
