"""One export, start to end: read, write tensor by tensor, verify, publish.

Memory: one matrix at a time; the source is memory-mapped. Does not know block formats or operators.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from tqdm import tqdm

from core.errors import ReleaseError
from core.manifest import (
    FORMAT,
    GRAPH_ABI,
    MANIFEST_NAME,
    KvShape,
    Manifest,
    ReleaseFile,
    Source,
    decode_manifest,
    encode_manifest,
    release_name,
)
from export import EXPORTER_VERSION, layouts
from export.claims import weights_claim
from export.gguf import GgufFile, file_sha256, read_matrix
from export.graph_llama import GRAPH_NAME, build_graph
from export.llama_spec import FAMILY, LlamaSpec, read_spec
from export.onnx_graph import GraphBuilder, Matrix, Table, Vector, View
from export.recipes import Recipe
from export.tokenizer import Speech, read_speech
from export.verify import Invariance, WrittenRelease, check_weights, measure_invariance
from export.writer import HashingFile, check_target, matches, staged, write_file

GRAPH_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class Order:
    """What is to be exported. force: even if the release is there already."""

    source: Path
    out: Path
    model: str
    recipe: Recipe
    force: bool = False


@dataclass(frozen=True)
class Outcome:
    """What lies in the release's folder now; fresh: this export wrote it, else it was there already."""

    manifest: Manifest
    fresh: bool


def export(order: Order) -> Outcome:
    """Export one model.

    A release that is there already, whole and made from the same bytes in the same way, is left as it is.
    Raises SourceError, TargetError, or ReleaseError for a bad model name; then `order.out` is as it was.
    """
    release_name(order.model, "0" * 12)
    check_target(order.out)
    sha256 = file_sha256(order.source)
    present = None if order.force else _already_there(order, sha256)
    if present is not None:
        return Outcome(present, fresh=False)
    source = GgufFile(order.source)
    spec = read_spec(source.metadata, source.tensors)
    speech = read_speech(source.metadata)
    with staged(order.out) as folder:
        manifest = _write_release(order, source, sha256, spec, speech, folder)
    return Outcome(manifest, fresh=True)


def release_digest(source_sha256: str, tokenizer_json: bytes, chat_template: str, context_tokens: int) -> str:
    """What makes two variants one release: weights, tokenizer, template, maximum context. Recipes do not count."""
    identity = {
        "source_sha256": source_sha256,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "template_sha256": hashlib.sha256(chat_template.encode()).hexdigest(),
        "context_tokens": context_tokens,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _already_there(order: Order, sha256: str) -> Manifest | None:
    """The manifest in `order.out` if that release is what this export would write, byte by byte intact."""
    path = order.out / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
    except ReleaseError:
        return None  # of another format or damaged: this export replaces it
    wanted = (order.model, order.recipe, EXPORTER_VERSION, sha256)
    found = (manifest.model, manifest.variant, manifest.exporter_version, manifest.source.sha256)
    intact = wanted == found and all(matches(order.out, file) for file in manifest.files)
    return manifest if intact else None


def _write_release(
    order: Order, source: GgufFile, sha256: str, spec: LlamaSpec, speech: Speech, folder: Path
) -> Manifest:
    """Write, check and describe the release in `folder`; the manifest comes last."""
    digest = release_digest(sha256, speech.tokenizer_json, speech.chat_template, spec.context_tokens)
    release = release_name(order.model, digest)
    graph = build_graph(spec, order.recipe)
    initializers, data_file = _write_weights(graph, order.recipe, source, folder)
    properties = {
        "recipe": order.recipe.value,
        "release": release,
        "source_sha256": sha256,
        "exporter_version": EXPORTER_VERSION,
        "graph_abi": str(GRAPH_ABI),
    }
    model = graph.build(GRAPH_NAME, initializers, properties)
    files = [
        write_file(folder, GRAPH_FILE, model.SerializeToString(deterministic=True)),
        data_file,
        write_file(folder, TOKENIZER_FILE, speech.tokenizer_json),
        write_file(folder, TEMPLATE_FILE, speech.chat_template.encode()),
    ]
    written = WrittenRelease.open(folder, GRAPH_FILE)
    check_weights(written, graph.weights, order.recipe, source)
    invariance = measure_invariance(written, spec)
    manifest = Manifest(
        format=FORMAT,
        graph_abi=GRAPH_ABI,
        model=order.model,
        release=release,
        variant=order.recipe,
        family=FAMILY,
        exporter_version=EXPORTER_VERSION,
        source=Source(order.source.name, sha256, FAMILY),
        context_tokens=spec.context_tokens,
        vocab_size=spec.vocab,
        tokenizer_size=speech.size,
        kv=KvShape(spec.layers, spec.kv_heads, spec.head_dim, "float32"),
        stop_ids=list(speech.stop_ids),
        bos_id=speech.bos_id,
        batch_invariant=invariance.chunks and invariance.batches,
        speech="chat_template",
        graph=GRAPH_FILE,
        tokenizer=TOKENIZER_FILE,
        chat_template=TEMPLATE_FILE,
        files=files,
        claims=_claims(order.recipe, invariance),
    )
    write_file(folder, MANIFEST_NAME, encode_manifest(manifest))
    return manifest


def _claims(recipe: Recipe, invariance: Invariance) -> dict[str, str]:
    """What was checked on this very release before it was published."""
    how = {True: "bit-identical", False: "not bit-identical"}
    return {
        "weights": weights_claim(recipe),
        "chunks": f"{how[invariance.chunks]} for all chunk lengths tried, from 2 tokens up, on the exporting machine",
        "batches": f"{how[invariance.batches]} for decode batches of 1 and 8 on the exporting machine",
    }


def _write_weights(
    graph: GraphBuilder, recipe: Recipe, source: GgufFile, folder: Path
) -> tuple[list[TensorProto], ReleaseFile]:
    """Write all declared weights into the data file; returns their initialisers and the file's description."""
    places: dict[str, TensorProto] = {}
    total_bytes = sum(source.size_bytes(name) for name in source.tensors)
    with (
        HashingFile(folder / DATA_FILE) as file,
        tqdm(total=total_bytes, unit="B", unit_scale=True, desc="export", disable=None) as bar,
    ):
        for weight in graph.weights:
            bar.set_postfix_str(weight.name, refresh=False)
            if isinstance(weight, View):
                places[weight.name] = _view(weight, places[weight.of])
                continue
            for name, values in _arrays(weight, recipe, source).items():
                places[name] = _external(name, values, *file.append_array(values))
            bar.update(sum(source.size_bytes(tensor) for tensor in weight.tensors))
    return list(places.values()), file.describe()


def _arrays(weight: Matrix | Vector | Table, recipe: Recipe, source: GgufFile) -> dict[str, NDArray[Any]]:
    """The initialisers of one weight by name."""
    match weight:
        case Matrix(name=name):
            layout = layouts.lay_out(read_matrix(weight, source), layouts.layout_type(weight.block_format, recipe))
            return {f"{name}.{part}": values for part, values in layouts.arrays(layout).items()}
        case Vector(name=name, tensor=tensor):
            return {name: source.floats(tensor)}
        case Table(name=name, values=values):
            return {name: values}


def _external(name: str, values: NDArray[Any], offset: int, length: int) -> TensorProto:
    """An initialiser whose bytes lie in the data file."""
    tensor = TensorProto(name=name, dims=values.shape, data_location=TensorProto.EXTERNAL)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    for key, value in (("location", DATA_FILE), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def _view(view: View, original: TensorProto) -> TensorProto:
    """The bytes of another initialiser under another shape: the embedding and the tied head lie on disk once."""
    tensor = onnx.TensorProto()
    tensor.CopyFrom(original)
    tensor.name = view.name
    tensor.dims[:] = view.shape
    return tensor
