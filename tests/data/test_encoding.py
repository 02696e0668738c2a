"""Rows as columns: the same ids as row by row, made once, mapped, continued where a killed encoding stopped."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data import encoding
from graftline.data.columns import ColumnWriter, EncodedColumns, columns_of, id_type, joined, open_columns, read_index
from graftline.data.encoding import (
    encode_columns,
    encode_file,
    encode_rows,
    fit_declared,
    open_encoded,
    publish,
)
from graftline.data.row_file import RowFile
from graftline.data.rows import Message, Row, write_rows
from graftline.data.template import Encoded, encode
from graftline.errors import DataError, GraftlineError
from graftline.settings.data import Data

ROOT = Path(__file__).parents[2]
WORDS = ("Cat", "egory", " animal", "\n", "é", "  ", "😀", "12", "of a", "<|im_end|>")


def row(line: int, num_turns: int = 1) -> Row:
    """A conversation whose texts depend on the line; every second of several answers is learned."""
    messages = []
    for turn in range(num_turns):
        words = [WORDS[(line * 7 + turn * 3 + at * at) % len(WORDS)] for at in range(2 + line % 9)]
        last = turn == num_turns - 1
        messages.append(Message("user", f"{line} {''.join(words)}", supervised=False))
        messages.append(Message("assistant", "".join(words[::-1]) + "a" * (line % 4), last or turn % 2 == 0))
    return Row(tuple(messages), line)


PLAIN = [row(line) for line in range(1, 61)]
CHAT = [row(line, 1 + line % 12) for line in range(1, 61)]


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_ROWS", 4)
    monkeypatch.setattr(encoding, "_SHARD_ROWS", 12)


def data(**changes: Any) -> Data:
    return Data.model_validate({"source": "path:rows.jsonl", "evaluation_rows": 1, "max_tokens": 512} | changes)


def file_of(folder: Path, rows: Sequence[Row]) -> RowFile:
    write_rows(folder / "train.jsonl", rows)
    return RowFile(folder / "train.jsonl")


@pytest.mark.parametrize(("rows", "template"), [(PLAIN, "none"), (CHAT, "tokenizer"), (CHAT, "chatml")])
def test_a_batch_has_the_ids_and_marks_that_its_rows_have_alone(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], template: str
) -> None:
    found, wrong = encode_columns(rows, tokenizer, template=template)
    assert not wrong
    assert list(found) == [encode(one, tokenizer, template=template) for one in rows]
    assert found.lines.tolist() == [one.source_line for one in rows]


def test_batches_that_are_joined_are_the_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, _ = encode_columns(CHAT, tokenizer, template="chatml")
    parts = [encode_columns(CHAT[at : at + 7], tokenizer, template="chatml")[0] for at in range(0, 60, 7)]
    assert joined(parts).origin == whole.origin
    assert joined(parts) == whole


def test_every_row_that_is_wrong_is_told_with_its_line_and_the_others_are_encoded(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    found, wrong = encode_columns([*PLAIN[:3], row(91, 2), *PLAIN[3:5], row(92, 3)], tokenizer, template="none")
    assert found.lines.tolist() == [1, 2, 3, 4, 5]
    assert [str(error).split(":")[0] for error in wrong] == ["line 91", "line 92"]


def test_a_file_is_encoded_once_and_mapped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_batches: None
) -> None:
    file, seen = file_of(tmp_path, CHAT), list[tuple[int, int]]()

    def ask() -> Path:
        cache = tmp_path / "cache"
        return encode_file(
            file,
            tokenizer,
            data(),
            template="chatml",
            cache=cache,
            on_progress=lambda done, total: seen.append((done, total)),
        )

    folder = ask()
    assert seen == [(done, 60) for done in range(4, 61, 4)]
    assert ask() == folder
    assert len(seen) == 15
    columns = open_columns(folder)
    assert columns == encode_columns(CHAT, tokenizer, template="chatml")[0]
    assert isinstance(columns.ids.base, numpy.memmap)
    assert {path.name for path in folder.iterdir()} == {"ids.npy", "rows.npy", "spans.npy", "index.json"}


def test_what_decides_the_ids_names_the_encoding_and_how_long_a_row_may_be_does_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file, cache = file_of(tmp_path, PLAIN), tmp_path / "cache"
    first = encode_file(file, tokenizer, data(), template="none", cache=cache)
    assert encode_file(file, tokenizer, data(max_tokens=8), template="none", cache=cache) == first
    found = {first, encode_file(file, tokenizer, data(), template="chatml", cache=cache)}
    tokenizer.add_tokens(["egory"])
    found.add(encode_file(file, tokenizer, data(), template="none", cache=cache))
    found.add(encode_file(file_of(tmp_path, PLAIN[1:]), tokenizer, data(), template="none", cache=cache))
    assert len(found) == 4


class Killed(BaseException):
    """Stands for SIGKILL: nothing is cleaned up behind it but what Python closes."""


def test_a_killed_encoding_continues_behind_its_last_shard_and_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path, CHAT)
    whole = encode_file(file, tokenizer, data(), template="chatml", cache=tmp_path / "at once")
    encoded = list[int]()

    def until(stop: int) -> Any:
        def work(rows: Sequence[Row], *given: Any, **named: Any) -> Any:
            if rows[0].source_line > stop:
                raise Killed
            encoded.extend(one.source_line for one in rows)
            return encode_columns(rows, *given, **named)

        return work

    for stop in (30, 45, 99):
        monkeypatch.setattr(encoding, "encode_columns", until(stop))
        try:
            again = encode_file(file, tokenizer, data(), template="chatml", cache=tmp_path / "killed")
        except Killed:
            assert not [path for path in (tmp_path / "killed").iterdir() if (path / "index.json").exists()]
    assert [encoded.count(line) for line in (1, 24, 25, 32, 36, 37, 60)] == [1, 1, 2, 2, 1, 1, 1]
    for name in ("ids.npy", "rows.npy", "spans.npy", "index.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_disk_that_fills_leaves_no_encoding_and_what_is_kept_is_continued(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache, real = file_of(tmp_path, PLAIN), tmp_path / "cache", os.fsync
    left = iter([None] * 7)

    def full(handle: int) -> None:
        if next(left, "full"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(GraftlineError, match="No space left on device; free space"):
        encode_file(file, tokenizer, data(), template="none", cache=cache)
    assert not [path for path in cache.iterdir() if read_index(path)]
    monkeypatch.setattr(os, "fsync", real)
    made = encode_file(file, tokenizer, data(), template="none", cache=cache)
    assert open_columns(made) == encode_columns(PLAIN, tokenizer, template="none")[0]


def test_bad_rows_of_a_file_are_told_together_with_the_rows_that_are_too_long(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_batches: None
) -> None:
    rows = [*PLAIN[:30], *(row(line, 2) for line in range(31, 46)), *PLAIN[45:]]
    with pytest.raises(DataError) as told:
        encode_file(file_of(tmp_path, rows), tokenizer, data(max_tokens=20), template="none", cache=tmp_path / "cache")
    lines = str(told.value).splitlines()
    assert lines[0] == "60 rows: 16 problems:"
    assert lines[1].startswith("  line 31: template 'none' takes one prompt")
    assert lines[-1] == "  and 6 more"
    with pytest.raises(DataError) as again:
        encode_file(file_of(tmp_path, rows), tokenizer, data(max_tokens=20), template="none", cache=tmp_path / "cache")
    assert str(again.value) == str(told.value)


def test_a_row_too_long_is_named_whether_it_is_encoded_in_memory_or_on_disk(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    for overlength in ("error", "drop", "truncate"):
        section = data(max_tokens=20, overlength=overlength)
        file = file_of(tmp_path, PLAIN)

        def on_disk(section: Data = section, file: RowFile = file) -> Any:
            folder = encode_file(file, tokenizer, section, template="none", cache=tmp_path / "cache")
            return fit_declared(open_columns(folder), section).of(file)

        def in_memory(overlength: Any = overlength) -> Any:
            return encode_rows(PLAIN, tokenizer, template="none", max_tokens=20, overlength=overlength)

        assert outcome(on_disk) == outcome(in_memory)


def outcome(work: Any) -> Any:
    try:
        found = work()
    except DataError as error:
        return str(error)
    return list(found.encoded), [one.messages for one in found.rows], found.truncated_lines, found.dropped_lines


def test_what_validate_left_is_taken_if_it_is_of_these_rows_and_encoded_again_if_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file, made, cache = file_of(tmp_path, PLAIN), tmp_path / "made", tmp_path / "cache"
    publish(encode_file(file, tokenizer, data(), template="none", cache=tmp_path / "first"), made)

    def ask(**changes: Any) -> EncodedColumns:
        given = {"file": file, "template": "none"} | changes
        return open_encoded(given["file"], tokenizer, data(), template=given["template"], made=made, cache=cache)

    expected = encode_columns(PLAIN, tokenizer, template="none")[0]
    assert ask() == expected
    assert not cache.exists()
    assert ask(template="chatml") == encode_columns(PLAIN, tokenizer, template="chatml")[0]
    assert ask(file=file_of(tmp_path, PLAIN[:40])) == expected[:40]
    (made / "ids.npy").write_bytes(b"")
    with pytest.raises(DataError, match="holds no whole set of encoded rows"):
        open_columns(made)


def test_encodings_that_nobody_has_used_for_two_weeks_make_room(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    cache = tmp_path / "cache"
    old, used = (
        encode_file(file_of(tmp_path, PLAIN), tokenizer, data(), template=name, cache=cache)
        for name in ("none", "chatml")
    )
    for folder in (old, used):
        os.utime(folder / "index.json", (0, 0))
    assert encode_file(file_of(tmp_path, PLAIN), tokenizer, data(), template="chatml", cache=cache) == used
    encode_file(file_of(tmp_path, PLAIN[1:]), tokenizer, data(), template="none", cache=cache)
    assert (old.exists(), used.exists()) == (False, True)


ROWS = [
    Encoded([5, 6, 7, 8], [False, True, True, False]),
    Encoded([], []),
    Encoded([70000, 1], [True, True]),
    Encoded([3, 4, 5, 6, 7], [True, False, True, False, True]),
]


def written(folder: Path) -> EncodedColumns:
    writer = ColumnWriter(folder, id_type(70000))
    for one in ROWS:
        writer.append(columns_of([one]))
    writer.finish({})
    return open_columns(folder)


@pytest.fixture(params=["memory", "disk"])
def columns(request: pytest.FixtureRequest, tmp_path: Path) -> EncodedColumns:
    return columns_of(ROWS) if request.param == "memory" else written(tmp_path / "columns")


def test_columns_give_each_row_back_and_count_what_is_learned(columns: EncodedColumns) -> None:
    assert list(columns) == ROWS
    assert columns.lengths.tolist() == [4, 0, 2, 5]
    assert columns.count_learned().tolist() == [2, 0, 2, 3]
    assert columns.count_learned(after=1).tolist() == [2, 0, 1, 2]
    assert columns.first_learned(after=1).tolist() == [1, 0, 1, 2]
    assert [list(one) for one in columns.last_learned()] == [[1, 0, 0, 4], [3, 0, 2, 5]]
    assert columns.token_at(columns.lengths - 1).tolist() == [8, -1, 1, 7]
    at_fault, tokens = columns.beyond(8)
    assert (at_fault.tolist(), tokens) == ([0, 2], {8, 70000})


def test_rows_that_are_cut_or_chosen_are_those_of_lists(columns: EncodedColumns) -> None:
    assert list(columns.cut(3)) == [Encoded(one.input_ids[:3], one.supervised[:3]) for one in ROWS]
    assert columns.cut(3).count_learned().tolist() == [2, 0, 2, 2]
    assert list(columns.take(numpy.array([3, 0]))) == [ROWS[3], ROWS[0]]
    assert list(columns[1:3]) == ROWS[1:3]
    assert columns.cut(3).digest != columns.digest != columns.take(numpy.array([0, 1, 3, 2])).digest
    assert columns.cut(9).digest == columns.digest


def test_no_rows_are_columns_too(tmp_path: Path) -> None:
    writer = ColumnWriter(tmp_path / "none", id_type(9))
    writer.finish({})
    assert list(open_columns(tmp_path / "none")) == list(columns_of([])) == []
    assert open_columns(tmp_path / "none").count_learned().tolist() == []


WORKER = """
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from graftline.data import encoding
from graftline.data.row_file import RowFile
from graftline.errors import GraftlineError
from tests.data.test_encoding import data

encoding.BATCH_ROWS, encoding._SHARD_ROWS = 4, 12
file, base, cache, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

def told(done, total):
    print(done, flush=True)
    if done == 40:
        sys.stdin.read()

try:
    encoding.encode_file(
        RowFile(Path(file)), AutoTokenizer.from_pretrained(base), data(), template="chatml",
        cache=Path(cache), on_progress=told,
    )
except GraftlineError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("end", ["kill -9", "full disk"])
def test_a_process_that_ends_amid_an_encoding_is_continued_behind_its_last_shard(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, tiny_llama: Path, small_batches: None, end: str
) -> None:
    file, cache = file_of(tmp_path, CHAT), tmp_path / "cache"
    limit = 16_000 if end == "full disk" else 0  # behind the first shard
    given = [str(file.path), str(tiny_llama), str(cache), str(limit)]
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, *given], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT
    )
    if end == "kill -9":
        assert worker.stdout is not None
        next(line for line in worker.stdout if line == "40\n")
        worker.kill()
    _, told = worker.communicate()
    assert worker.returncode == (-9 if end == "kill -9" else 1)
    assert end == "kill -9" or "File too large; free space or permission is missing there" in told
    assert not [path for path in cache.iterdir() if read_index(path)]
    seen = list[int]()
    made = encode_file(
        file, tokenizer, data(), template="chatml", cache=cache, on_progress=lambda done, total: seen.append(done)
    )
    assert seen[0] > 4
    assert open_columns(made) == encode_columns(CHAT, tokenizer, template="chatml")[0]
