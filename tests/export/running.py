"""The exporter as a process of its own, with an accident planted in it, and what may lie in a folder afterwards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from core.manifest import MANIFEST_NAME, Manifest, decode_manifest
from export.release.writer import matches

ROOT = Path(__file__).resolve().parents[2]


def run_with(prelude: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process after `prelude`, Python code that plants an accident."""
    code = (
        f"import os, resource, signal, sys\n{prelude}\nfrom export.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )


def stopped_after(written_bytes: int, signal_name: str) -> str:
    """The process sends itself a signal when so many bytes of the data file are written, the last piece in part."""
    return f"""
import export.release.writer
write = export.release.writer.DataFile._write
left = {written_bytes}
def write_some(file, data):
    global left
    if left < len(data):
        write(file, data[:left])
        data, left = data[left:], 1 << 60
        os.kill(os.getpid(), signal.{signal_name})
    left -= len(data)
    write(file, data)
export.release.writer.DataFile._write = write_some
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has inherited SIG_IGN
"""


def manifest_in(release: Path) -> Manifest:
    """What a release says of itself."""
    return decode_manifest((release / MANIFEST_NAME).read_bytes(), str(release))


def is_whole(release: Path) -> bool:
    """Whether every file that a release lists is there, byte by byte."""
    return all(matches(release, file) for file in manifest_in(release).files)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
