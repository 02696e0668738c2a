"""A tiny project whose every input is the same on every machine: weights, rows and settings.

The weights come from SHAKE-256 as multiples of a power of two. torch's own generator would not do: its normal
distribution has other last digits on other processors, and with them the base's digest.
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from tests.tiny import make_tokenizer, tiny_llama_config

LABELS = ("cat", "dog")
_WORDS = {"cat": ("purrs", "meows", "climbs"), "dog": ("barks", "fetches", "digs")}

SETTINGS: dict[str, Any] = {
    "base": {"source": "path:base", "dtype": "float32", "template": "none", "license": "Apache-2.0"},
    "data": {
        "source": "path:rows.jsonl",
        "license": "CC0-1.0",
        "evaluation_rows": 40,
        "max_tokens": 64,
        "labels": list(LABELS),
    },
    "quantize": {"method": "none"},
    "adapter": {"method": "lora", "rank": 4, "alpha": 8},
    "train": {"steps": 5, "batch_size": 8, "learning_rate": 0.005, "threads": 1, "checkpoint_every": 0, "seed": 0},
    "evaluate": {"metric": "accuracy"},
    "gates": {
        "accuracy": {
            "metric": "accuracy",
            "direction": "higher",
            "test": "non-inferiority",
            "margin": 0.1,
            "min_items": 40,
            "against": "production",
        }
    },
    "package": {"merged": True, "dtype": "float32"},
    "release": {"store": "store", "channel": "production"},
}
"""One pipeline of pipelines.yaml; `pipeline` changes it."""


def pipeline(changes: dict[str, Any]) -> dict[str, Any]:
    """The settings with other values; a key is ``section.name``, None takes it out."""
    settings = copy.deepcopy(SETTINGS)
    for key, value in changes.items():
        section, name = key.split(".")
        settings[section][name] = value
        if value is None:
            del settings[section][name]
    return settings


def make_project(root: Path) -> Path:
    """A project folder with a base and rows, and no pipeline yet."""
    make_base(root / "base")
    rows = "".join(json.dumps(row) + "\n" for row in make_rows(120))
    (root / "rows.jsonl").write_text(rows, encoding="utf-8")
    return root


def write_pipeline(root: Path, name: str, changes: dict[str, Any]) -> None:
    """Make this the project's only pipeline."""
    document = {"pipelines": {name: pipeline(changes)}, "channels": {"production": {}}}
    (root / "pipelines.yaml").write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML


def make_base(folder: Path, *, size: float = 0.125, **changes: object) -> Path:
    """A tiny Llama with its tokenizer. Weights are evenly spread over ±``size``, a power of two; norms are near 1."""
    model = LlamaForCausalLM(tiny_llama_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = hashlib.shake_256(name.encode()).digest(2 * parameter.numel())
            values = torch.from_numpy(np.frombuffer(drawn, "<i2").astype(np.float32)) / 2**15
            is_norm = parameter.ndim == 1
            parameter.copy_((values * size).reshape(parameter.shape) + (1 if is_norm else 0))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_rows(count: int) -> list[dict[str, str]]:
    """Rows whose label follows from one word; no two prompts are alike."""
    rows = []
    for index in range(count):
        label = LABELS[index % 2]
        letters = hashlib.sha256(str(index).encode()).hexdigest()[:12]
        word = _WORDS[label][int(letters, 16) % 3]
        rows.append({"prompt": f"{' '.join(letters)} {word}:", "completion": f" {label}"})
    return rows
