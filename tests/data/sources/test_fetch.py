"""Fetching through the cache, over real files and a real HTTP server."""

import hashlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from graftline.data.sources import fetch, parse, resolve
from graftline.data.sources.cache import Cache, CacheEntry, Downloaded
from graftline.digest import Digest, rename_synced
from graftline.errors import SourceError, SourceUnavailableError
from tests.data.sources.servers import Answer, FileServer, redirect, slow, status, truncated, whole, without_length

BODY = bytes(range(256)) * 12_000  # 3 MB: several pieces of 1 MiB
SHA = hashlib.sha256(BODY).hexdigest()


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "entries").glob("*"))


def leftovers(cache: Path) -> list[Path]:
    return list((cache / "partial").glob("*"))


class TestHttps:
    @pytest.mark.parametrize("answer", [whole, without_length])
    def test_a_file_lands_in_the_cache_under_its_own_name(
        self, server: FileServer, cache: Path, answer: Callable[[bytes], Answer]
    ) -> None:
        server.answers["/a/rows.jsonl"] = [answer(BODY)]

        path = fetch(parse(f"{server.url}/a/rows.jsonl"), sha256=SHA, cache=cache)

        assert (path.name, path.read_bytes()) == ("rows.jsonl", BODY)
        assert leftovers(cache) == []

    def test_the_second_call_asks_nobody(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [whole(BODY)]
        source = parse(f"{server.url}/x.bin")

        first = fetch(source, sha256=SHA, cache=cache)
        second = fetch(source, sha256=SHA, cache=cache)

        assert first == second
        assert server.requests["/x.bin"] == 1

    def test_progress_counts_bytes(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [whole(BODY)]
        seen: list[tuple[int, int]] = []

        fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache, on_progress=lambda *now: seen.append(now))

        assert seen[-1] == (len(BODY), len(BODY))
        assert len(seen) > 1

    def test_another_digest_is_refused_and_nothing_is_kept(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [whole(BODY[:-1] + b"!")]
        given = hashlib.sha256(BODY[:-1] + b"!").hexdigest()

        with pytest.raises(SourceError) as caught:
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

        assert f"has digest sha256:{given}; expected sha256:{SHA}" in str(caught.value)
        assert (entries(cache), leftovers(cache)) == ([], [])

    def test_a_body_that_ends_early_is_fetched_again(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [truncated(BODY, 1_500_000), truncated(BODY, 0), whole(BODY)]

        path = fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

        assert path.read_bytes() == BODY
        assert server.requests["/x.bin"] == 3

    def test_a_body_that_always_ends_early_is_an_error_after_four_attempts(
        self, server: FileServer, cache: Path
    ) -> None:
        server.answers["/x.bin"] = [truncated(BODY, 1_500_000)]

        with pytest.raises(
            SourceUnavailableError, match=r"x\.bin could not be fetched in 4 attempts: .*check the network"
        ):
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

        assert server.requests["/x.bin"] == 4
        assert (entries(cache), leftovers(cache)) == ([], [])

    @pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
    def test_a_passing_failure_is_tried_again(self, server: FileServer, cache: Path, code: int) -> None:
        server.answers["/x.bin"] = [status(code), whole(BODY)]

        assert fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache).read_bytes() == BODY

    @pytest.mark.parametrize("code", [401, 403, 404, 410])
    def test_a_refusal_is_told_at_once(self, server: FileServer, cache: Path, code: int) -> None:
        server.answers["/x.bin"] = [status(code)]

        with pytest.raises(SourceError, match=rf"x\.bin answered {code} .*; expected 200; check the address"):
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

        assert server.requests["/x.bin"] == 1

    def test_an_unreachable_server_is_named(self, cache: Path) -> None:
        with pytest.raises(
            SourceError, match=r"http://127\.0\.0\.1:9/x could not be fetched in 4 attempts: ConnectError"
        ):
            fetch(parse("http://127.0.0.1:9/x"), sha256=SHA, cache=cache)

    def test_a_redirect_is_followed(self, server: FileServer, cache: Path) -> None:
        server.answers["/old.bin"] = [redirect(f"{server.url}/new.bin")]
        server.answers["/new.bin"] = [whole(BODY)]

        assert fetch(parse(f"{server.url}/old.bin"), sha256=SHA, cache=cache).name == "old.bin"

    def test_a_circle_of_redirects_is_an_error(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [redirect(f"{server.url}/x.bin")]

        with pytest.raises(SourceError, match="Exceeded maximum allowed redirects"):
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

    def test_a_compressed_transfer_does_not_change_the_bytes(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [whole(BODY, **{"Content-Encoding": "gzip"})]

        assert fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache).read_bytes() == BODY

    def test_secrets_of_an_address_are_in_no_message_and_no_log(
        self, server: FileServer, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="graftline")
        caplog.set_level(logging.INFO)
        server.answers["/x.bin"] = [status(503), status(403)]
        address = f"{server.url}/x.bin?token=t0ps3cret".replace("//", "//user:hunter2@")

        with pytest.raises(SourceError) as caught:
            fetch(parse(address), sha256=SHA, cache=cache)

        for word in ("t0ps3cret", "hunter2"):
            assert word not in str(caught.value)
            assert word not in caplog.text
        assert "token=***" in str(caught.value)


class TestPath:
    def test_a_file_is_kept_after_it_has_changed(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b"old")
        source = parse("path:rows.jsonl")
        old = resolve(source, cache=cache, root=tmp_path)
        (tmp_path / "rows.jsonl").write_bytes(b"new")

        new = fetch(source, sha256=None, cache=cache, root=tmp_path)
        again = fetch(source, sha256=old.hex, cache=cache, root=tmp_path)

        assert (new.read_bytes(), again.read_bytes()) == (b"new", b"old")

    def test_a_folder_is_copied_and_resolved(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "base" / "sub").mkdir(parents=True)
        (tmp_path / "base" / "config.json").write_text("{}")
        (tmp_path / "base" / "sub" / "w").write_bytes(b"1")
        source = parse("path:base")

        digest = resolve(source, cache=cache, root=tmp_path)
        folder = fetch(source, sha256=digest.hex, cache=cache, root=tmp_path)

        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
            "config.json",
            "sub/w",
        ]
        (tmp_path / "base" / "sub" / "w").write_bytes(b"2")
        assert resolve(source, cache=cache, root=tmp_path) != digest

    def test_the_same_bytes_keep_the_suffix_that_was_asked_for(self, tmp_path: Path, cache: Path) -> None:
        for name in ("rows.csv", "rows.JSONL"):
            (tmp_path / name).write_bytes(b"same")

        names = [
            fetch(parse(f"path:{name}"), sha256=None, cache=cache, root=tmp_path).name
            for name in ("rows.csv", "rows.JSONL")
        ]

        assert names == ["rows.csv", "rows.JSONL"]

    def test_two_addresses_of_the_same_content_share_an_entry(
        self, tmp_path: Path, cache: Path, server: FileServer
    ) -> None:
        (tmp_path / "rows.bin").write_bytes(BODY)
        server.answers["/x.bin"] = [whole(BODY)]

        paths = {
            fetch(parse("path:rows.bin"), sha256=None, cache=cache, root=tmp_path),
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache),
            fetch(parse(f"{server.url}/x.bin"), sha256=None, cache=cache),
        }

        assert len(paths) == len(entries(cache)) == 1
        assert leftovers(cache) == []

    @pytest.mark.parametrize("name", ["[rows", "a?b.jsonl", "a#b.jsonl", "rows.", ".jsonl"])
    def test_odd_names_work(self, tmp_path: Path, cache: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"1")

        assert fetch(parse(f"path:{name}"), sha256=None, cache=cache, root=tmp_path).name == name

    def test_spaces_and_unicode_in_names_work(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "méine rows.jsonl").write_bytes(b"1")

        assert fetch(parse("path:méine rows.jsonl"), sha256=None, cache=cache, root=tmp_path).read_bytes() == b"1"

    @pytest.mark.parametrize("in_folder", [False, True])
    def test_a_path_that_grows_once_while_it_is_copied_is_taken_whole(
        self, tmp_path: Path, cache: Path, in_folder: bool
    ) -> None:
        rows = tmp_path / "rows" / "rows.jsonl"
        rows.parent.mkdir()
        rows.write_bytes(BODY)
        grown = []

        def grow(done: int, total: int) -> None:
            if not grown:
                grown.append(rows.open("ab").write(b"more"))

        source = parse(f"path:{rows.parent if in_folder else rows}")
        path = fetch(source, sha256=None, cache=cache, on_progress=grow)

        assert (path / "rows.jsonl" if in_folder else path).read_bytes() in (BODY + b"more", BODY)
        assert resolve(source, cache=cache) == resolve(source, cache=cache)

    def test_a_path_that_never_stops_growing_is_taken_as_it_was_when_its_copy_began(
        self, tmp_path: Path, cache: Path
    ) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(BODY)

        def grow(done: int, total: int) -> None:
            with rows.open("ab") as stream:
                stream.write(b"x")

        # Each piece that is read makes the file longer: a copy up to its end would have none.
        assert fetch(parse(f"path:{rows}"), sha256=None, cache=cache, on_progress=grow).read_bytes() == BODY
        assert leftovers(cache) == []

    def test_a_path_whose_rows_are_rewritten_in_place_is_no_wrong_pin(self, tmp_path: Path, cache: Path) -> None:
        rows = tmp_path / "rows.jsonl"
        rows.write_bytes(BODY)
        drawn = iter(range(256))

        def rewrite(done: int, total: int) -> None:
            with rows.open("r+b") as stream:
                stream.seek(2 << 20)
                stream.write(bytes([next(drawn)]))

        with pytest.raises(SourceError, match="changed each of the 3 times"):
            fetch(parse(f"path:{rows}"), sha256=None, cache=cache, on_progress=rewrite)

    def test_a_missing_file_names_the_nearest(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.jsonl").touch()

        with pytest.raises(SourceError, match=r"there is no file or folder .*row\.jsonl; did you mean rows\.jsonl\?"):
            fetch(parse("path:row.jsonl"), sha256=None, cache=cache, root=tmp_path)

    def test_an_empty_folder_is_refused(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "base").mkdir()

        with pytest.raises(SourceError, match="holds no file"):
            fetch(parse("path:base"), sha256=None, cache=cache, root=tmp_path)

    def test_another_digest_names_both(self, tmp_path: Path, cache: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b"new")

        with pytest.raises(SourceError, match=rf"has digest sha256:[0-9a-f]{{64}}; expected sha256:{SHA}"):
            fetch(parse("path:rows.jsonl"), sha256=SHA, cache=cache, root=tmp_path)


class TestCache:
    @pytest.mark.parametrize("damage", ["shorter", "gone", "extra file", "bad record", "no record"])
    def test_a_damaged_entry_is_fetched_again(
        self, server: FileServer, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        server.answers["/x.bin"] = [whole(BODY)]
        source = parse(f"{server.url}/x.bin")
        path = fetch(source, sha256=SHA, cache=cache)
        record = path.parent.parent / "record.json"
        actions: dict[str, Callable[[], object]] = {
            "shorter": lambda: path.write_bytes(BODY[:-1]),
            "gone": path.unlink,
            "extra file": lambda: (path.parent / "more").touch(),
            "bad record": lambda: record.write_text("{"),
            "no record": record.unlink,
        }
        actions[damage]()

        assert fetch(source, sha256=SHA, cache=cache).read_bytes() == BODY
        assert server.requests["/x.bin"] == 2
        assert "is not as recorded; it is fetched again" in caplog.text

    def test_processes_that_want_the_same_download_it_once(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [slow(BODY, threading.Event(), seconds=0.3)]
        processes = [
            multiprocessing.get_context("fork").Process(target=_fetch, args=(f"{server.url}/x.bin", cache))
            for _ in range(4)
        ]

        for process in processes:
            process.start()
        for process in processes:
            process.join()

        assert [process.exitcode for process in processes] == [0] * 4
        assert server.requests["/x.bin"] == 1

    def test_a_killed_download_leaves_nothing_and_the_next_one_goes_through(
        self, server: FileServer, cache: Path
    ) -> None:
        started = threading.Event()
        server.answers["/x.bin"] = [slow(BODY, started, seconds=3), whole(BODY)]
        process = multiprocessing.get_context("fork").Process(target=_fetch, args=(f"{server.url}/x.bin", cache))
        process.start()
        assert started.wait(10)
        _wait_for(lambda: any(p.is_file() and p.stat().st_size for p in (cache / "partial").rglob("*")))

        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()

        assert entries(cache) == []
        assert len(leftovers(cache)) == 1
        assert fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache).read_bytes() == BODY
        assert leftovers(cache) == []

    def test_a_full_disk_is_named_and_leaves_nothing(self, server: FileServer, cache: Path) -> None:
        server.answers["/x.bin"] = [whole(BODY)]
        script = (
            "import resource, signal, sys; from pathlib import Path; from graftline.data.sources import fetch, parse\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
            f"fetch(parse('{server.url}/x.bin'), sha256='{SHA}', cache=Path(sys.argv[1]))\n"
        )

        done = subprocess.run([sys.executable, "-c", script, str(cache)], capture_output=True, text=True, check=False)

        assert f"SourceError: cannot write the cache {cache}: File too large; free some space there" in done.stderr
        assert (entries(cache), leftovers(cache)) == ([], [])

    def test_room_is_looked_at_before_the_first_byte(
        self, server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.answers["/x.bin"] = [whole(BODY)]
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))

        with pytest.raises(SourceError, match=rf"{len(BODY)} bytes are to be written below .*, 10 are free there"):
            fetch(parse(f"{server.url}/x.bin"), sha256=SHA, cache=cache)

    def test_a_cache_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "rows.jsonl").touch()

        with pytest.raises(SourceError, match=r"cannot write the cache .*GRAFTLINE_CACHE"):
            fetch(parse("path:rows.jsonl"), sha256=None, cache=tmp_path / "file" / "cache", root=tmp_path)


def _fetch(address: str, cache: Path) -> None:
    fetch(parse(address), sha256=SHA, cache=cache)


def _wait_for(condition: Callable[[], bool], *, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_of_two_processes_that_bring_the_same_content_under_two_addresses_the_second_takes_the_firsts(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring(key: str) -> CacheEntry:
        def fill(folder: Path) -> Downloaded:
            (folder / "rows.jsonl").write_bytes(BODY)
            return Downloaded(folder / "rows.jsonl", Digest.parse(f"sha256:{SHA}"))

        return Cache(cache).put(key, fill, publish_as=lambda digest: digest.hex)

    rename = rename_synced

    def late(making: Path, final: Path) -> None:
        monkeypatch.setattr("graftline.data.sources.cache.rename_synced", rename)
        bring("another address")
        rename(making, final)

    monkeypatch.setattr("graftline.data.sources.cache.rename_synced", late)
    found = bring("an address")
    assert found.path.read_bytes() == BODY
    assert entries(cache) == [SHA]
    assert leftovers(cache) == []
