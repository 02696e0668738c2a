"""A QLoRA adapter's merge that is quantized to NF4 again: what each cure leaves of what was trained.

small   small tasks, a seed each: a base that learned a part of the answers wrong, in NF4, and an adapter that corrects
        it
demo    the demo's base and adapter (`make demo`); all cures but the one that trains anew

The reference is the adapter on the base that it was trained on. The cures, all to the nearest code unless they say
more:

nearest                the merge into the dequantized base, on whose values small updates are rounded back
original               the merge into the base from before quantization
seen                   the same, with an adapter that was trained on the requantized merge: every step rounds W + s·BA
                       and passes the gradient straight through the rounding
compensated            the merge into the dequantized base; errors are compensated on training rows, the update is kept
compensated_original   the merge into the original base, likewise
"""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.adapters.attach import attach
from graftline.adapters.lora import LoraLayer
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import load_exact, save_adapter
from graftline.data.rows import read_rows
from graftline.data.split import CALIBRATION_ROWS
from graftline.data.template import Encoded, encode, template_digest
from graftline.merge.fold import merge_folder
from graftline.merge.parity import REQUANTIZED_LIMITS, compare_with_recorded, record, requantize_folder
from graftline.settings.model import Adapter, Quantize
from graftline.weights.identity import read_identity
from graftline.weights.quant.blockwise import dequantize, quantize
from graftline.weights.quant.folder import DequantizingReader, quantize_folder
from graftline.weights.quant.linear import load_model
from graftline.weights.quant.scheme import plan_of
from studies.harness import DEMO, Json, Setting, cpu_seconds, demo_base, needed
from studies.models import make_tiny_llama
from studies.trials import TEMPLATE, fit, mistaken, task_rows

NF4 = Quantize(method="nf4")
NUM_ROWS = 100
SHAPE: Json = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Task:
    """What is merged, and rows."""

    original: Path
    base: Path
    adapter: Path
    rows: Sequence[Encoded]
    """For the figures."""
    calibration: Sequence[Sequence[int]]
    seen: Path | None = None
    """An adapter that was trained on the requantized merge."""


def small(setting: Setting) -> Json:
    """Every cure on every seed."""
    cells = []
    for seed in range(setting.rounds or setting.size(3, 1)):
        task = _small_task(setting.folder(f"seed-{seed}"), seed, base_steps=setting.size(150, 5))
        cells += [{"seed": seed, **cell} for cell in _cures(task, setting.folder(f"cures-{seed}"))]
    return {"rows": NUM_ROWS, "shape": SHAPE, "cells": cells}


def demo(setting: Setting) -> Json:
    """The demo's last run; a small task with --quick."""
    if setting.quick:
        return {
            "cells": _cures(replace(_small_task(setting.work, 1, base_steps=5), seen=None), setting.folder("cures"))
        }
    base = needed(DEMO / "init" / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    held_out, training = (
        [encode(row, tokenizer, template="none") for row in read_rows(DEMO / "fetch" / name)[:count]]
        for name, count in (("evaluation.jsonl", NUM_ROWS), ("train.jsonl", CALIBRATION_ROWS))
    )
    ids = [row.input_ids for row in training]
    task = Task(demo_base(), base, needed(DEMO / "train" / "adapter"), held_out, ids)
    return {"rows": NUM_ROWS, "cells": _cures(task, setting.folder("cures"), keep=setting.keep)}


def _small_task(work: Path, seed: int, *, base_steps: int) -> Task:
    # Larger initial weights than usual: so small a model learns in tens instead of thousands of steps.
    make_tiny_llama(work / "start", initializer_range=0.1, seed=seed, **SHAPE)
    tokenizer = AutoTokenizer.from_pretrained(work / "start")
    rows = task_rows(random.Random(seed), NUM_ROWS + 300)
    held_out, training = ([encode(row, tokenizer, template=TEMPLATE) for row in part] for part in _split(rows))
    wrong = [encode(mistaken(row), tokenizer, template=TEMPLATE) for row in _split(rows)[1]]
    model: Any = AutoModelForCausalLM.from_pretrained(work / "start")
    fit(model, [wrong], steps=base_steps, learning_rate=5e-3, seed=seed)
    model.save_pretrained(work / "original")
    tokenizer.save_pretrained(work / "original")
    quantize_folder(work / "original", work / "base", quantize=NF4)
    for name, original in (("adapter", None), ("seen", work / "original")):
        model = load_model(work / "base", dtype=torch.float32)
        attach(model, Adapter(method="lora", rank=4, alpha=8), seed=seed)
        if original:
            _see_rounding(model, DequantizingReader(original))
        fit(model, [training], steps=base_steps // 2, learning_rate=1e-3, seed=seed)
        identity = read_identity(work / "base")
        made_for = AdapterIdentity(
            base_digest=identity.digest,
            quantizer=identity.quantizer,
            template_digest=template_digest(tokenizer, TEMPLATE),
        )
        save_adapter(model, work / name, identity=made_for)
    ids = [row.input_ids for row in training[:CALIBRATION_ROWS]]
    return Task(work / "original", work / "base", work / "adapter", held_out, ids, work / "seen")


def _split(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    return rows[:NUM_ROWS], rows[NUM_ROWS:]


def _see_rounding(model: torch.nn.Module, original: DequantizingReader) -> None:
    """Every layer with an adapter computes with its requantized merge, whose gradient is the merge's."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            weight_OI = original.read(f"{layer.plan.name}.weight").float()
            layer.forward = partial(_through, layer, weight_OI)  # type: ignore[method-assign]


def _through(layer: LoraLayer, weight_OI: Tensor, x: Tensor) -> Tensor:
    merged_OI = weight_OI + layer.plan.scale * layer.B @ layer.A
    rounded_OI = dequantize(quantize(merged_OI.detach(), plan_of(NF4).default))
    return F.linear(x, merged_OI + (rounded_OI - merged_OI).detach(), layer.bias)


def _cures(task: Task, work: Path, *, keep: Callable[[Json], None] = lambda _: None) -> list[Json]:
    tokens, answers = [row.input_ids for row in task.rows], [row.supervised for row in task.rows]
    judged = load_exact(task.base, task.adapter)
    right = _share_right(judged, task.rows)
    recorded = record(judged, tokens)
    cells: list[Json] = [{"cure": "judged", "right": right}]
    for cure in ("nearest", "original", "seen", "compensated", "compensated_original"):
        adapter = task.seen if cure == "seen" else task.adapter
        if adapter is None:
            continue
        original = task.original if "original" in cure or cure == "seen" else None
        rows = task.calibration if "compensated" in cure else None
        merged, again = work / "merged", work / "again"
        merge_folder(task.base, adapter, merged, dtype=torch.float32, original=original)
        requantize = partial(requantize_folder, base=original or task.base, quantize=NF4, rows=rows)
        seconds = cpu_seconds(partial(requantize, merged, again))
        model = load_exact(again)
        parity = compare_with_recorded(recorded, model, tokens, limits=REQUANTIZED_LIMITS, answers=answers)
        figures = ("mean_kl", "argmax_agreement", "answer_nll_change", "answer_nll_change_interval")
        cells.append(
            {"cure": cure, "right": _share_right(model, task.rows)}
            | {name: getattr(parity, name) for name in figures}
            | {"ships": parity.passed, "cpu_seconds": round(seconds, 2)}
        )
        keep({"rows": len(task.rows), "cells": cells})
        for folder in (merged, again):
            shutil.rmtree(folder)
    return cells


@torch.no_grad()
def _share_right(model: Any, rows: Sequence[Encoded]) -> float:
    """Rows whose every answer token is the most likely one."""
    right = 0
    for row in rows:
        ids, learned = torch.tensor([row.input_ids]), torch.tensor(row.supervised)[1:]
        likely = model(input_ids=ids).logits[0, :-1].argmax(-1)
        right += bool((likely == ids[0, 1:])[learned].all())
    return right / len(rows)


PARTS = {"small": small, "demo": demo}
