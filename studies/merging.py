"""Merging: speed and memory against peft, what rounding alone does, and what is left after NF4 again.

speed       our streamed fold against peft's merge_and_unload, rank 16 on all linear layers, to bfloat16, each a process
large       the same for a random model of 3.2 billion parameters, with the memory's bound
rounding    ten small tasks: an adapter is trained, folded in and rounded to each number type, and compared with the
            unmerged model on held-out rows, as the merge stage does. Every second base is stored as bfloat16, on whose
            grid published models lie. `ParityLimits.for_dtype` takes about ten times the largest of these figures
requantize  a trained adapter of the demo folded into its base and quantized to NF4 again: what is left of the update,
            how the model answers, and whether it ships
"""

import json
import random
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.adapters.attach import attach
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import load_adapter, save_adapter
from graftline.data.rows import Row, read_rows
from graftline.data.template import Encoded, encode, template_digest
from graftline.digest import write_json
from graftline.merge.choice import MergeOutcome, MergePlan, Requantized, merge_by_evidence
from graftline.merge.fold import merge_folder
from graftline.merge.parity import (
    REQUANTIZED_LIMITS,
    ParityLimits,
    ParityReport,
    compare_with_recorded,
    record,
    requantize_folder,
)
from graftline.settings.model import Adapter, MethodName, Quantize
from graftline.weights.identity import read_identity
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from graftline.weights.reader import CheckpointReader, read_architecture
from studies.harness import DEMO, Json, Setting, demo_base, needed, peak_megabytes, ratio, wall_seconds
from studies.models import LARGE, SMALL, make_random, make_tiny_llama
from studies.trials import TEMPLATE, fit, mistaken, task_rows

TYPES = (torch.bfloat16, torch.float16, torch.float32)
METHODS: tuple[MethodName, ...] = ("lora", "dora", "rslora", "pissa", "vera")
SHAPES = (
    {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4},
    {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
)
NUM_TASKS, NUM_ROWS, LEARNING_RATE = 10, 32, 5e-3
NO_LIMITS = ParityLimits(None, min_argmax_agreement=0.0, max_mean_kl=1e9, max_nll_change=1e9)
PARITY = (
    *("num_tokens", "max_logit_difference", "argmax_agreement", "mean_kl"),
    *("nll_change", "nll_change_interval", "answer_nll_change", "answer_nll_change_interval"),
)


def speed(setting: Setting) -> Json:
    """The base of the demo."""
    return _against_peft(setting, setting.base())


def large(setting: Setting) -> Json:
    """A model that does not fit where a merge must."""
    model = setting.work / "large"
    if not model.exists():
        make_random(model, **setting.size(LARGE, SMALL))
    return _against_peft(setting, model)


def _against_peft(setting: Setting, model: Path) -> Json:
    adapter = _random_adapter(model, setting.work / "adapter")
    runs: dict[str, list[Json]] = {"graftline": [], "peft": []}
    for _ in range(setting.rounds or setting.size(3, 1)):
        for side, merge in (("graftline", _merge), ("peft", _merge_in_peft)):
            runs[side].append(setting.apart(merge, model, adapter, setting.work / "merged"))
    ours, peers = ({key: [run[key] for run in runs[side]] for key in ("seconds", "peak_megabytes")} for side in runs)
    bound = 4 * CheckpointReader(model).largest_bytes / 2**20 + 700  # of the stored tensor
    return {
        **runs,
        "time": ratio(ours["seconds"], peers["seconds"]),
        "memory": ratio(ours["peak_megabytes"], peers["peak_megabytes"]),
        "memory_bound_mb": round(bound),
        "memory_within_bound": max(ours["peak_megabytes"]) <= bound,
    }


def _merge(model: Path, adapter: Path, out: Path) -> Json:
    torch.set_num_threads(1)
    seconds = wall_seconds(lambda: merge_folder(model, adapter, out, dtype=torch.bfloat16))
    shutil.rmtree(out)
    return {"seconds": round(seconds, 2), "peak_megabytes": peak_megabytes()}


def _merge_in_peft(folder: Path, adapter: Path, out: Path) -> Json:
    torch.set_num_threads(1)

    def merge() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)

    seconds = wall_seconds(merge)
    shutil.rmtree(out)
    return {"seconds": round(seconds, 2), "peak_megabytes": peak_megabytes()}


def _random_adapter(model: Path, folder: Path) -> Path:
    """Random factors in PEFT's format, made without the model."""
    reader, architecture = CheckpointReader(model), read_architecture(model)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name in filter(architecture.is_linear_weight, reader.names()):
        num_outputs, num_inputs = reader.info(name).shape
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = 0.02 * torch.randn(16, num_inputs, generator=generator)
        tensors[f"{layer}.lora_B.weight"] = 0.02 * torch.randn(num_outputs, 16, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Json = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "inference_mode": True}
    named = {"base_model_name_or_path": str(model), "target_modules": list(architecture.linears)}
    write_json(folder / "adapter_config.json", config | named)
    return folder


def rounding(setting: Setting) -> Json:
    """The largest of each figure by number type, and every task."""
    cells = []
    for seed in range(setting.size(NUM_TASKS, 1)):
        method, shape = METHODS[seed % len(METHODS)], SHAPES[seed % len(SHAPES)]
        task = small_task(setting.folder(f"seed-{seed}"), seed, steps=setting.size(60, 5))
        about = {"task": f"seed {seed}", "method": method, "base_stored_as": "float32" if seed % 2 else "bfloat16"}
        cells += [about | shape | cell for cell in _rounded(*task, setting.folder("rounded"))]
    return {"rows": NUM_ROWS, "largest": _largest(cells), "cells": cells}


def small_task(work: Path, seed: int, *, steps: int) -> tuple[Path, Path, list[Row]]:
    """A base that learned the task with a part of the answers wrong, an adapter that corrects it, and held-out rows."""
    # Larger initial weights than usual: so small a model learns in tens instead of thousands of steps.
    shape: dict[str, Any] = SHAPES[seed % len(SHAPES)]
    make_tiny_llama(work / "start", initializer_range=0.1, seed=seed, **shape)
    tokenizer, base = AutoTokenizer.from_pretrained(work / "start"), work / "base"
    rows = task_rows(random.Random(seed), 200 + NUM_ROWS)
    model: Any = AutoModelForCausalLM.from_pretrained(work / "start")
    learning: dict[str, Any] = {"steps": steps, "learning_rate": LEARNING_RATE, "seed": seed}
    fit(model, [[encode(mistaken(row), tokenizer, template=TEMPLATE) for row in rows[NUM_ROWS:]]], **learning)
    model.to(torch.float32 if seed % 2 else torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = load_model(base, dtype=torch.float32)
    attach(model, Adapter(method=METHODS[seed % len(METHODS)], rank=8, alpha=16), seed=seed)
    fit(model, [[encode(row, tokenizer, template=TEMPLATE) for row in rows[NUM_ROWS:]]], **learning)
    save_adapter(model, work / "adapter", identity=_identity(base, tokenizer))
    return base, work / "adapter", rows[:NUM_ROWS]


def _identity(base: Path, tokenizer: Any) -> AdapterIdentity:
    identity = read_identity(base)
    digest = template_digest(tokenizer, TEMPLATE)
    return AdapterIdentity(base_digest=identity.digest, quantizer=identity.quantizer, template_digest=digest)


def _rounded(base: Path, adapter: Path, rows: list[Row], work: Path) -> list[Json]:
    """The merged model in each number type against base and adapter."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [encode(row, tokenizer, template=TEMPLATE) for row in rows]
    sequences, answers = [row.input_ids for row in encoded], [row.supervised for row in encoded]
    recorded = record(_with_adapter(base, adapter), sequences)
    cells = []
    for dtype in TYPES:
        merge_folder(base, adapter, work / "merged", dtype=dtype)
        merged = load_model(work / "merged", dtype=torch.float32)
        report = compare_with_recorded(recorded, merged, sequences, limits=NO_LIMITS, answers=answers)
        shutil.rmtree(work / "merged")
        cells.append({"merged_as": str(dtype).removeprefix("torch."), **_parity(report)})
    return cells


def _with_adapter(base: Path, adapter: Path) -> Any:
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, adapter, base=read_identity(base))
    return model


def _largest(cells: list[Json]) -> dict[str, dict[str, float]]:
    """By number type, the largest of each figure; of the answers' NLL, the largest upper end of the interval."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(cell["merged_as"] for cell in cells):
        of_type = [cell for cell in cells if cell["merged_as"] == name]
        found[name] = {figure: max(cell[figure] for cell in of_type) for figure in ("max_logit_difference", "mean_kl")}
        found[name]["argmax_disagreement"] = max(1 - cell["argmax_agreement"] for cell in of_type)
        found[name]["answer_nll_rise"] = max(cell["answer_nll_change_interval"][1] for cell in of_type)
    return found


def requantize(setting: Setting) -> Json:
    """The merge stage's own choice with everything asked for; the merge into the dense base, NF4 again, beside it."""
    if setting.quick:
        original, adapter, rows = small_task(setting.work, 1, steps=5)
        base = setting.work / "nf4"
        quantize_folder(original, base, quantize=Quantize(method="nf4"))
        tokenizer = AutoTokenizer.from_pretrained(original)
        model = load_model(base, dtype=torch.float32)
        attach(model, Adapter(method="dora", rank=8, alpha=16), seed=0)
        shutil.rmtree(adapter)
        save_adapter(model, adapter, identity=_identity(base, tokenizer))
        template, about = TEMPLATE, {}
    else:
        base, adapter, original = DEMO / "init" / "base", needed(DEMO / "train" / "adapter"), demo_base()
        rows, template = read_rows(DEMO / "fetch" / "evaluation.jsonl")[:100], "none"
        metrics = json.loads((DEMO / "train" / "metrics.json").read_text(encoding="utf-8"))
        about = {name: metrics[name] for name in ("steps", "loss_first", "loss_last")}
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoded = [encode(row, tokenizer, template=template) for row in rows]
    plan = MergePlan(torch.float16, "both", original, requantize=Quantize(method="nf4"))
    with tempfile.TemporaryDirectory() as work:
        chosen = merge_by_evidence(base, adapter, Path(work) / "model", plan=plan, rows=encoded)
    found: Json = {"rows": len(encoded), "training": about}
    if isinstance(chosen, MergeOutcome):
        candidates = {name: _parity(candidate.parity) for name, candidate in chosen.candidates.items()}
        found |= {"candidates": candidates, "chosen": chosen.name, "reason": chosen.reason}
        if chosen.requantized:
            found["requantized"] = _what_is_left(chosen.requantized)
    found["requantized_from_original"] = _what_is_left(_requantize_original(base, adapter, original, encoded))
    return {"adapters": {DEMO.name: found}}


def _requantize_original(base: Path, adapter: Path, original: Path, rows: Sequence[Encoded]) -> Requantized:
    """NF4 again, of the merge into the weights from before the quantization; compared with the unmerged model."""
    tokens, answers = [row.input_ids for row in rows], [row.supervised for row in rows]
    recorded = record(_with_adapter(base, adapter), tokens)
    with tempfile.TemporaryDirectory() as work:
        merged, again = Path(work) / "merged", Path(work) / "again"
        merge_folder(base, adapter, merged, dtype=torch.float16, original=original)
        loss = requantize_folder(merged, again, base=original, quantize=Quantize(method="nf4"))
        model = load_model(again, dtype=torch.float32)
        return Requantized(
            loss, compare_with_recorded(recorded, model, tokens, limits=REQUANTIZED_LIMITS, answers=answers)
        )


def _what_is_left(again: Requantized) -> Json:
    """How the model answers that was quantized again; what became of the update: mean and quartiles over layers."""
    layers = again.loss.layers
    return _parity(again.parity) | {
        "shipped": again.shipped,
        "layers": len(layers),
        "vanished": again.loss.vanished,
        "vanished_quartiles": statistics.quantiles((1 - layer.kept for layer in layers), n=4),
        "noise_in_units_of_the_update": again.loss.noise,
        "update_over_weight": statistics.mean(layer.update for layer in layers),
    }


def _parity(report: ParityReport) -> Json:
    """What is quoted of a comparison with the unmerged model."""
    return {name: getattr(report, name) for name in PARITY} | {"failures": list(report.failures)}


PARTS = {"speed": speed, "large": large, "rounding": rounding, "requantize": requantize}
