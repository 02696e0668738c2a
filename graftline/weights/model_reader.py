"""A model folder read under the names that the model's class has, however the folder spells them.

transformers loads folders that differ from what it writes itself, and so must this project:

    buffers        rotary frequencies and causal masks, which old files hold, are computed and left out
    no prefix      ``wte.weight`` for ``transformer.wte.weight``, as in a model that was saved without its head
    tied head      stored under the head's name only, listed in the index without being stored, or stored twice
    beside it      a value head, a vision tower: parts that the class does not have at all

A tensor that has no place inside the model is not among them: the loader refuses it.
"""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from graftline.errors import CheckpointError
from graftline.weights.arch import Architecture, read_architecture
from graftline.weights.config import read_config
from graftline.weights.header import TensorInfo
from graftline.weights.reader import INDEX_FILE, CheckpointReader

logger = logging.getLogger(__name__)


class ModelReader(CheckpointReader):
    """A model folder's tensors by the names of its class.

    Raises:
        CheckpointError: as `CheckpointReader`, no supported architecture, or the index names a tensor that no shard
            holds and that the model needs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.architecture: Architecture = read_architecture(folder)
        self._tensors = self._own_names(self._tensors)
        self._check_absent()

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration, with ``tie_word_embeddings`` as the weights have it.

        Where the class ties and the folder holds two different tensors, both are used, as transformers does.
        """
        config = read_config(self.folder)
        head, embedding = self.tied_names
        if config.tie_word_embeddings and head in self and embedding in self:
            same = self.info(head).shape == self.info(embedding).shape
            if not same or not torch.equal(self.read(head), self.read(embedding)):
                logger.warning("%s ties %s to %s, but stores two tensors: both are used", self.folder, head, embedding)
                config.tie_word_embeddings = False
        return config

    @property
    def tied_names(self) -> tuple[str, str]:
        """Names of the head's and the embedding's weight."""
        return f"{self.architecture.head}.weight", f"{self.architecture.embedding}.weight"

    def _own_names(self, stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        architecture, own, beside = self.architecture, {}, []
        bare = not any(name.startswith(f"{architecture.root}.") for name in stored)
        for name, info in stored.items():
            first = name.partition(".")[0]
            if architecture.is_buffer(name):
                continue
            if first != architecture.head and bare:
                name = f"{architecture.root}.{name}"
            elif first not in (architecture.head, architecture.root):
                beside.append(name)
                continue
            own[name] = replace(info, name=name)
        if beside:
            logger.warning(
                "%s: %d tensors are left out, %s does not have them: %s",
                self.folder, len(beside), architecture.name, ", ".join(sorted(beside)[:5]),
            )  # fmt: skip
        head, embedding = self.tied_names
        if embedding not in own and head in own and read_config(self.folder).tie_word_embeddings:
            own[embedding] = replace(own.pop(head), name=embedding)
        return own

    def _check_absent(self) -> None:
        head, _ = self.tied_names
        needed = [name for name in self.absent if not self.architecture.is_buffer(name)]
        if needed == [head] and read_config(self.folder).tie_word_embeddings:
            return
        if needed:
            raise CheckpointError(
                f"{self.folder / INDEX_FILE} names {needed[0]!r} in {self.absent[needed[0]]}, which does not hold it "
                f"({len(needed)} such tensors); fetch the model folder again"
            )
