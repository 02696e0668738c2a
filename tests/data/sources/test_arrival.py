import errno
from pathlib import Path

import pytest

from graftline.data.sources.cache import disk_errors_explained, save
from graftline.digest import of_bytes
from graftline.errors import SourceError
from graftline.logs import silent


def test_a_stream_is_hashed_while_it_is_written(tmp_path: Path) -> None:
    arrived = save(iter([b"ab", b"c"]), tmp_path / "x", total_bytes=None, on_progress=silent)

    assert (arrived.path.read_bytes(), arrived.digest) == (b"abc", of_bytes(b"abc"))


@pytest.mark.parametrize("total_bytes", [2, 4])
def test_fewer_or_more_bytes_than_announced_are_an_error(tmp_path: Path, total_bytes: int) -> None:
    with pytest.raises(SourceError, match=f"3 bytes came, {total_bytes} were announced"):
        save(iter([b"abc"]), tmp_path / "x", total_bytes=total_bytes, on_progress=silent)


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.ENOSPC, "free some space there"), (errno.EACCES, "make it writable")]
)
def test_errors_of_the_disk_say_what_to_do(tmp_path: Path, code: int, advice: str) -> None:
    with (
        pytest.raises(SourceError, match=f"cannot write the cache {tmp_path}: .*; {advice}"),
        disk_errors_explained(tmp_path),
    ):
        raise OSError(code, "what the system says")
