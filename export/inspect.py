"""`python -m export inspect`: what lies in a release's folder, as a page for people or as JSON for programs.

Reads what the release says of itself and checks nothing; that is `verify`. Does not know how releases are made.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tokenizers import Tokenizer

from core.errors import ReleaseError
from core.manifest import MANIFEST_NAME, Golden, Manifest, decode_manifest
from export.trial.quality import Quality
from export.trial.quality_report import QualityReport, TensorQuality, decode_report

WIDTH = 80
_NARROWEST = 48
_MOST_IDS = 1 << 32


class Story(msgspec.Struct, frozen=True):
    """A golden prompt as text; as its ids where `untold` says why there is no text."""

    prompt: str
    continuation: str
    min_margin: float
    made_by: str
    untold: str | None = None


@dataclass(frozen=True)
class Inspection:
    """What a release says; quality None: it has no such report."""

    manifest: Manifest
    quality: QualityReport | None
    stories: list[Story]

    def to_json(self) -> bytes:
        """All of it."""
        content = {"manifest": self.manifest, "quality": self.quality, "golden": self.stories}
        return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

    def lines(self, width: int = WIDTH) -> Iterator[str]:
        """A page of `width` columns, without anything that a terminal would obey."""
        return (printable(line) for line in self._page(max(width, _NARROWEST)))

    def _page(self, width: int) -> Iterator[str]:
        yield from textwrap.wrap(f"{self.manifest.release}  ({self.manifest.variant})", width)
        inner = width - 2
        for title, body in (
            ("", _facts(self.manifest, inner)),
            ("files", _files(self.manifest, inner)),
            ("weights", [] if self.quality is None else _weights(self.quality, inner)),
            ("quality", [] if self.quality is None else _quality(self.quality.run, inner)),
            ("claims", _table(self.manifest.claims.items(), inner)),
            ("golden prompts", _stories(self.stories, inner)),
        ):
            rows = list(body)
            if rows:
                yield from ("", title) if title else ("",)
                yield from (f"  {row}" for row in rows)


def inspect(folder: Path) -> Inspection:
    """Read a release; raises ReleaseError or TargetError for what is none."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ReleaseError(f"There is no release in {folder} (it has no {MANIFEST_NAME}); name a release's folder.")
    manifest = decode_manifest(path.read_bytes(), str(path))
    for name in (manifest.tokenizer, manifest.quality):
        if name is not None and not (folder / name).is_file():
            raise ReleaseError(f"{folder} lacks the file {name!r} that its manifest lists; export the model again.")
    quality = None
    if manifest.quality is not None:
        quality = decode_report((folder / manifest.quality).read_bytes(), str(folder / manifest.quality))
    tokenizer = _tokenizer((folder / manifest.tokenizer).read_bytes(), manifest.tokenizer)
    return Inspection(manifest, quality, [tell_story(tokenizer, golden) for golden in manifest.golden])


def printable(text: str) -> str:
    """The text with a question mark for whatever would steer a terminal: escapes, line ends, turns of direction."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _tokenizer(data: bytes, name: str) -> Tokenizer | str:
    """The tokenizer, or why there is none."""
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library has no narrower one for what it cannot parse
        return f"{name} is no tokenizer ({error})"


def tell_story(tokenizer: Tokenizer | str, golden: Golden) -> Story:
    """A golden prompt for people; the tokenizer, or why there is none."""
    untold = _untold(tokenizer, [*golden.prompt_ids, *golden.ids])
    if isinstance(tokenizer, str) or untold is not None:
        return Story(str(golden.prompt_ids), str(golden.ids), golden.min_margin, golden.made_by, untold)
    prompt, continuation = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (golden.prompt_ids, golden.ids))
    return Story(prompt, continuation, golden.min_margin, golden.made_by)


def _untold(tokenizer: Tokenizer | str, ids: list[int]) -> str | None:
    """Why these ids have no text; None: they have."""
    if isinstance(tokenizer, str):
        return tokenizer
    for token in ids:
        if not 0 <= token < _MOST_IDS or tokenizer.id_to_token(token) is None:
            return f"the tokenizer does not know the id {token}"
    return None


def _facts(manifest: Manifest, width: int) -> Iterator[str]:
    kv = manifest.kv
    cache_kb = kv.bytes_per_token / 1000
    invariant = "yes" if manifest.batch_invariant else "no, or not measured"
    yield from _table(
        [
            ("source", f"{manifest.source.name} ({manifest.source.architecture})"),
            ("source sha256", f"{manifest.source.sha256[:32]}..."),
            ("graph", f"{manifest.family}, ABI {manifest.graph_abi}, exporter {manifest.exporter_version}"),
            ("device", manifest.device),
            ("operators", ", ".join(manifest.operators) or "those of ONNX Runtime"),
            ("context", f"{manifest.context_tokens} tokens"),
            ("vocabulary", f"{manifest.vocab_size}, of which the tokenizer knows {manifest.tokenizer_size}"),
            ("cache", f"{kv.layers} layers x {kv.kv_heads} heads x {kv.head_dim}, {cache_kb:.1f} kB a token"),
            ("speech", f"{manifest.speech}, ends at {', '.join(map(str, manifest.stop_ids))}"),
            ("batch-invariant", invariant),
        ],
        width,
    )


def _files(manifest: Manifest, width: int) -> Iterator[str]:
    for file in manifest.files:
        chunks = f"{len(file.chunks)} chunk" + ("s" if len(file.chunks) != 1 else "")
        yield from _figures(file.path, f"{_size(file.size_bytes):>12} {chunks:>14}", width)


def _weights(report: QualityReport, width: int) -> Iterator[str]:
    """A line for each form, exact tensors and others apart, and what it all comes to."""
    kinds: dict[tuple[str, bool], list[TensorQuality]] = {}
    for tensor in report.tensors.values():
        kinds.setdefault((tensor.form, tensor.exact), []).append(tensor)
    for (form, exact), tensors in kinds.items():
        weights = sum(tensor.weights for tensor in tensors)
        how = "exact" if exact else f"error {max(tensor.relative_rms for tensor in tensors):.2g}"
        yield from _figures(form, f"{len(tensors):>5} tensors {weights / 1e6:>8.1f} M {how:>13}", width)
    totals = report.totals
    yield f"together {_size(totals.bytes)}, {totals.ratio:.1%} of {_size(totals.fp32_bytes)} in float32"


def _quality(run: Quality | str, width: int) -> Iterator[str]:
    if isinstance(run, str):
        yield from textwrap.wrap(run, width)
        return
    score, rows = run.score, []
    rows.append(("perplexity", f"{score.perplexity:.3f} over {score.positions} tokens of {run.text}"))
    if score.distance is None:
        rows.append(("compared with", f"nothing: {run.reference}"))
    else:
        distance = score.distance
        rows.append(("compared with", f"{run.reference}: perplexity {distance.perplexity:.3f}"))
        rows.append(("KL divergence", f"{distance.kl_divergence:.2g} nats a token"))
        rows.append(("same best token", f"{distance.top1_agreement:.1%}"))
    rows.append(("made by", run.made_by))
    yield from _table(rows, width)


def _stories(stories: list[Story], width: int) -> Iterator[str]:
    for story in stories:
        prompt, continuation = story.prompt, story.continuation
        if story.untold is None:
            prompt, continuation = repr(prompt), repr(continuation)
        yield from textwrap.wrap(prompt, width, max_lines=3, placeholder=" ...")
        yield from textwrap.wrap(continuation, width, initial_indent="-> ", subsequent_indent="   ")
        yield f"   smallest margin {story.min_margin:.3g}"
        if story.untold is not None:
            why = f"shown as ids: {story.untold}"
            yield from textwrap.wrap(why, width, initial_indent="   ", subsequent_indent="   ")


def _table(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    """Names in one column, words in another, wrapped."""
    for name, words in rows:
        yield from textwrap.wrap(f"{name:<15} {words}", width, subsequent_indent=" " * 16)


def _figures(name: str, figures: str, width: int) -> Iterator[str]:
    """A name on the left and figures on the right, below each other where they do not fit."""
    room = width - len(figures) - 1
    if len(name) <= room:
        yield f"{name:<{room}} {figures}"
    else:
        yield from textwrap.wrap(name, width)
        yield f"{figures:>{width}}"


def _size(size_bytes: int) -> str:
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes / 1e3:.1f} kB"
