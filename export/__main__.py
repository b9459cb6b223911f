"""`python -m export`: the command line."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from core.errors import EdgechatError
from export.recipes import Recipe

_EPILOG = """
example:
  scripts/get-model                                  # fetches .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
  python -m export .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf --out releases/smollm2-135m

recipes:
{recipes}

The folder holds model.onnx, model.onnx.data, tokenizer.json, chat_template.jinja and manifest.json, which lists the
others with their sha256 and says what was checked. It appears whole or not at all; a release that was there before is
replaced only by a whole new one. A release that is up to date is left alone. Exit codes: 0 done, 1 refused, 2 usage.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one export; returns the exit code."""
    options = _parser().parse_args(arguments)
    out: Path = options.out
    started_s = time.monotonic()
    try:
        # Imported here, so that --help and usage errors do not wait for numpy, onnx and onnxruntime.
        from export.build import Order, export

        outcome = export(Order(options.gguf, out, options.model or out.resolve().name, options.recipe, options.force))
    except EdgechatError as error:
        print(f"export: {error.message}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"export: {error.name} is not installed; pip install 'edgechat[export,edge-cpu]'.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"export: interrupted; {out} is as it was.", file=sys.stderr)
        return 130
    manifest = outcome.manifest
    if not manifest.batch_invariant:
        print("export: note: this variant is not batch-invariant (see claims in manifest.json).", file=sys.stderr)
    size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
    how = (
        f"written in {time.monotonic() - started_s:.1f} s"
        if outcome.fresh
        else "was there already (--force writes it again)"
    )
    print(f"{manifest.release} ({manifest.variant}, {size_mb:.0f} MB) in {out}: {how}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    recipes = "\n".join(f"  {recipe:<12} {recipe.purpose}" for recipe in Recipe)
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Turn a quantised GGUF checkpoint into an ONNX release that a node can serve, without loss.",
        epilog=_EPILOG.format(recipes=recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gguf", type=Path, help="llama-family checkpoint of Q4_1 and Q8_0 tensors")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the release's folder")
    parser.add_argument("--model", metavar="NAME", help="the alias that clients will name (default: the folder's name)")
    parser.add_argument(
        "--recipe",
        choices=list(Recipe),
        type=Recipe,
        default=Recipe.GGUF_EXACT,
        help="how weights are carried over (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="export even if the release is there and up to date")
    return parser


if __name__ == "__main__":
    sys.exit(main())
