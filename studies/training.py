"""Training speed, memory and losses against peft with transformers' Trainer, at equal settings.

Each side trains in a process of its own: the same rows in batches of 16 for one epoch at one constant learning rate.
Seconds are CPU seconds on one thread; tokens are without padding; the first step is left out. Both adapters are then
scored by one function on the same held-out rows.

throughput  each as its guide recommends, on the demo's rows and on rows that leave nothing to save (all of one length,
            nearly all tokens supervised). ``limit`` is what the machine gives to the linear layers' products alone:
            no training that computes every token of every row can be faster
methods     every method, the peer on our batches in our order, so that losses can be compared step by step
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import attach
from graftline.data.template import Encoded
from graftline.settings.model import Adapter, Quantize, Train
from graftline.train.batches import pad_rows, plan_steps
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.weights.quant.folder import quantize_folder
from graftline.weights.quant.linear import load_model
from studies.harness import Json, Setting, cpu_seconds, peak_megabytes, ratio

BATCH, LEARNING_RATE = 16, 5e-4
ADAPTERS = {
    "lora": Adapter(method="lora", rank=8, alpha=16),
    "rslora": Adapter(method="rslora", rank=8, alpha=16),
    "dora": Adapter(method="dora", rank=8, alpha=16),
    "pissa": Adapter(method="pissa", rank=8, alpha=16),
    "vera": Adapter(method="vera", rank=64),
    "qlora": Adapter(method="lora", rank=8, alpha=16),  # the base is what is quantized
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training; ``rows`` behind the first ``num_rows`` are held out."""

    base: Path
    rows: Path
    method: str = "lora"
    num_rows: int
    num_held_out: int
    same_batches: bool = False

    def encoded(self) -> list[Encoded]:
        """All rows, without template and end token."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        lines = self.rows.read_text(encoding="utf-8").splitlines()
        return [encode(tokenizer, json.loads(line)) for line in lines[: self.num_rows + self.num_held_out]]


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Encoded:
    """Prompt and completion; the completion is learned."""
    prompt = list(tokenizer(row["prompt"]).input_ids)
    completion = list(tokenizer(row["completion"], add_special_tokens=False).input_ids)
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def train_ours(job: Job) -> Json:
    """Our trainer."""
    torch.set_num_threads(1)
    rows, model = job.encoded(), load_model(job.base, dtype=torch.float32)
    coverage = attach(model, ADAPTERS[job.method], seed=0)
    settings = Train(
        epochs=1,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        scheduler="constant",
        checkpoint_every=0,
        threads=1,
        device="cpu",
    )
    ends: list[tuple[float, int]] = []

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.process_time(), metrics.tokens))

    with tempfile.TemporaryDirectory() as work:
        result = train(model, rows[: job.num_rows], settings=settings, work=Path(work), on_step=on_step)
    peak, spent = peak_megabytes(), ends[-1][0] - ends[0][0]
    return {
        "tokens_per_second": round(sum(tokens for _, tokens in ends[1:]) / spent, 1),
        "losses": [round(loss, 4) for loss in result.losses],
        "held_out_loss": held_out_loss(model, rows[job.num_rows :]),
        "peak_megabytes": peak,
        "trained_parameters": coverage.num_trained,
    }


class Clock(transformers.TrainerCallback):
    """CPU seconds at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Look at the clock."""
        self.ends.append(time.process_time())


class InOrder(transformers.Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train_peer(job: Job) -> Json:
    """Peft and transformers' Trainer, as their guides have it: padding to the longest row of a batch."""
    torch.set_num_threads(1)
    transformers.set_seed(0)
    rows, tokenizer = job.encoded(), AutoTokenizer.from_pretrained(job.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lengths = [len(row.input_ids) for row in rows[: job.num_rows]]
    batches = plan_steps(lengths, num_steps=job.num_rows // BATCH, rows_per_step=BATCH, seed=0)
    order = [at for step in batches for at in step] if job.same_batches else list(range(job.num_rows))
    data = [_with_labels(rows[at]) for at in order]
    model, clock = _peer_model(job), Clock()
    with tempfile.TemporaryDirectory() as work:
        trainer = (InOrder if job.same_batches else transformers.Trainer)(
            model,
            _arguments(work),
            train_dataset=data,
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        )
        trainer.train()
    peak, steps = peak_megabytes(), len(clock.ends)
    # Random batches are alike on average; of ours the first, which the clock leaves out, is the longest.
    tokens = sum(lengths) * (steps - 1) / steps
    if job.same_batches:
        tokens = sum(lengths[at] for step in batches[1:] for at in step)
    return {
        "tokens_per_second": round(tokens / (clock.ends[-1] - clock.ends[0]), 1),
        "losses": [round(float(entry["loss"]), 4) for entry in trainer.state.log_history if "loss" in entry],
        "held_out_loss": held_out_loss(trainer.model, rows[job.num_rows :]),
        "peak_megabytes": peak,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _with_labels(row: Encoded) -> dict[str, list[int]]:
    labels = [token if learned else -100 for token, learned in zip(row.input_ids, row.supervised, strict=True)]
    return {"input_ids": list(row.input_ids), "labels": labels}


def _arguments(out: str) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        out,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        lr_scheduler_type="constant",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=0,
    )


def _peer_model(job: Job) -> Any:
    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.base, dtype=torch.float32, quantization_config=quantized if job.method == "qlora" else None
    )
    common: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if job.method == "vera":
        return peft.get_peft_model(model, peft.VeraConfig(r=64, **common))
    start: Any = "pissa_niter_4" if job.method == "pissa" else True
    lora = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=job.method == "rslora",
        use_dora=job.method == "dora",
        init_lora_weights=start,
        **common,
    )
    return peft.get_peft_model(model, lora)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel | nn.Module | None, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood per completion token, by transformers' own forward."""
    assert model is not None
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), BATCH):
        batch = pad_rows(rows[start : start + BATCH])
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["predict_at"]]
        total += float(F.cross_entropy(logits, batch["targets"], reduction="sum"))
        count += len(batch["targets"])
    return round(total / count, 4)


def matrix_products(job: Job) -> Json:
    """Tokens a second if a step were its linear layers' products alone: forward, and backward to the input."""
    torch.set_num_threads(1)
    rows = job.encoded()[: job.num_rows]
    tokens = round(sum(len(row.input_ids) for row in rows) / len(rows) * BATCH)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.base))
    layers = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    weights = [torch.empty(layer.weight.shape).uniform_(-0.1, 0.1) for layer in layers]
    inputs = {size: torch.rand(tokens, size) for weight in weights for size in weight.shape}

    def products() -> None:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
            inputs[weight.shape[0]] @ weight

    return {"tokens_per_second": tokens / median([cpu_seconds(products) for _ in range(4)][1:])}


SIDES = {"graftline": train_ours, "peer": train_peer, "limit": matrix_products}


def throughput(setting: Setting) -> Json:
    """LoRA on both kinds of rows."""
    base, num_rows = setting.base(), setting.size(128, 64)
    found = []
    for name, file in _row_files(setting, base, num_rows).items():
        job = Job(base=base, rows=file, num_rows=num_rows, num_held_out=setting.size(128, 16))
        found.append({"rows": name, "num_rows": num_rows, **_compare(setting, job, tuple(SIDES))})
    return {"results": found}


def _row_files(setting: Setting, base: Path, num_rows: int) -> dict[str, Path]:
    """The rows as they are; and rows of the commonest length whose prompt ends at the first colon."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [json.loads(line) for line in setting.row_file().read_text(encoding="utf-8").splitlines()]
    by_length: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        head, _, tail = row["prompt"].partition(":")
        whole = {"prompt": head + ":", "completion": tail + row["completion"]}
        by_length.setdefault(len(encode(tokenizer, whole).input_ids), []).append(whole)
    kinds = {"demo": rows, "full": max(by_length.values(), key=len)}
    for name, content in kinds.items():
        lines = [json.dumps(row) + "\n" for row in content[: num_rows + setting.size(128, 16)]]
        (setting.folder("rows") / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: setting.folder("rows") / f"{name}.jsonl" for name in kinds}


def methods(setting: Setting) -> Json:
    """Every method on the same batches; qlora's base is quantized by us on our side, by bitsandbytes on the peer's."""
    found: Json = {}
    base, rows = setting.base(), setting.row_file()
    for method in setting.size(tuple(ADAPTERS), ("lora", "dora")):
        job = Job(
            base=base, rows=rows, method=method, num_rows=64, num_held_out=setting.size(64, 16), same_batches=True
        )
        if method == "qlora" and not (setting.work / "nf4").exists():
            quantize_folder(base, setting.work / "nf4", quantize=Quantize(method="nf4"))
        found[method] = _compare(setting, job, ("graftline", "peer"))
        losses = found[method]["losses"]
        gaps = [abs(a - b) for a, b in zip(losses["graftline"], losses["peer"], strict=True)]
        found[method]["largest_loss_gap"] = round(max(gaps), 4)
        speeds = {name: one["tokens_per_second"]["graftline"] for name, one in found.items()}
        found[method]["step_time_to_our_lora"] = round(speeds["lora"] / speeds[method], 3)
    return found


def _compare(setting: Setting, job: Job, sides: Sequence[str]) -> Json:
    """Sides in turns; ratios within a round, losses and memory of the last."""
    rounds: dict[str, list[Json]] = {side: [] for side in sides}
    for _ in range(setting.rounds or setting.size(3, 1)):
        for side in sides:
            own = job.method == "qlora" and side == "graftline"
            given = replace(job, base=setting.work / "nf4") if own else job
            rounds[side].append(setting.apart(SIDES[side], given))
    speeds = {side: [run["tokens_per_second"] for run in runs] for side, runs in rounds.items()}
    figures = ("losses", "held_out_loss", "peak_megabytes", "trained_parameters")
    found: Json = {key: {side: rounds[side][-1][key] for side in ("graftline", "peer")} for key in figures}
    found |= {"method": job.method, "ratio": ratio(speeds["graftline"], speeds["peer"])}
    found["tokens_per_second"] = {side: round(median(values), 1) for side, values in speeds.items()}
    if "limit" in speeds:
        found["share_of_limit"] = round(median(speeds["graftline"]) / median(speeds["limit"]), 3)
    return found


PARTS = {"throughput": throughput, "methods": methods}
