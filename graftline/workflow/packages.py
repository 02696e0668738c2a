"""Push a pipeline's package to a DVC remote, and verify every object there.

    python -m graftline.workflow.packages wordnet-category --remote archive

`dvc push` and `dvc status --cloud` consider a folder complete if its list is on the remote, even if the remote has lost
some of its files. So objects are handled one by one: missing ones are uploaded, and each is compared with the MD5 that
is its name, by the entity tag if the store computed one on arrival (S3, one part), else by reading it back.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvc.config import NoRemoteError, RemoteNotFoundError
from dvc.exceptions import DvcException
from dvc.repo import Repo

from graftline.errors import GraftlineError
from graftline.plain_text import count
from graftline.workflow.stage import TEMPORARY


class ArchiveError(GraftlineError):
    """The package could not be pushed, or the remote does not hold it."""


@dataclass(frozen=True)
class PackageArchive:
    """A package on a remote."""

    url: str
    num_objects: int
    num_bytes: int
    num_pushed: int
    """Objects that were not there before."""


def push(pipeline: str, remote: str, *, root: Path) -> PackageArchive:
    """Push the outputs of ``package@<pipeline>`` to a remote of the DVC configuration, and check them there.

    Raises:
        ArchiveError: there is no such remote, nothing to push, or an object is missing or damaged after the push.
        OSError: the remote did not answer, or did not accept everything.
    """
    with Repo(str(root)) as repo:
        target = f"{root / 'dvc.yaml'}:package@{pipeline}"
        try:
            objects = repo.cloud.get_remote_odb(remote)
            (stage,) = repo.stage.collect(target)
            sizes = dict(_local_sizes(repo, stage))
        except (NoRemoteError, RemoteNotFoundError) as error:
            raise ArchiveError(f"{error}; make one with `dvc remote add {remote} s3://BUCKET/PREFIX`") from error
        missing = [name for name in sizes if not objects.fs.exists(objects.oid_to_path(name))]
        # A folder's list last, because DVC then considers the folder complete.
        for name in sorted(missing, key=lambda name: name.endswith(".dir")):
            _upload(objects, repo.cache.local, name)
        for name, size in sizes.items():
            _check(objects.fs, objects.oid_to_path(name), md5=name.removesuffix(".dir"), size=size)
        return PackageArchive(objects.fs.unstrip_protocol(objects.path), len(sizes), sum(sizes.values()), len(missing))


def _local_sizes(repo: Repo, stage: Any) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of every object of a stage's outputs in DVC's cache."""
    cache = repo.cache.local
    for out in stage.outs:
        made = out.get_obj()
        if made is None:
            pipeline = stage.addressing.rpartition("@")[2]
            raise ArchiveError(f"{out} is not in DVC's cache; run `python -m flows.retrain {pipeline}` first")
        names = {out.hash_info.value, *(entry.value for _, _, entry in made)} if out.hash_info.isdir else {made.oid}
        for name in names:
            yield name, Path(cache.oid_to_path(name)).stat().st_size


def _upload(objects: Any, cache: Any, name: str) -> None:
    objects.add(cache.oid_to_path(name), cache.fs, name)


def _check(fs: Any, path: str, *, md5: str, size: int) -> None:
    fs.fs.invalidate_cache()
    try:
        found = fs.info(path)
        if found["size"] == size and (found.get("ETag", "").strip('"') == md5 or _read_md5(fs, path) == md5):
            return
    except FileNotFoundError as error:
        raise ArchiveError(
            f"{fs.unstrip_protocol(path)} is missing after the push; run the same command again"
        ) from error
    raise ArchiveError(
        f"{fs.unstrip_protocol(path)} is damaged: {found['size']} bytes of {size}, or others; "
        "remove it and run the same command again"
    )


def _read_md5(fs: Any, path: str) -> str:
    with fs.open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def main() -> None:
    """Command line: exit code 0 all there, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(
        description="Push a pipeline's package to a DVC remote, and check what is there.",
        epilog="example: python -m graftline.workflow.packages wordnet-category --remote archive",
    )
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("--remote", required=True, help="a remote of the DVC configuration (`dvc remote list`)")
    arguments = parser.parse_args()
    try:
        done = push(arguments.pipeline, arguments.remote, root=Path.cwd())
    except OSError as error:
        print(f"{TEMPORARY}{error}", file=sys.stderr)
        sys.exit(2)
    except (GraftlineError, DvcException) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    megabytes = done.num_bytes / 1e6
    print(
        f"{done.url}: {count(done.num_objects, 'object')}, {megabytes:.1f} MB, {done.num_pushed} of them new, all there"
    )


if __name__ == "__main__":
    main()
