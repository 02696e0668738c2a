"""Snapshots of the Hugging Face hub. Its token, endpoint and offline switch come from its own environment variables."""

import shutil
from dataclasses import replace
from pathlib import Path

import httpx2  # the client of huggingface_hub 2, whose errors it lets through
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from graftline.address import Source, mask_secrets
from graftline.data.sources.arrival import Arrived
from graftline.data.sources.local import digest_of
from graftline.errors import SourceError, SourceUnavailableError
from graftline.progress import OnProgress
from graftline.retry import may_pass

LEFT_OUT = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.h5", "*.msgpack", "*.py")
"""Files that could run code when they are read, or that hold the same weights again."""

_FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError)


def pin(source: Source) -> Source:
    """The same source at the commit that its branch or tag points to now.

    Raises:
        SourceError: no such repository or revision, no right to read it, or unreachable.
    """
    repository, kind = _repository(source)
    try:
        info = HfApi().repo_info(repository, revision=source.version, repo_type=kind)
    except _FAILURES as error:
        raise _explained(source, error) from error
    return replace(source, version=info.sha)


def download(source: Source, folder: Path, on_progress: OnProgress) -> Arrived:
    """Download a snapshot into ``folder``; files of `LEFT_OUT` are not taken.

    Raises:
        SourceError: as in `pin`.
    """
    repository, kind = _repository(source)
    try:
        snapshot_download(
            repository,
            repo_type=kind,
            revision=source.version,
            local_dir=folder,
            ignore_patterns=list(LEFT_OUT),
            tqdm_class=None,
        )
    except _FAILURES as error:
        raise _explained(source, error) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own book-keeping
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    on_progress(num_bytes, num_bytes)
    return Arrived(folder, digest_of(folder))


def _repository(source: Source) -> tuple[str, str]:
    if source.name.startswith("datasets/"):
        return source.name.removeprefix("datasets/"), "dataset"
    return source.name, "model"


def _explained(source: Source, error: Exception) -> SourceError:
    if isinstance(error, GatedRepoError):
        return SourceError(f"{source} is gated; accept its terms on its page and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{source}: there is no revision {source.version!r}; expected a commit, tag or branch")
    if isinstance(error, RepositoryNotFoundError):
        return SourceError(f"{source}: there is no such repository, or it is private; check the name, or set HF_TOKEN")
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    passing = isinstance(error, httpx2.TransportError) or may_pass(status)
    reason = mask_secrets(" ".join(str(error).split())[:300])
    kind = SourceUnavailableError if passing else SourceError
    return kind(f"{source} could not be fetched: {type(error).__name__}: {reason}; check the network")
