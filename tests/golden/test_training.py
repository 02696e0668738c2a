"""What training gives: losses, and the adapter of every method, on bases of every kind.

Where the processor decides last digits, tensors are recorded as their norm and their directions. README.md has what was
measured between instruction sets, and what the bounds find.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden import product
from tests.golden.record import Bound, Golden
from tests.golden.world import make_project, write_pipeline

BOUND = Bound(relative=1e-5, absolute=1e-5)
BOUNDS = {
    "pissa": Bound(relative=1e-4, absolute=1e-4),  # starts from a decomposition
    "bf16": Bound(relative=3e-2, absolute=3e-2),
    "loftq": Bound(relative=1e-2, absolute=1e-2),
    "qpissa": Bound(relative=1e-2, absolute=1e-2),
}
PAIRED = ("loftq", "qpissa")
"""Their codes are chosen for what a decomposition left: where a weight lies between two codes, rounding decides."""
_NO_ALPHA = {"adapter.alpha": None}
_NOT_MERGED = _NO_ALPHA | {"package.merged": False}

TRAININGS: dict[str, dict[str, Any]] = {
    "full": _NO_ALPHA | {"adapter.method": "full", "adapter.rank": None, "train.learning_rate": 0.0005},
    "houlsby": _NOT_MERGED | {"adapter.method": "houlsby"},
    "pfeiffer": _NOT_MERGED | {"adapter.method": "pfeiffer"},
    "lora": {},
    "rslora": {"adapter.method": "rslora"},
    "dora": {"adapter.method": "dora"},
    "pissa": {"adapter.method": "pissa"},
    "vera": _NO_ALPHA | {"adapter.method": "vera", "adapter.rank": 16, "train.learning_rate": 0.05},
    "loftq": {"adapter.method": "loftq", "quantize.method": "nf4", "quantize.init": "loftq"},
    "qpissa": {"adapter.method": "pissa", "quantize.method": "nf4", "quantize.init": "qpissa"},
    "nf4": {"quantize.method": "nf4"},
    "nf3": {"quantize.method": "nf3", "quantize.double_quant": False},
    "nf2": {"quantize.method": "nf2", "quantize.block_size": 32},
    "mixed": {"quantize.method": "mixed", "quantize.bits": {"0-0": 2, r".*\.up_proj": 3}},
    "accumulated": {"train.batch_size": 4, "train.gradient_accumulation": 2},
    "packed": {"train.packing": True},
    "recomputed": {"train.gradient_checkpointing": True},
    "bf16": {"train.precision": "bf16"},
    "dropout": {"adapter.dropout": 0.2},
    "scheduled": {
        "train.scheduler": "cosine",
        "train.warmup_steps": 2,
        "train.weight_decay": 0.1,
        "train.lr_ratio_b": 16.0,
        "train.max_grad_norm": 0.5,
    },
    "held-out": {"train.held_out_rows": 16, "train.evaluate_every": 2, "train.learning_rate": 0.05},
    "placed": {
        "adapter.targets": ["q_proj", "down_proj"],
        "adapter.rank_pattern": {"q_proj": 2},
        "adapter.alpha_pattern": {"down_proj": 32},
    },
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_gives_the_recorded_losses_and_adapter(name: str, project: Path, golden: Golden) -> None:
    write_pipeline(project, name, TRAININGS[name])
    product.run_stages(project, name, ("resolve", "fetch", "init", "train"))
    runs = project / "runs" / name
    adapter = runs / "train" / "adapter"
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        (weights,) = adapter.glob("*.safetensors")
    golden.bytes_on_this_machine(f"training/{name}.safetensors", weights.read_bytes())
    found = {
        "losses": json.loads((runs / "train" / "history.json").read_text(encoding="utf-8")),
        "metrics": metrics_of(runs / "train" / "metrics.json"),
        "files": {path.name: identity_of(path) for path in sorted(adapter.glob("*.json"))},
        "base": {
            key: {"type": str(array.dtype)} if name in PAIRED else summary(array)
            for key, array in quantized_tensors(runs / "init" / "base")
        },
        "adapter": {key: summary(array) for key, array in sorted(load_file(weights).items())},
    }
    golden.values(f"training/{name}.json", found, BOUNDS.get(name, BOUND))


def metrics_of(path: Path) -> dict[str, Any]:
    """Without what the machine decides: speed and memory."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in metrics.items() if key not in ("tokens_per_second", "peak_bytes")}


def identity_of(path: Path) -> Any:
    """A JSON file beside the weights, without digests of what rounding or the names of settings decide.

    The table that constants are quantized with has other last digits on other processors, so a quantized base has
    another digest there.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("quantizer"):
        content["base_digest"] = "sha256:…"
    if "training_run" in content:
        content["training_run"] = content["training_run"].rpartition("-")[0]
    if "initial_digest" in content:
        content["initial_digest"] = content["initial_digest"] and "sha256:…"
    return content


def quantized_tensors(base: Path) -> list[tuple[str, Any]]:
    """The tensors of the first block's quantized layers, by name."""
    files = sorted(base.glob("*.safetensors")) if base.is_dir() else []
    tensors = {key: array for path in files for key, array in load_file(path).items()}
    return sorted((key, array) for key, array in tensors.items() if ".layers.0." in key and ".weight" in key)


def summary(array: Any) -> Any:
    """Integers: their digest, which no processor changes. Otherwise norm, and cosines with two fixed directions."""
    kind = f"{array.dtype} {list(array.shape)}"
    if not np.issubdtype(array.dtype, np.floating):
        return {"type": kind, "sha256": hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]}
    flat = array.astype(np.float64).ravel()
    norm, places = float(np.sqrt(np.sum(flat * flat))), np.arange(1, flat.size + 1)
    cosines = []
    for step in (1.0, 0.37):
        direction = np.cos(step * places)
        cosines.append(float(np.sum(flat * direction) / np.sqrt(np.sum(direction * direction)) / (norm or 1.0)))
    return {"type": kind, "norm": norm, "cosines": cosines}
