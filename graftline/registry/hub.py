"""A release on the Hugging Face Hub: one commit with exactly its files, under a tag with its version.

Token, endpoint and offline mode come from the hub's own environment variables (``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``), or from `hf auth login`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import httpx2  # HTTP client of huggingface_hub 2, which does not wrap its errors
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from graftline.address import mask_secrets
from graftline.errors import ReleaseError, StoreError, StoreUnavailableError
from graftline.release.manifest import Manifest
from graftline.retry import may_pass

_REPOSITORY = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?", re.ASCII)
"""As huggingface_hub checks names itself."""
_FAILURES = (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError)


@dataclass(frozen=True)
class Published:
    """Where a release is on the hub."""

    repository: str
    commit: str
    is_new: bool
    """Whether this call put it there."""
    was_created: bool = False
    """Whether this call made the repository, which is private then."""


def check_repository(repository: str) -> str:
    """Return the name of a repository; ReleaseError if the hub cannot have it."""
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 96:
        raise ReleaseError(
            f"repository {repository!r} was given; expected ORG/NAME of letters, digits, '-', '_' and '.', such as "
            "example-org/wordnet-category"
        )
    return repository


def publish_to_hub(folder: Path, manifest: Manifest, repository: str) -> Published:
    """Make a verified release's folder the content of a repository, and tag it with the version.

    A repository that does not exist is made, and is private. A second call finishes what an interrupted one began, or
    finds it done. Files of earlier releases are removed from the branch; their tags keep them.

    Raises:
        ReleaseError: the repository's name is wrong.
        StoreError: the hub refuses it.
        StoreUnavailableError: the hub does not answer.
    """
    api = HfApi()
    check_repository(repository)
    try:
        was_created = not api.repo_exists(repository)
        if was_created:
            api.create_repo(repository, private=True, exist_ok=True)
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repository).tags}
        if (commit := tags.get(manifest.version)) is not None:
            return Published(repository, commit, is_new=False)
        made = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            delete_patterns="*",
            commit_message=f"{manifest.pipeline} {manifest.version}",
            commit_description=f"manifest {manifest.digest}",
        )
        api.create_tag(repository, tag=manifest.version, revision=made.oid, exist_ok=True)
    except _FAILURES as error:
        raise _explained(repository, error) from error
    return Published(repository, made.oid, is_new=True, was_created=was_created)


def _explained(repository: str, error: Exception) -> StoreError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if status in (401, 403, 404):
        return StoreError(
            f"{repository} on the hub may not be written to (status {status}); check the name, and set HF_TOKEN to a "
            "token that may write there"
        )
    reason = mask_secrets(" ".join(str(error).split())[:300])
    passing = isinstance(error, httpx2.TransportError) or may_pass(status)
    kind = StoreUnavailableError if passing else StoreError
    advice = "run the same command again later" if passing else "nothing was tagged; mend that and run it again"
    return kind(f"{repository} on the hub was not written: {type(error).__name__}: {reason}; {advice}")
