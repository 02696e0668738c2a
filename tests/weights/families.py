"""A small model folder of each supported family, as transformers writes it."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftline.weights.reader import ARCHITECTURES

FAMILIES = tuple(ARCHITECTURES)
_SETTINGS = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(4, 20)[None]


def make_family(folder: Path, name: str, **changes: object) -> Path:
    """A random model of the class ``name`` in fp32, weights far enough from zero that every part is seen."""
    model_class = getattr(transformers, name)
    known = model_class.config_class().to_dict()
    names = model_class.config_class.attribute_map
    settings = {key: value for key, value in _SETTINGS.items() if key in known or key in names}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, *, remove: tuple[str, ...] = (), **values: object) -> Path:
    """Change a folder's config.json as somebody with an editor does."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for name in remove:
        del config[name]
    file.write_text(json.dumps(config | values), encoding="utf-8")
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Change the tensors of a folder with one file."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def split(folder: Path, **more: Tensor) -> dict[str, str]:
    """Put a folder's tensors into two shards, with ``more`` in the second; returns the map for the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        part = {name: tensors[name] for name in half} | (more if number == 2 else {})
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(half, shard)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str], **others: object) -> None:
    """Write the index of a folder with shards."""
    index = {"metadata": {}, "weight_map": weight_map, **others}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def logits(folder: Path) -> Tensor:
    """What transformers computes with a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits
