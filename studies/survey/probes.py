"""What needs no training: perplexity by code (claim 6), and gradients by rank at step 0 (claim 2), on SmolLM2-135M."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftline.adapters.attach import adapter_layers, attach
from graftline.data.encoding import encode_rows
from graftline.data.rows import rows_from_objects
from graftline.evaluate.scoring import score_documents
from graftline.settings.model import Adapter
from graftline.train.batches import pad_rows
from graftline.train.loss import SupervisedLoss
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.scheme import Scheme
from graftline.weights.reader import read_architecture
from studies.harness import demo_base
from studies.survey.text import TEMPLATE

BLOCK = 64
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E3M0 = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
CODES = {
    "FP4 (E2M1)": _E2M1,
    "FP4 (E3M0)": _E3M0,
    "Int4": tuple(float(value) for value in range(8)),
}
"""Magnitudes of a code's values before they are scaled to [0, 1]; each has both signs."""
RANKS = (4, 16, 64, 256)
WIDE = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers whose sides are both at least 256."""


def codes(text: Path) -> dict[str, Any]:
    """NLL of general text by document, for 16 bits and every code in blocks of 64."""
    base = demo_base()
    tokenizer, documents = load_tokenizer(base), json.loads((text / "general.json").read_text())
    found: dict[str, Any] = {}
    for name in ("16 bits", "NF4", "NF4, double quantization", *CODES):
        model, error = load_model(base), 0.0
        if name != "16 bits":
            error = _requantize(model, base, name)
        scores = score_documents(model, tokenizer, documents, batch_tokens=2048)
        found[name] = {
            "weight_error": round(error, 5),
            "nll": [round(score.nll, 4) for score in scores],
            "tokens": [score.num_tokens for score in scores],
        }
        print(
            name,
            found[name]["weight_error"],
            math.exp(sum(found[name]["nll"]) / sum(found[name]["tokens"])),
            flush=True,
        )
    return {
        "codes": found,
        "bits_per_weight": {str(dq): Scheme("nf4", 64, dq).bits_per_weight for dq in (False, True)},
    }


def _requantize(model: PreTrainedModel, base: Path, name: str) -> float:
    """Round every linear weight inside the blocks to the code; returns the mean relative Frobenius error."""
    arch, errors = read_architecture(base), []
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and arch.is_linear_weight(f"{path}.weight"):
            rounded = _round(layer.weight.data, name)
            errors.append(float((rounded - layer.weight.data).norm() / layer.weight.data.norm()))
            layer.weight.data = rounded
    return sum(errors) / len(errors)


def _round(weight: Tensor, name: str) -> Tensor:
    if name.startswith("NF4"):
        return dequantize(quantize(weight, Scheme("nf4", BLOCK, double_quant="double" in name)))
    return round_to(weight, CODES[name])


def round_to(weight: Tensor, magnitudes: Sequence[float]) -> Tensor:
    """Each block of 64 scaled by its largest magnitude to the nearest of ± ``magnitudes``; the shape is kept."""
    scaled = torch.tensor(magnitudes) / max(magnitudes)
    table = torch.cat([-scaled.flip(0), scaled[1:]])
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)
    chosen = torch.bucketize(blocks / absmax, (table[1:] + table[:-1]) / 2)
    return (table[chosen] * absmax).reshape(weight.shape)


def gradients(text: Path) -> dict[str, Any]:
    """Frobenius norm of the gradient of all B at step 0, LoRA and rsLoRA, alpha 16, three seeds of A."""
    base = demo_base()
    tokenizer = load_tokenizer(base)
    lines = (text / "task.jsonl").read_text().splitlines()[:16]
    rows = rows_from_objects((json.loads(line) for line in lines), origin="task.jsonl", format="prompt-completion")
    encoded = encode_rows(rows, tokenizer, template=TEMPLATE, max_tokens=128, overlength="drop").encoded
    batch = pad_rows(encoded)
    found: dict[str, dict[str, list[float]]] = {}
    for method in ("lora", "rslora"):
        found[method] = {}
        for rank in RANKS:
            norms = []
            for seed in (0, 1, 2):
                model = load_model(base)
                attach(model, Adapter(method=method, rank=rank, alpha=16, targets=WIDE), seed=seed)
                SupervisedLoss(model)(batch, num_supervised=torch.tensor(len(batch["targets"]))).backward()
                norms.append(math.sqrt(sum(_square(layer.B.grad) for layer in adapter_layers(model).values())))
            found[method][str(rank)] = [round(norm, 6) for norm in norms]
            print(method, rank, norms, flush=True)
    return {"gradients": found}


def _square(gradient: Any) -> float:
    return float(gradient.square().sum())


PROBES = {"codes": codes, "gradients": gradients}
