"""The models of an evaluation: their folders, and at most one of them in memory at a time."""

import gc
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.peft_format import AdapterWeights, load_adapter, put_on_model
from graftline.data.template import template_digest
from graftline.digest import Digest
from graftline.weights.identity import read_identity
from graftline.weights.kept_base import load_base
from graftline.weights.model_folder import load_tokenizer


@dataclass(frozen=True)
class Model:
    """A model to score: a folder with a base or merged model, and an optional adapter."""

    base: Path = field(compare=False)
    base_digest: Digest
    """Digest of the whole folder: folders with equal digests hold the same model."""
    adapter: Path | None = None
    owns_base: bool = True
    """Whether the adapter was trained on this exact base; if so, a mismatch is refused."""


class ModelInMemory:
    """At most one model. A loaded base without an adapter is reused for the next adapter on it."""

    def __init__(self, *, template: str, device: str, dtype: torch.dtype = torch.float32) -> None:
        """Start without a model.

        Args:
            template: name of the chat template; an adapter that was trained with another one is refused.
            device: where to load models, such as ``cpu``.
            dtype: number type of the arithmetic. A model whose adapter holds weights of the base (`full`, modules saved
                whole) is computed in fp32 all the same, as those are. fp32 elsewhere than on a CPU keeps 16-bit weights
                as they are stored (`graftline.weights.stored`).
        """
        self.template, self.device, self.dtype = template, device, dtype
        self._holds: Model | None = None
        self._is_plain = True
        self._model: PreTrainedModel | None = None

    def get(self, wanted: Model) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer; the previous model must no longer be used.

        Raises:
            BaseMismatchError: the adapter belongs to another base or template.
            AdapterError: the adapter's files are damaged, or made for another architecture.
            CheckpointError: the base's folder is damaged.
        """
        if self._model is None or self._holds != wanted:
            bare, is_plain = Model(wanted.base, wanted.base_digest), self._must_be_plain(wanted)
            if self._model is None or self._holds != bare or self._is_plain != is_plain:
                self.free()  # first, so that two are never in memory
                self._model, self._is_plain = self._load(wanted.base, is_plain), is_plain
            self._holds = None  # until the adapter is on it
            self._put_adapter(self._model, wanted)
            self._holds = wanted
        return self._model, load_tokenizer(wanted.base)

    def free(self) -> None:
        """Give up the model."""
        self._holds = self._model = None
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _must_be_plain(self, wanted: Model) -> bool:
        """Whether every dense weight has to be fp32."""
        if self.device == "cpu" and self.dtype == torch.float32:
            return True
        return wanted.adapter is not None and AdapterWeights.open(wanted.adapter).holds_base_weights

    def _load(self, base: Path, is_plain: bool) -> PreTrainedModel:
        if is_plain:
            return load_base(base, device=self.device)
        return load_base(base, device=self.device, dtype=self.dtype, keep=self.dtype == torch.float32)

    def _put_adapter(self, model: PreTrainedModel, wanted: Model) -> None:
        if wanted.adapter and wanted.owns_base:
            template = template_digest(load_tokenizer(wanted.base), self.template)
            load_adapter(model, wanted.adapter, base=read_identity(wanted.base), template_digest=template)
        elif wanted.adapter:
            put_on_model(model, AdapterWeights.open(wanted.adapter))
            model.eval()


def check_adapter(model: Model, template: str) -> None:
    """Run the checks of `ModelInMemory.get` on the adapter without loading the model.

    Raises:
        BaseMismatchError: the adapter belongs to another base or template.
        AdapterError: the adapter's files are damaged.
    """
    if model.adapter and model.owns_base:
        digest = template_digest(load_tokenizer(model.base), template)
        AdapterWeights.open(model.adapter).check_base(read_identity(model.base), digest)
