"""Rows and adapted models for the tests of training. The adapters are peft's: training must not care whose they are."""

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.data.template import Encoded


def make_rows(count: int, *, seed: int = 0, vocab_size: int = 512, longest: int = 24) -> list[Encoded]:
    """Rows of random length whose last one to four tokens are supervised; the first token decides them."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [chooser.randrange(4, vocab_size) for _ in range(chooser.randrange(3, longest - 4))]
        completion = [prompt[0] % 3 + 4] * chooser.randrange(1, 5)
        rows.append(Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion)))
    return rows


def lora_model(
    folder: Path, *, dropout: float = 0.0, targets: str | list[str] = "all-linear", seed: int = 1
) -> PreTrainedModel:
    """The model in ``folder`` with LoRA of rank 4 on its linear layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config).get_base_model()


def trainable(model: PreTrainedModel) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
