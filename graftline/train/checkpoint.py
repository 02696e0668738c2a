"""Training checkpoints and the step journal, from which a killed training resumes.

``work/checkpoint-<step>/`` holds the trainable parameters (safetensors), optimizer, scheduler and random state, and
``graftline.json`` with the digest of every file and of the training's inputs. A checkpoint is written under a temporary
name and renamed when complete. Frozen parameters are never written: the base has them.

``work/steps.jsonl`` holds one line per step. After a resume, replayed losses are compared with the recorded ones.
"""

import contextlib
import ctypes
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graftline.digest import Digest, of_folder, rename_synced, sync_tree, write_json, write_text
from graftline.errors import TrainError, disk_error
from graftline.train.optimizers import restore_paging
from graftline.train.results import StepMetrics

_LOG = logging.getLogger(__name__)
_KEEP = 2
_ADAPTER, _STATE = "adapter.safetensors", "state.pt"
IDENTITY = "graftline.json"
"""Written last: a checkpoint without it is incomplete."""
_FORMAT = 2
"""Format 1 was written by transformers' Trainer; such a training restarts and takes the same steps."""
_JOURNAL = "steps.jsonl"
_OTHER_TRAINING = (
    "{folder} belongs to a training with other rows, settings or adapter ({given}, this one is {expected}); "
    "give another work folder or delete this one"
)


def save_trainable(model: nn.Module, folder: Path) -> None:
    """Write the trainable parameters by name."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _trainable(model).items()}
    with _told(folder / _ADAPTER):
        save_file(tensors, folder / _ADAPTER)


def saved_trainable(folder: Path) -> dict[str, Tensor]:
    """Read what `save_trainable` wrote."""
    return load_file(folder / _ADAPTER)


def load_trainable(model: nn.Module, folder: Path) -> None:
    """Load the parameters that `save_trainable` wrote into the model.

    Raises:
        TrainError: the model's trainable parameters have different names or shapes.
    """
    saved, live = saved_trainable(folder), _trainable(model)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in live.items()}:
        raise TrainError(
            f"{folder} holds {len(saved)} parameters that are not the {len(live)} trainable ones of this model; "
            "give the adapter's settings that it was started with, or another work folder"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def save_state(folder: Path, *, optimizer: Optimizer, schedule: LRScheduler, scaler: GradScaler) -> None:
    """Write the training state other than the parameters."""
    parts = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": scaler.state_dict()}
    save_object(parts, folder / _STATE)


def save_object(value: object, path: Path) -> None:
    """`torch.save`, with the disk's error as an OSError: on its own it ends in a RuntimeError about a position."""
    with _told(path), path.open("wb") as stream:
        torch.save(value, stream)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None or isinstance(error, OSError):
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def load_state(folder: Path, *, optimizer: Optimizer, schedule: LRScheduler, scaler: GradScaler) -> None:
    """Restore what `save_state` wrote; paged optimizer states are paged again."""
    parts = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(parts["optimizer"])
    schedule.load_state_dict(parts["schedule"])
    scaler.load_state_dict(parts["scaler"])
    restore_paging(optimizer)


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def new_checkpoint(work: Path, step: int, *, inputs: Digest) -> Iterator[Path]:
    """Yield a folder for a checkpoint; it becomes ``checkpoint-<step>`` when the block ends without an error.

    ``inputs`` is the digest of all inputs of the training. All but the newest two checkpoints are removed.

    Raises:
        TrainError: the disk is full or not writable.
    """
    with replace_folder(work / f"checkpoint-{step}") as folder:
        yield folder
        files = {name: str(digest) for name, digest in of_folder(folder).items()}
        write_json(folder / IDENTITY, {"format": _FORMAT, "step": step, "inputs": str(inputs), "files": files})
    for old in checkpoints_in(work)[:-_KEEP]:
        shutil.rmtree(old)


@contextlib.contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
    """Yield a folder to write into; it replaces ``final`` when the block ends without an error.

    Raises:
        TrainError: the disk is full or not writable.
    """
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_tree(temporary)
        if not _exchange(temporary, final):
            shutil.rmtree(final, ignore_errors=True)
            rename_synced(temporary, final)
    except OSError as error:
        raise TrainError(
            f"cannot write {final}: {error.strerror or error}; make space there, then run again: it goes on"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


_EXCHANGE, _AT_WORKING_FOLDER = 2, -100  # RENAME_EXCHANGE and AT_FDCWD, renameat2(2)


def _exchange(folder: Path, other: Path) -> bool:
    """Swap the names of two folders at once, where the system can; there is no moment in which one is missing."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    if rename is None or not other.exists():
        return False
    names = (_AT_WORKING_FOLDER, os.fsencode(folder), _AT_WORKING_FOLDER, os.fsencode(other))
    return bool(rename(*names, _EXCHANGE) == 0)


def checkpoints_in(work: Path) -> list[Path]:
    """The checkpoints in ``work``, oldest first."""
    found = [path for path in work.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which the checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_step(work: Path) -> int:
    """Step of the newest checkpoint in ``work``, intact or not; 0 if there is none."""
    return max(map(step_of, checkpoints_in(work)), default=0)


def latest_checkpoint(work: Path, *, inputs: Digest) -> Path | None:
    """The newest intact checkpoint; damaged ones are skipped with a warning.

    Raises:
        TrainError: it belongs to a training with different inputs.
    """
    for leftover in work.glob(".checkpoint-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in reversed(checkpoints_in(work)):
        identity = _verified(folder)
        if identity is None:
            _LOG.warning("%s is damaged, or an earlier version wrote it; it is not used", folder)
        elif identity["inputs"] != str(inputs):
            raise TrainError(_OTHER_TRAINING.format(folder=folder, given=identity["inputs"], expected=inputs))
        else:
            return folder
    return None


def _verified(folder: Path) -> dict[str, object] | None:
    """The checkpoint's identity, or None if its files do not match it or its format is not the current one."""
    try:
        identity: dict[str, object] = json.loads((folder / IDENTITY).read_text(encoding="utf-8"))
        files = {name: str(digest) for name, digest in of_folder(folder).items() if name != IDENTITY}
    except (OSError, ValueError):
        return None
    return identity if identity.get("files") == files and identity.get("format") == _FORMAT else None


@dataclass(frozen=True)
class Replay:
    """Limits on the relative difference between a replayed loss and the recorded one."""

    told: float
    """Above this, the journal warns."""
    refused: float
    """Above this, the training stops."""


class Journal:
    """The steps of a training, one JSON line each, kept across restarts."""

    def __init__(
        self, work: Path, *, inputs: Digest, checkpoint: Path | None, replay: Replay, writes: bool = True
    ) -> None:
        """Read the existing journal and continue after ``checkpoint``, which holds the steps up to its own.

        Losses that an earlier process recorded for later steps are compared with the replayed ones. ``inputs`` is the
        digest of all inputs of the training. Only one of several processes ``writes``; all keep the steps in memory.

        Raises:
            TrainError: the journal belongs to another training, or steps before the checkpoint are missing.
        """
        self._path, self._replay, self._writes = work / _JOURNAL, replay, writes
        resumed_step = step_of(checkpoint) if checkpoint else 0
        recorded = _open_journal(self._path, inputs, checkpoint and checkpoint / _JOURNAL, writes=writes)
        self.steps = [metrics for metrics in recorded if metrics.step <= resumed_step]
        self._expected = {metrics.step: metrics.loss for metrics in recorded if metrics.step > resumed_step}
        if len(self.steps) != resumed_step:
            raise TrainError(
                f"{self._path} holds {len(self.steps)} of the {resumed_step} steps before the checkpoint; "
                f"all are expected: delete {work} to start anew"
            )

    def append(self, metrics: StepMetrics) -> None:
        """Record a step.

        Raises:
            TrainError: an earlier process recorded a different loss for it.
        """
        expected = self._expected.get(metrics.step)
        if expected is not None:
            self._compare(metrics, expected)
        self.steps.append(metrics)
        if expected is not None or not self._writes:
            return  # its line exists, and the next steps are compared with the lines after it
        with self._path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(metrics)) + "\n")

    def _compare(self, metrics: StepMetrics, expected: float) -> None:
        what = (
            f"step {metrics.step} has loss {metrics.loss:.6g} after the resume, but {expected:.6g} was recorded before"
        )
        if not math.isclose(metrics.loss, expected, rel_tol=self._replay.refused):
            raise TrainError(
                f"{what}; the base, the adapter or the code has changed: delete {self._path.parent} to start anew"
            )
        if not math.isclose(metrics.loss, expected, rel_tol=self._replay.told):
            _LOG.warning("%s: more than rounding explains; look whether the base or the machine has changed", what)

    def copy_to(self, folder: Path) -> None:
        """Copy the steps so far into a checkpoint: a power loss may destroy the journal's last lines."""
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[: len(self.steps) + 1]
        write_text(folder / _JOURNAL, "".join(lines))

    @property
    def losses(self) -> tuple[float, ...]:
        """Loss of every step so far."""
        return tuple(metrics.loss for metrics in self.steps)


def _open_journal(path: Path, inputs: Digest, copy: Path | None, *, writes: bool) -> list[StepMetrics]:
    """The recorded steps up to the first incomplete line; the file is truncated there, or created if missing.

    If the checkpoint's ``copy`` holds more steps, the copy is used.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = copy.read_text(encoding="utf-8").splitlines(keepends=True) if copy and copy.exists() else []
    if len(_whole(lines)) < len(_whole(kept)):
        lines = kept
    header = json.dumps({"format": 1, "inputs": str(inputs)}) + "\n"
    if lines and lines[0].endswith("\n") and lines[0] != header:
        given = json.loads(lines[0])["inputs"]
        raise TrainError(_OTHER_TRAINING.format(folder=path.parent, given=given, expected=inputs))
    steps = _whole(lines)
    if writes:
        write_text(path, header + "".join(lines[1 : len(steps) + 1]))
    return steps


def _whole(lines: list[str]) -> list[StepMetrics]:
    """The steps in the lines after the header, up to the first that is incomplete or out of sequence."""
    steps: list[StepMetrics] = []
    for line in lines[1:]:
        metrics = _parse_line(line)
        if metrics is None or metrics.step != len(steps) + 1:
            break
        steps.append(metrics)
    return steps


def _parse_line(line: str) -> StepMetrics | None:
    """The step of a line, or None if a kill cut the line short."""
    if not line.endswith("\n"):
        return None
    try:
        return StepMetrics(**json.loads(line))
    except (ValueError, TypeError):
        return None
