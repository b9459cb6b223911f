"""Models on the Hugging Face hub: only the files that the exporter reads, into the hub library's own cache.

The library (huggingface_hub 2.4) keeps whole files between runs but throws a broken-off one away, and a shard has
gigabytes. So weights are fetched here, into a file that a later run goes on with, and put where the library looks for
them first. Cache layout: huggingface.co/docs/huggingface_hub, "Understand caching". Does not know what files mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, get_hf_file_metadata, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get

from export.errors import SourceError
from export.sources.safetensors_files import INDEX, SINGLE, read_index

#: By name, because repositories hold other forms of the same weights (original/, metal/, .bin, .gguf, consolidated).
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX,
)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class NotOnHub(SourceError):
    """The hub has no such model or cannot be asked: the name may have been meant for a folder."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub; sha256 None: left to the library, which fetches it in one go."""

    name: str
    url: str
    size_bytes: int
    sha256: str | None


def download(repo_id: str, revision: str | None = None) -> Path:
    """A folder with the model's files, fetched as far as they are not in the cache; raises SourceError.

    revision: branch, tag or commit, None: the main branch. Works offline when everything is in the cache.
    """
    with _explained(repo_id, revision):
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(SMALL_FILES)))
        names = list(read_index(folder / INDEX)) if (folder / INDEX).exists() else [SINGLE]
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            # The folder is called after the commit: whatever the branch does meanwhile, all files are of one state.
            _fetch_weights(repo_id, folder.name, missing, folder.parent.parent / "blobs")
            snapshot_download(repo_id, revision=folder.name, allow_patterns=[*SMALL_FILES, *names])
        return folder


def _fetch_weights(repo_id: str, commit: str, names: list[str], blobs: Path) -> None:
    files = [_look_up(repo_id, commit, name) for name in names]
    blobs.mkdir(parents=True, exist_ok=True)
    _refuse_full_disk(files, blobs)
    for file in files:
        if file.sha256 is not None and not (blobs / file.sha256).exists():
            _fetch(file, file.sha256, blobs)


def _look_up(repo_id: str, commit: str, name: str) -> RemoteFile:
    url = hf_hub_url(repo_id, name, revision=commit)
    found = get_hf_file_metadata(url)
    size, digest = found.size or 0, found.etag or ""
    # The tag of what is not kept in git is its digest. Larger files have no plain address, only the library's own way.
    resumable = _SHA256.fullmatch(digest) and 0 < size <= constants.MAX_HTTP_DOWNLOAD_SIZE
    return RemoteFile(name, url, size, digest if resumable else None)


def _refuse_full_disk(files: list[RemoteFile], blobs: Path) -> None:
    here = sum(part.stat().st_size for file in files for part in blobs.glob(f"{file.sha256}*"))
    needed, free = sum(file.size_bytes for file in files) - here, shutil.disk_usage(blobs).free
    if needed > free:
        raise SourceError(
            f"The model needs {needed / 1e9:.1f} GB more in {blobs}, where {free / 1e9:.1f} GB are free; make room, or "
            "set HF_HOME to a folder on another disk."
        )


def _fetch(file: RemoteFile, sha256: str, blobs: Path) -> None:
    """Go on with what an earlier run left, check the whole, and give it its name."""
    part = blobs / f"{sha256}.resumable.incomplete"
    with part.open("ab") as target:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(f"{file.name} is being fetched into {blobs} by another export; wait for it.") from error
        if target.tell() > file.size_bytes:
            target.truncate(0)
            target.seek(0)
        http_get(
            file.url,
            target,
            resume_size=target.tell(),
            headers=_headers(),
            expected_size=file.size_bytes,
            displayed_filename=file.name,
        )
        target.flush()
        os.fsync(target.fileno())
        with part.open("rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        if found != sha256:
            part.unlink()
            raise SourceError(f"{file.name} did not arrive as the hub has it (sha256 {found}); run the command again.")
        part.replace(blobs / sha256)


def _headers() -> dict[str, str]:
    """Not compressed: a range is of the bytes as they are stored."""
    token = get_token()
    return {"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {})


@contextmanager
def _explained(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn whatever the library raises into one sentence that says what to do."""
    hub = constants.ENDPOINT
    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{repo_id} is gated: accept its terms on {hub}/{repo_id} and set HF_TOKEN to a token of that account, or "
            "name a local folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise NotOnHub(
            f"There is no model {repo_id} on {hub}, nor a file or folder of that name here; check the name, or set "
            "HF_TOKEN if the model is private."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{repo_id} on {hub} has no revision {revision!r}; name a branch, tag or commit.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx2.ConnectError, httpx2.ConnectTimeout) as error:
        raise NotOnHub(
            f"{hub} cannot be reached and {repo_id} is not in the cache ({constants.HF_HUB_CACHE}); connect, set "
            "HF_ENDPOINT to a mirror, or name a local folder."
        ) from error
    except EntryNotFoundError as error:
        raise SourceError(
            f"{repo_id} on {hub} has neither {SINGLE} nor {INDEX}; choose a repository with the model in safetensors, "
            "or fetch its .gguf file and name that."
        ) from error
    except HFValidationError as error:
        raise SourceError(f"{repo_id!r} is no name of a model; it is organisation/name, as on {hub}.") from error
    except HfHubHTTPError as error:
        raise SourceError(
            f"{hub} answered {error.response.status_code} when {repo_id} was fetched; try again later (it goes on "
            "where it stopped), check HF_TOKEN, or set HF_ENDPOINT to a mirror."
        ) from error
    except httpx2.HTTPError as error:
        raise SourceError(
            f"The connection to {hub} broke off ({type(error).__name__}) while {repo_id} was fetched; run the command "
            "again, it goes on where it stopped."
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "make room, or set HF_HOME to a folder on another disk" if full else "run the command again"
        raise SourceError(f"{repo_id} cannot be stored in {constants.HF_HUB_CACHE} ({error}); {advice}.") from error
