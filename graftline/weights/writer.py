"""Write a model folder one tensor at a time, and resume after an interruption.

Everything is written to a staging folder ``.<name>.part``, which is renamed to the final name at the end. Its
``journal.jsonl`` has a line for each tensor that was written. A later writer for the same job hashes these tensors
again and keeps them up to the first mismatch.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from graftline.digest import Digest, canonical_json, rename_synced, write_json, write_text
from graftline.errors import CheckpointError
from graftline.weights.identity import IDENTITY_FILE, BaseIdentity, TensorDigest, combine, read_identity, write_identity
from graftline.weights.reader import DTYPE_NAMES, DTYPES, INDEX_FILE, SINGLE_FILE, TensorInfo, read_tensor

# A shard's header is written last, into space reserved at the start of the file and padded with blanks, as the format
# allows. It has room for more than 5,000 tensors; the writer opens the next shard before it is full.
_HEADER_BYTES = 1 << 20
_DATA_START = 8 + _HEADER_BYTES
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class ShardTensor:
    """A tensor in a shard. ``dtype`` as safetensors spells it, ``offset`` in bytes from the start of the data."""

    name: str
    dtype: str
    shape: list[int]
    shard: int
    offset: int
    num_bytes: int
    sha256: str


class Shard:
    """A safetensors file that grows tensor by tensor: shard number ``index``, created if it does not exist."""

    def __init__(self, file: Path, index: int) -> None:
        self.file, self.index = file, index
        self.entries: list[ShardTensor] = []
        self._header_bytes = 0
        file.touch()
        self._stream = file.open("r+b")

    @property
    def num_bytes(self) -> int:
        """Bytes of data so far."""
        return self.entries[-1].offset + self.entries[-1].num_bytes if self.entries else 0

    def has_room(self, name: str, num_bytes: int, max_bytes: int) -> bool:
        """Whether a tensor fits; the first one always does."""
        header_bytes = self._header_bytes + _header_cost(name)
        return not self.entries or (self.num_bytes + num_bytes <= max_bytes and header_bytes <= _HEADER_BYTES)

    def append(self, name: str, tensor: Tensor) -> ShardTensor:
        """Append the bytes of a dense CPU tensor."""
        data = tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
        offset = self.num_bytes
        self._stream.seek(_DATA_START + offset)
        self._stream.write(data)
        self._stream.flush()
        sha256 = hashlib.sha256(data).hexdigest()
        entry = ShardTensor(name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), self.index, offset, len(data), sha256)
        self.keep(entry)
        return entry

    def keep(self, entry: ShardTensor) -> None:
        """Register a tensor whose bytes are in the file."""
        self.entries.append(entry)
        self._header_bytes += _header_cost(entry.name)

    def holds(self, entry: ShardTensor) -> bool:
        """Whether the file holds the bytes that an entry describes."""
        self._stream.seek(_DATA_START + entry.offset)
        state, left = hashlib.sha256(), entry.num_bytes
        while left and (chunk := self._stream.read(min(left, _CHUNK_BYTES))):
            state.update(chunk)
            left -= len(chunk)
        return state.hexdigest() == entry.sha256

    def seal(self) -> None:
        """Write the header, cut the file after the last tensor, sync it to the disk and close it."""
        header = canonical_json(
            {entry.name: _header_entry(entry) for entry in self.entries} | {"__metadata__": {"format": "pt"}}
        )
        self._stream.seek(0)
        self._stream.write(struct.pack("<Q", _HEADER_BYTES) + header.ljust(_HEADER_BYTES))
        self._stream.truncate(_DATA_START + self.num_bytes)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.close()

    def close(self) -> None:
        """Close the file without a header."""
        self._stream.close()


def _header_entry(entry: ShardTensor) -> dict[str, Any]:
    return {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.offset, entry.offset + entry.num_bytes]}


def _header_cost(name: str) -> int:
    """An upper bound of a tensor's bytes in the header: its escaped name, and up to 120 for numbers and keys."""
    return len(canonical_json(name)) + 120


def check_free_space(folder: Path, num_bytes: int) -> None:
    """Raise CheckpointError if ``folder``'s disk has less than ``num_bytes`` free. The folder need not exist yet."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise CheckpointError(
            f"writing {folder} takes {num_bytes} bytes, its disk has {free} free; "
            f"free {num_bytes - free} bytes or choose another disk"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn OSErrors of writing ``path`` into a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}; free space or permission is missing there") from error


DEFAULT_SHARD_BYTES = 4 * 1024**3
_JOURNAL = "journal.jsonl"
_JOB = "job"


class CheckpointWriter:
    """Writes ``folder``; use as a context manager, and call `finish` inside it.

    Files that are not weights go to `stage` and appear in ``folder`` together with the weights. ``job`` is a digest of
    everything that decides the content: what an interrupted run of the same job has written is kept. Without a job, or
    after another one, writing starts from the beginning.

    Raises:
        CheckpointError: ``folder`` exists and is not empty, or the disk refuses.
    """

    def __init__(self, folder: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, job: Digest | None = None) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists already; remove it or choose another name for the new folder")
        self.folder = folder
        self.stage = folder.with_name(f".{folder.name}.part")
        self._max_shard_bytes = max_shard_bytes
        with writing(self.stage):
            _prepare_stage(self.stage, job)
            self._entries, self._shard = _recover(self.stage)
            self._journal = (self.stage / _JOURNAL).open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._journal.close()
        self._shard.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Names of the tensors written so far, including those of an interrupted run, in the order of writing."""
        return list(self._entries)

    def read(self, name: str) -> Tensor:
        """A tensor that was written, here or by an interrupted run."""
        entry = self._entries[name]
        file, offset = _shard_file(self.stage, entry.shard), _DATA_START + entry.offset
        return read_tensor(TensorInfo(name, DTYPES[entry.dtype], tuple(entry.shape), file, offset, entry.num_bytes))

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor (from any device, with any strides).

        Raises:
            CheckpointError: the name was written before, safetensors does not have the dtype, or the disk refuses.
        """
        if name in self:
            raise CheckpointError(f"tensor {name!r} was written to {self.folder} twice; each name once was expected")
        if tensor.dtype not in DTYPE_NAMES:
            known = ", ".join(map(str, DTYPE_NAMES))
            raise CheckpointError(f"tensor {name!r} has dtype {tensor.dtype}; expected one of {known}")
        dense = tensor.detach().to("cpu").contiguous()
        with writing(self.stage):
            if not self._shard.has_room(name, dense.numel() * dense.element_size(), self._max_shard_bytes):
                self._shard.seal()
                self._shard = _open_shard(self.stage, self._shard.index + 1)
            entry = self._shard.append(name, dense)
            self._journal.write(json.dumps(vars(entry)) + "\n")
            self._journal.flush()
        self._entries[name] = entry

    @property
    def weights_digest(self) -> Digest:
        """Digest of the tensors written so far."""
        entries = self._entries.values()
        return combine([TensorDigest(e.name, e.dtype, tuple(e.shape), e.sha256) for e in entries])

    def finish(
        self,
        *,
        source_digest: Digest | None = None,
        quantizer: dict[str, Any] | None = None,
        pair: Digest | None = None,
    ) -> Digest:
        """Write the last header, the index and the identity, and rename the folder; returns the base's digest.

        Raises:
            CheckpointError: the disk refuses, or the config.json or tokenizer in `stage` cannot be read.
        """
        digest = self.weights_digest
        with writing(self.folder):
            self._shard.seal()
            self._name_shards()
            write_identity(self.stage, BaseIdentity(digest, source_digest, quantizer, pair))
            identity = read_identity(self.stage)
            self._journal.close()
            for file in (_JOURNAL, _JOB):
                (self.stage / file).unlink()
            if self.folder.exists():
                self.folder.rmdir()
            rename_synced(self.stage, self.folder)
        return identity.digest

    def _name_shards(self) -> None:
        count = self._shard.index + 1
        if count == 1:
            self._shard.file.rename(self.stage / SINGLE_FILE)
            return
        names = [f"model-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]
        for index, name in enumerate(names):
            _shard_file(self.stage, index).rename(self.stage / name)
        weight_map = {entry.name: names[entry.shard] for entry in self._entries.values()}
        total = sum(entry.num_bytes for entry in self._entries.values())
        write_json(self.stage / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _prepare_stage(stage: Path, job: Digest | None) -> None:
    """Keep the staging folder of the same job, otherwise make an empty one."""
    file = stage / _JOB
    if job is None or not file.is_file() or file.read_text(encoding="utf-8") != str(job):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True, exist_ok=True)
        write_text(file, str(job))


def _shard_file(stage: Path, index: int) -> Path:
    return stage / f"shard-{index:05d}.part"


def _open_shard(stage: Path, index: int) -> Shard:
    return Shard(_shard_file(stage, index), index)


def _recover(stage: Path) -> tuple[dict[str, ShardTensor], Shard]:
    """The complete tensors of an interrupted run, and the shard to continue; the journal is cut after them.

    Weights under their final names come from a run that ended inside `finish`, and are written again.
    """
    for file in [*stage.glob("model*.safetensors"), stage / INDEX_FILE]:
        file.unlink(missing_ok=True)
    kept: dict[str, ShardTensor] = {}
    shard = _open_shard(stage, 0)
    for entry in _read_journal(stage / _JOURNAL):
        if entry.shard != shard.index:
            shard.seal()  # a full shard, whose header may be missing
            shard = _open_shard(stage, entry.shard)
        if not shard.holds(entry):
            break
        shard.keep(entry)
        kept[entry.name] = entry
    lines = [json.dumps(vars(entry)) + "\n" for entry in kept.values()]
    write_text(stage / _JOURNAL, "".join(lines))
    return kept, shard


def _read_journal(file: Path) -> list[ShardTensor]:
    """The complete lines of a journal, up to the first damaged one."""
    entries: list[ShardTensor] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            entries.append(ShardTensor(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return entries


# Sidecars are the files of a model folder that are not weights. This lists what is copied rather than what is not: code
# (*.py) and pickles never are.
_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_STEMS = ("LICENSE", "LICENCE", "NOTICE")
_WRITTEN_ANEW = {INDEX_FILE, IDENTITY_FILE, "adapter_config.json", "graftline.json", "quantization.json"}


def sidecars(folder: Path) -> list[Path]:
    """Config, tokenizer, chat template and licence files of a model folder, sorted."""
    found = (file for file in folder.iterdir() if file.is_file() and file.name not in _WRITTEN_ANEW)
    return sorted(file for file in found if file.suffix in _SUFFIXES or file.name.startswith(_STEMS))


def copy_sidecars(source: Path, out: Path) -> None:
    """Copy the sidecars of a model folder into ``out``."""
    for file in sidecars(source):
        with writing(out / file.name):
            shutil.copyfile(file, out / file.name)
