"""The digest of a checkpoint's tensors, whatever files they lie in: what makes two releases the same.

A tree. Leaves: sha256 of each PIECE_BYTES of an extent. A tensor's digest: sha256 of its leaves, one after the other.
The root: sha256 of a line of JSON for each tensor, [name, kind, shape, digest], sorted by name. Splitting a checkpoint
into other shards changes nothing; one bit of a weight does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from export.errors import SourceError
from export.sources.checkpoint import Checkpoint, Extent
from export.spec import TensorInfo

PIECE_BYTES = 8 << 20


def tensor_digest(extents: Iterable[Extent]) -> str:
    """Digest of one tensor; raises SourceError if its bytes cannot be read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PIECE_BYTES))
    for extent in extents:
        try:
            with extent.path.open("rb") as file:
                file.seek(extent.offset)
                left = extent.size_bytes
                while left:
                    piece = buffer[: file.readinto(buffer[: min(left, PIECE_BYTES)])]
                    if not piece:
                        raise SourceError(f"{extent.path} became shorter while it was read; export it again.")
                    digest.update(hashlib.sha256(piece).digest())
                    left -= len(piece)
        except OSError as error:
            raise SourceError(f"{extent.path} cannot be read ({error.strerror or error}); mend that first.") from error
    return digest.hexdigest()


def root_digest(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> str:
    """Digest of all tensors out of the digest of each."""
    root = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        root.update(json.dumps([name, tensor.kind.value, tensor.shape, digests[name]]).encode() + b"\n")
    return root.hexdigest()


class SourceDigest:
    """Digests of a checkpoint's tensors, made by one helper thread while others read the same bytes; `with` it."""

    def __init__(self, checkpoint: Checkpoint, known: Mapping[str, str] | None = None) -> None:
        self._checkpoint = checkpoint
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="source-digest")
        self._digests: dict[str, Future[str]] = {}
        for name, digest in (known or {}).items():
            self._digests[name] = Future()
            self._digests[name].set_result(digest)

    def __enter__(self) -> SourceDigest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._helper.shutdown(cancel_futures=True)

    def begin(self, names: Iterable[str]) -> None:
        """Start on some tensors, whose bytes are about to be read."""
        for name in names:
            if name not in self._digests:
                self._digests[name] = self._helper.submit(tensor_digest, self._checkpoint.extents(name))

    def of(self, name: str) -> str:
        """The digest of a tensor; waits for it. Raises SourceError if its bytes cannot be read."""
        self.begin([name])
        return self._digests[name].result()

    def root(self) -> str:
        """The digest of them all; starts on those that nobody asked for."""
        self.begin(self._checkpoint.tensors)
        return root_digest(self._checkpoint.tensors, {name: self.of(name) for name in self._checkpoint.tensors})
