"""`python -m export`: the command line. Exit codes: 0 done, 2 refused, 130 interrupted; 1 would be a bug."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from core.errors import EdgechatError, ReleaseError
from core.manifest import Manifest, release_name
from export.errors import TargetError
from export.recipes import Dense, Recipe

REFUSED = 2
INTERRUPTED = 130
UNREAD = 141  # what a shell reports for a command whose reader went away

_AUTO = "auto"
_LONG_WORD = re.compile(r"(\S{120})\S{80,}(\S{60})")
_WIDTH = 80  # where no terminal tells its own

_DESCRIPTION = """\
Turn a checkpoint into an ONNX release that a node can serve. What is quantised in the checkpoint is carried over as it
is, floats are quantised as the recipe says, and every weight is compared with its source on the way. Reads a few rows
at a time: a checkpoint of any size takes less than 2 GB of memory.

  python -m export SOURCE --out FOLDER     export
  python -m export verify RELEASE          check a release (export verify --help)
  python -m export inspect RELEASE         tell what a release holds (export inspect --help)
"""

_EPILOG = """\
examples:
  python -m export openai/gpt-oss-20b --recipe cuda-int8 --out releases/gpt-oss-20b
  python -m export ./gpt-oss-20b --recipe cpu-int4 --out releases/gpt-oss-20b-cpu
  python -m export ./some-llama-or-qwen2-folder --recipe cpu-int8 --dense exact --out releases/some-llama
  scripts/get-model                                  # fetches .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m export .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf --out releases/smollm2-135m

recipes:
  auto         what suits the checkpoint and this machine; says what it took and why
{recipes}

The folder holds model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja if the model has one, quality.json and
manifest.json, which lists the others with their sha256 and says what was checked. It appears whole or not at all; a
release that was there before is replaced only by a whole new one. A release that is up to date is left alone. After a
kill or Ctrl-C the same command with --resume continues.

exit codes: 0 done, 2 refused (one sentence says why and what to do), 130 interrupted
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM ends an export as Ctrl-C does."""


class Unread(Exception):
    """Whoever read the output has gone, as `head` does when it has enough."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    _escape_what_cannot_be_encoded()
    try:
        return _run(words)
    except Unread:
        return UNREAD
    except EdgechatError as error:
        _complain(error.message)
        return REFUSED
    except ModuleNotFoundError as error:
        _complain(f"{error.name} is not installed; pip install 'edgechat[export,edge-cpu]'.")
        return REFUSED
    except OSError as error:
        what = "A file" if error.filename is None else os.fsdecode(error.filename)
        _complain(
            f"{what} cannot be read ({error.strerror or error}); check that it is sound and that you may read it."
        )
        return REFUSED
    except KeyboardInterrupt:
        _complain("interrupted.")
        return INTERRUPTED


def _run(words: list[str]) -> int:
    try:
        match words:
            case ["verify", *rest]:
                return _verify(_verify_parser().parse_args(rest))
            case ["inspect", *rest]:
                return _inspect(_inspect_parser().parse_args(rest))
            case _:
                return _export(_export_parser().parse_args(words))
    except SystemExit:
        with _written_out():  # --help is still in the buffer
            raise


# What computes is imported where it is used, so that --help and usage errors do not wait for numpy and onnx.


def _export(options: argparse.Namespace) -> int:
    from export.build import Order, export
    from export.release.writer import staging_of

    out: Path = options.out
    order = Order(
        source=options.source,
        out=out,
        model=_model_name(options.model, out),
        recipe=None if options.recipe == _AUTO else Recipe(options.recipe),
        dense=options.dense,
        force=options.force,
        resume=options.resume,
        run=options.run,
    )
    started_s = time.monotonic()
    try:
        with _ended_by_sigterm():
            outcome = export(order, _tell)
    except KeyboardInterrupt:
        go_on = "; the same command with --resume continues" if staging_of(out).journal.exists() else ""
        _complain(f"interrupted, {out} is as it was{go_on}.")
        return INTERRUPTED
    manifest = outcome.manifest
    if outcome.fresh:
        _warn(manifest)
        how = f"written in {time.monotonic() - started_s:.1f} s"
    else:
        how = "was there already (--force writes it again)"
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    _say(f"{manifest.release} ({manifest.variant}, {size_mb:.0f} MB) in {out}: {how}.")
    return 0


def _model_name(asked: str | None, out: Path) -> str:
    """The alias that clients will name; raises ReleaseError for a folder whose name cannot be one."""
    if asked is not None:
        return asked
    name = out.resolve().name
    try:
        release_name(name, "0" * 12)
    except ReleaseError as error:
        raise ReleaseError(
            f"{error.message.removesuffix('.')}; it is the name of the folder, --model NAME chooses another."
        ) from error
    return name


def _verify(options: argparse.Namespace) -> int:
    from export.checks.report import Check
    from export.checks.verify import verify

    def seen(check: Check) -> None:
        if not options.json:
            _say(check.line())

    with _ended_by_sigterm():  # what it runs in lies in a temporary folder
        report = verify(options.release, options.reference, seen)
    if options.json:
        _hand_over(report.to_json())
    else:
        _say(report.summary())
    return 0 if report.ok else REFUSED


def _inspect(options: argparse.Namespace) -> int:
    from export.inspect import inspect

    inspection = inspect(options.release)
    if options.json:
        _hand_over(inspection.to_json())
    else:
        for line in inspection.lines(shutil.get_terminal_size((_WIDTH, 0)).columns):
            _say(line)
    return 0


def _tell(line: str) -> None:
    _complain(f"{line}.")


def _say(line: str) -> None:
    """A line of what was asked for."""
    with _written_out():
        print(line)


def _hand_over(data: bytes) -> None:
    """What was asked for, for a program."""
    with _written_out():
        sys.stdout.buffer.write(data)


def _complain(line: str) -> None:
    """A line beside what was asked for. Where it cannot be written nobody can be told so, and the work goes on."""
    try:
        print(f"export: {_shortened(line)}", file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def _shortened(line: str) -> str:
    """The line with the middle left out of every word that fills the screen, as a path may."""
    return _LONG_WORD.sub(r"\1...\2", line)


@contextmanager
def _written_out() -> Iterator[None]:
    """Flush stdout after the block; raises Unread if nobody reads it, TargetError if it cannot be written."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        _silence(sys.stdout)
        raise Unread from error
    except OSError as error:
        _silence(sys.stdout)
        raise TargetError(f"The output cannot be written ({error.strerror}); send it somewhere else.") from error


def _silence(stream: TextIO) -> None:
    """Drop what is left in the buffer: the interpreter would try it again at its end, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _escape_what_cannot_be_encoded() -> None:
    """A golden prompt may be in any script, a terminal in ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _warn(manifest: Manifest) -> None:
    """Say what a node will not do as well as it might."""
    claim = manifest.claims["batches"]
    if manifest.operators:
        _tell(f"note: a node needs an operator that ONNX Runtime does not have: {', '.join(manifest.operators)}")
    if not manifest.batch_invariant:
        _tell(f"note: this variant is not known to be batch-invariant ({claim})")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM within the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _export_parser() -> argparse.ArgumentParser:
    recipes = "\n".join(f"  {recipe:<12} {recipe.purpose}" for recipe in Recipe)
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description=_DESCRIPTION,
        epilog=_EPILOG.format(recipes=recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a GGUF file, a folder with config.json and safetensors, or a model on the hub")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the release's folder")
    parser.add_argument("--model", metavar="NAME", help="the alias that clients will name (default: the folder's name)")
    parser.add_argument(
        "--recipe",
        choices=[_AUTO, *Recipe],
        default=_AUTO,
        metavar="RECIPE",
        help="how weights are carried over (default: %(default)s)",
    )
    parser.add_argument(
        "--dense",
        choices=list(Dense),
        type=Dense,
        default=Dense.INT8,
        help="what becomes of float matrices beside the bulk: embedding, head, attention of a model with experts "
        "(default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="continue an export that was killed or interrupted")
    parser.add_argument("--force", action="store_true", help="export even if the release is there and up to date")
    parser.add_argument(
        "--no-run",
        dest="run",
        action="store_false",
        help="do not run the release: nothing is known of its quality, there are no golden prompts",
    )
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export verify",
        description="Check a release: its files against the manifest, its golden prompts on this machine, and with\n"
        "--reference every weight against the checkpoint.",
        epilog="example:\n  python -m export verify releases/gpt-oss-20b --reference openai/gpt-oss-20b\n\n"
        "exit codes: 0 sound, 2 broken or no release, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_release(parser)
    parser.add_argument("--reference", metavar="SOURCE", help="the checkpoint that the release was made from")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export inspect",
        description="Tell what a release holds: sizes against float32, recipe, quality, golden prompts.",
        epilog="example:\n  python -m export inspect releases/smollm2-135m",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_release(parser)
    return parser


def _add_release(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("release", type=Path, help="a release's folder")
    parser.add_argument("--json", action="store_true", help="for programs")


if __name__ == "__main__":
    sys.exit(main())
