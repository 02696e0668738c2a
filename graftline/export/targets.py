"""Adapters for other software: what it can load, rewritten if necessary to compute the same, or why it cannot.

    vllm           LoRA only, one scale for all layers, no modules_to_save, ranks up to a class that a flag sets, none
                   on experts
    peft           LoRA, rsLoRA, DoRA, PiSSA (as LoRA), VeRA, biases and modules_to_save
    transformers   ``model.load_adapter(folder)``: LoRA, rsLoRA, PiSSA (as LoRA), VeRA as LoRA; not DoRA

vLLM reads ``r``, ``lora_alpha`` and the tensors' keys and ignores every other setting, so rank and alpha patterns would
be silently wrong (vllm/lora/peft_helper.py, vllm/config/lora.py). Its GPT-2 and GPT-NeoX take no adapters. transformers
5.23 ignores DoRA's magnitudes, prints a table about it and computes something else; a test watches it.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftline.adapters.base import Method
from graftline.adapters.class_head import HEAD
from graftline.adapters.convert import ShapeOf, to_lora
from graftline.adapters.methods import find_method
from graftline.adapters.peft_format import AdapterWeights, write_weights
from graftline.errors import ExportError, PromotionError
from graftline.settings.model import Adapter
from graftline.weights.quant.folder import DequantizingReader

Target = Literal["vllm", "peft", "transformers"]

VLLM_MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be; 16 is its default."""
VLLM_LAYERS = frozenset(
    [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "qkv_proj",
        "gate_up_proj",
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
        "fc1",
        "fc2",
        "c_attn",
        "c_proj",
        "c_fc",
    ]
)
"""Last parts of the names of the layers that vLLM supports adapters on."""
NOT_IN_VLLM = ("nf3", "nf2", "mixed")
"""Ways of quantizing a base that vLLM cannot compute with."""
_WITHOUT_VLLM_ADAPTERS = {"transformer.h.": "GPT-2", "gpt_neox.": "GPT-NeoX"}
"""Beginnings of the layer names of families whose classes in vLLM are not ``SupportsLoRA``."""


@dataclass(frozen=True)
class Compatibility:
    """Whether a target can load an adapter, and how."""

    target: Target | Literal["graftline"]
    """``graftline``: our own server (`graftline.plan.served.own_server`)."""
    reasons: tuple[str, ...]
    """Why it cannot, each with what to do instead; empty if it can."""
    changes: tuple[str, ...] = ()
    """What is rewritten for it, without changing the outputs."""
    command: str = ""
    """How to load it there, with the flags that this adapter needs; empty if it cannot be loaded."""

    @property
    def loads(self) -> bool:
        """Whether the target can load it."""
        return not self.reasons


@dataclass(frozen=True)
class _Facts:
    """What decides whether a target can load an adapter; known before it is trained."""

    method: Method
    spec: Adapter
    """As it is on disk."""
    layer_names: tuple[str, ...]
    is_quantized: bool

    @property
    def experts(self) -> list[str]:
        return [name for name in self.layer_names if ".experts." in name]

    @property
    def classifies(self) -> bool:
        return HEAD in self.spec.modules_to_save

    @property
    def rank(self) -> int:
        return max((self.spec.rank_of(name) for name in self.layer_names), default=1)

    @property
    def scales(self) -> list[float]:
        scale = self.method.scale
        return sorted({scale(self.spec.alpha_of(name), self.spec.rank_of(name)) for name in self.layer_names})


def check_target(weights: AdapterWeights, target: Target) -> Compatibility:
    """Whether ``target`` can load an adapter; ExportError if there is no such target."""
    is_quantized = weights.identity is not None and weights.identity.quantizer is not None
    return _check(_Facts(weights.method, weights.spec, tuple(weights.modules()), is_quantized), target)


def check_planned(spec: Adapter, layer_names: Iterable[str], *, is_quantized: bool, target: Target) -> Compatibility:
    """Whether ``target`` will be able to load an adapter that is not trained yet.

    ``layer_names`` are the paths of its layers (`graftline.adapters.attach.plan_layers`).

    Raises:
        AdapterError: there is no such method.
        ExportError: there is no such target.
    """
    method = find_method(spec.method)
    if method.on_quantized and is_quantized:
        method = find_method(method.on_quantized)
    on_disk = method.disk_form.to_disk(spec) if method.disk_form else spec
    return _check(_Facts(method, on_disk, tuple(layer_names), is_quantized), target)


def _check(facts: _Facts, target: Target) -> Compatibility:
    if target not in _CHECKS:
        raise ExportError(f"there is no target {target!r}; known: {', '.join(_CHECKS)}")
    return _CHECKS[target](facts)


def require_vllm(release: Path, channel: str) -> None:
    """Refuse a release for a channel that vLLM serves, if vLLM cannot load its adapter.

    Args:
        release: the release's folder, with adapter/ and perhaps merged/.
        channel: the channel's name.

    Raises:
        PromotionError: vLLM cannot load it; every reason is given, and what can be served instead.
        AdapterError: the adapter is damaged.
    """
    weights = AdapterWeights.open(release / "adapter")
    reasons = check_target(weights, "vllm").reasons
    quantizer = weights.identity.quantizer if weights.identity else None
    if (code := _code_of(quantizer)) in NOT_IN_VLLM:
        reasons = (*reasons, f"vLLM has no code for its base's {code} weights")
    if not reasons:
        return
    if weights.head is not None:
        way_out = "Promote it"
    elif (release / "merged").is_dir():
        way_out = "vLLM can serve the release's merged/ folder as a model"
    else:
        way_out = "vLLM can serve a merged model: release with package.merged: true"
    raise PromotionError(
        f"channels.{channel}.served_by is vllm, which cannot load this {weights.method.name} adapter: "
        f"{'; '.join(reasons)}. {way_out}, in a channel without served_by: vllm"
    )


def _code_of(quantizer: Mapping[str, Any] | None) -> str:
    """How a base is quantized, as in ``quantize.method``."""
    if quantizer is None:
        return "none"
    plan = quantizer.get("quantization")
    if plan is None:  # a record from before there were mixed schemes
        return str(quantizer.get("method"))
    return "mixed" if plan["rules"] else str(plan["default"]["code"])


def export_adapter(adapter: Path, out: Path, *, target: Target, shape_of: ShapeOf) -> Compatibility:
    """Write an adapter folder for a target to the new folder ``out``; returns what was changed and how to load it.

    ``shape_of`` gives the shapes (O, I) of the base's weights by layer.

    Raises:
        ExportError: the target cannot load it (all reasons are given), or ``out`` exists.
        AdapterError: the adapter is damaged.
    """
    weights = AdapterWeights.open(adapter)
    compatibility = check_target(weights, target)
    if not compatibility.loads:
        raise ExportError(
            f"{target} cannot load this {weights.method.name} adapter: " + "; ".join(compatibility.reasons)
        )
    if out.exists():
        raise ExportError(f"{out} exists; name a new folder")
    if target == "vllm" or (target == "transformers" and weights.method.name == "vera"):
        weights = to_lora(weights, shape_of=shape_of)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        write_weights(weights, Path(temporary) / "adapter")
        shutil.move(Path(temporary) / "adapter", out)
    return compatibility


def vllm_rank_class(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` for a rank; None if vLLM has none so large."""
    return next((size for size in VLLM_MAX_RANKS if size >= rank), None)


def shapes_of(base: Path) -> ShapeOf:
    """Shapes (O, I) of the weights in a base folder, by layer."""
    return DequantizingReader(base).linear_shape


def _check_vllm(facts: _Facts) -> Compatibility:
    reasons = _not_low_rank(facts.method)
    if facts.method.name == "dora":
        reasons.append("vLLM has no DoRA; merge it (graftline merge) and serve the merged model")
    if facts.classifies:
        reasons.append("vLLM loads no head for classes with an adapter; serve it with graftline serve")
    elif facts.spec.modules_to_save:
        reasons.append("vLLM takes no modules_to_save; merge it, or train without them")
    if facts.spec.bias != "none":
        reasons.append("vLLM takes no trained biases; merge it, or train with bias: none")
    families = {known for name in facts.layer_names for at, known in _WITHOUT_VLLM_ADAPTERS.items() if at in name}
    reasons += [f"vLLM takes no adapters on {family}; merge it and serve the merged model" for family in families]
    if facts.experts:
        reasons.append(
            f"vLLM leaves out adapters on experts ({facts.experts[0]}) without a word; merge it and serve the merged "
            "model, or leave the experts out of targets"
        )
    unknown = sorted(name for name in facts.layer_names if name.rpartition(".")[2] not in VLLM_LAYERS)
    if unknown:
        reasons.append(
            f"vLLM puts no adapter on {', '.join(unknown[:3])}; merge it, or leave these layers out of targets"
        )
    max_rank = vllm_rank_class(facts.rank)
    if max_rank is None:
        reasons.append(f"its rank {facts.rank} is above vLLM's largest max_lora_rank {VLLM_MAX_RANKS[-1]}; merge it")
    if reasons:
        return Compatibility("vllm", tuple(reasons))
    command = f"vllm serve BASE --enable-lora --max-lora-rank {max_rank} --lora-modules NAME=FOLDER"
    if facts.is_quantized:
        command += " --quantization bitsandbytes"
    return Compatibility("vllm", (), _vllm_changes(facts), command)


def _vllm_changes(facts: _Facts) -> tuple[str, ...]:
    changes = []
    if facts.method.name in ("vera", "pissa"):
        changes.append(f"{facts.method.name} becomes the equal LoRA of rank {facts.rank}")
    if facts.scales != [1.0]:
        changes.append(f"scales {', '.join(f'{s:g}' for s in facts.scales)} go into B, lora_alpha becomes r")
    return tuple(changes)


def _not_low_rank(method: Method) -> list[str]:
    if method.layer is None:
        return ["full fine-tuning is not an adapter; merge it (graftline merge) and serve the merged model"]
    if method.factors is None:
        return [f"it has no {method.name} bottlenecks; serve it with graftline serve (the ONNX graph takes them)"]
    return []


def _not_in_transformers(facts: _Facts) -> list[str]:
    if facts.experts and facts.is_quantized:
        return [
            "transformers does not load its base, whose experts are quantized one by one; merge it (graftline merge)"
        ]
    return []


def _check_peft(facts: _Facts) -> Compatibility:
    reasons = (*_not_low_rank(facts.method), *_not_in_transformers(facts))
    command = 'peft.PeftModel.from_pretrained(base_model, "FOLDER")'
    if facts.classifies:
        command += ", base_model an AutoModelForSequenceClassification with num_labels as in graftline.json"
    return Compatibility("peft", reasons, (), "" if reasons else command)


def _check_transformers(facts: _Facts) -> Compatibility:
    reasons = [*_not_low_rank(facts.method), *_not_in_transformers(facts)]
    if facts.method.name == "dora":
        reasons.append("transformers ignores DoRA's magnitudes when it loads them; load it with peft, or merge it")
    if facts.classifies:
        reasons.append("transformers loads no head with an adapter; load it with peft")
    if reasons:
        return Compatibility("transformers", tuple(reasons))
    changes = (f"vera becomes the equal LoRA of rank {facts.rank}",) if facts.method.name == "vera" else ()
    return Compatibility("transformers", (), changes, 'base_model.load_adapter("FOLDER")')


_CHECKS: dict[str, Callable[[_Facts], Compatibility]] = {
    "vllm": _check_vllm,
    "peft": _check_peft,
    "transformers": _check_transformers,
}
