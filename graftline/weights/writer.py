"""Write a model folder one tensor at a time, and go on after an interruption.

Everything is written to a stage folder ``.<name>.part`` beside the final one, which appears by one rename at the end.
``journal.jsonl`` in it gets one line for each tensor whose bytes were written. A writer for the same job hashes the
bytes of those lines again and keeps the tensors up to the first that does not agree.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from graftline.digest import Digest, write_json
from graftline.errors import CheckpointError
from graftline.weights.disk import writing
from graftline.weights.header import DTYPE_NAMES
from graftline.weights.identity import BaseIdentity, TensorDigest, combine, read_identity, write_identity
from graftline.weights.reader import INDEX_FILE, SINGLE_FILE
from graftline.weights.shard import Entry, Shard

DEFAULT_SHARD_BYTES = 4 * 1024**3
_JOURNAL = "journal.jsonl"
_JOB = "job"


class CheckpointWriter:
    """Writes ``folder``; use as a context manager, and call `finish` inside it.

    Files that are not weights go to `stage`; they arrive in ``folder`` together with the weights.

    job: digest of everything that decides the content. What an interrupted run of the same job left is kept; without
    a job, or after another one, writing starts anew.

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
        """Names of the tensors written so far, those of an interrupted run included, in the order of writing."""
        return list(self._entries)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any device; strides are made dense).

        Raises:
            CheckpointError: the name was written before, the dtype has no name in safetensors, the disk refuses.
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
        """Write the last header, the index and the identity, let the folder appear; returns the digest of the base.

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
            self.stage.rename(self.folder)
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
    """Keep the stage folder of the same job, otherwise make an empty one."""
    file = stage / _JOB
    if job is None or not file.is_file() or file.read_text(encoding="utf-8") != str(job):
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True, exist_ok=True)
        file.write_text(str(job), encoding="utf-8")


def _shard_file(stage: Path, index: int) -> Path:
    return stage / f"shard-{index:05d}.part"


def _open_shard(stage: Path, index: int) -> Shard:
    return Shard(_shard_file(stage, index), index)


def _recover(stage: Path) -> tuple[dict[str, Entry], Shard]:
    """Tensors that an interrupted run left complete, and the shard to go on with; the journal is cut behind them.

    Weights under their final names are of a run that ended inside `finish`: they are written again.
    """
    for file in [*stage.glob("model*.safetensors"), stage / INDEX_FILE]:
        file.unlink(missing_ok=True)
    kept: dict[str, Entry] = {}
    shard = _open_shard(stage, 0)
    for entry in _read_journal(stage / _JOURNAL):
        if entry.shard != shard.index:
            shard.seal()  # a full shard: if the run ended before it had its header, it gets it now
            shard = _open_shard(stage, entry.shard)
        if not shard.holds(entry):
            break
        shard.keep(entry)
        kept[entry.name] = entry
    lines = [json.dumps(vars(entry)) + "\n" for entry in kept.values()]
    (stage / _JOURNAL).write_text("".join(lines), encoding="utf-8")
    return kept, shard


def _read_journal(file: Path) -> list[Entry]:
    """Complete lines of a journal; a line that was cut short ends it."""
    entries: list[Entry] = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            entries.append(Entry(**json.loads(line)))
        except (ValueError, TypeError):
            break
    return entries
