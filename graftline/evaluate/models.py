"""The models of an evaluation: which folders they are, and one of them in memory at a time."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.peft_format import AdapterWeights, load_adapter, put_on_model
from graftline.data.template import template_digest
from graftline.digest import Digest
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model


@dataclass(frozen=True)
class Model:
    """A model to score: a folder with a base or a merged model, and an adapter on it or none."""

    base: Path = field(compare=False)
    base_digest: Digest
    """Of everything in the folder: two folders with one digest hold the same model."""
    adapter: Path | None = None
    owns_base: bool = True
    """Whether the adapter was trained on this very base; a foreign one is refused then."""


class ModelInMemory:
    """At most one model, in fp32. A base that is there without an adapter is used for the next adapter on it."""

    def __init__(self, *, template: str, device: str) -> None:
        """Hold nothing yet.

        Args:
            template: name of the chat template; an adapter that was trained with another one is refused.
            device: where models are loaded to, such as ``cpu``.
        """
        self.template, self.device = template, device
        self._holds: Model | None = None
        self._model: PreTrainedModel | None = None

    def get(self, wanted: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer; what was held before may no longer be used.

        Raises:
            BaseMismatchError: the adapter belongs to another base or template.
            AdapterError: the adapter's files are damaged, or made for another architecture.
            CheckpointError: the base's folder is damaged.
        """
        if self._model is None or self._holds != wanted:
            bare = Model(wanted.base, wanted.base_digest)
            if self._model is None or self._holds != bare:
                # The former model is freed before the next one is loaded.
                self._holds = self._model = None
                gc.collect()
                self._model = load_model(wanted.base, device=self.device, dtype=torch.float32).eval()
            self._holds = None  # until the adapter is on it
            self._put_adapter(self._model, wanted)
            self._holds = wanted
        return self._model, load_tokenizer(wanted.base)

    def _put_adapter(self, model: PreTrainedModel, wanted: Model) -> None:
        if wanted.adapter and wanted.owns_base:
            template = template_digest(load_tokenizer(wanted.base), self.template)
            load_adapter(model, wanted.adapter, base=read_identity(wanted.base), template_digest=template)
        elif wanted.adapter:
            put_on_model(model, AdapterWeights.open(wanted.adapter))
            model.eval()


def check_adapter(model: Model, template: str) -> None:
    """Refuse what loading the model would refuse, without loading it.

    Raises:
        BaseMismatchError: the adapter belongs to another base or template.
        AdapterError: the adapter's files are damaged.
    """
    if model.adapter and model.owns_base:
        digest = template_digest(load_tokenizer(model.base), template)
        AdapterWeights.open(model.adapter).check_base(read_identity(model.base), digest)
