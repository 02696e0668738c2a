"""One side of a comparison on a GPU: ours, peft's Trainer, the same with Liger's kernels, or Unsloth.

``python -m studies.gpu_side WHO`` is a process that trains a job for each line that it reads and keeps its model in
between; Unsloth and Liger change transformers for the whole process, so no other side may share it. Lines are JSON; an
answer begins with `ANSWER`, since peers print too.
"""

import os
import sys

if __name__ == "__main__" and sys.argv[1:] == ["Unsloth"]:
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": "unsloth_cache"}
    os.environ |= {name: "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")}
    import contextlib

    with contextlib.suppress(ImportError):  # told below, as the answer
        import unsloth  # type: ignore[import-not-found] # noqa: F401 # before transformers, which it changes

import gc
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from graftline.train.devices import peak_memory_bytes, reset_peak_memory, resolve_device
from studies.gpu_jobs import (
    Job,
    TimeIsUpError,
    device_kind,
    make_model,
    model_of,
    rows_of,
    run_job,
    tokens_per_second,
    why_not,
)
from studies.harness import Json, Setting
from studies.models import make_tokenizer

ANSWER = "@graftline "
UNSLOTH_PATH = "UNSLOTH_PYTHONPATH"
"""Variable with what PYTHONPATH is for Unsloth, which wants an older transformers than ours."""
_RANK = 16


def figures_of(who: str, job: Job, setting: Setting) -> Json:
    """A job's figures on a side: in a process of its own, with --quick in this one."""
    with (Here if setting.quick else Child)(who, setting.folder(who.replace(" ", ""))) as child:
        return child.train(job)


def train_on(who: str, job: Job, work: Path, model: Any = None) -> Json:
    """Losses, tokens a second and the peak of a job on a side; ``model`` is one from `built`."""
    model = built(who, job, work) if model is None else model
    if who == "ours":
        number = len(list(work.glob("run-*")))
        found = run_job(job, device_kind(), work / f"run-{number}", model=model)
        del found["weights"]
        return found
    return _by_trainer(model, job, work)


def built(who: str, job: Job, work: Path) -> Any:
    """The model of a side with its adapter."""
    if who == "ours":
        return model_of(job, device_kind())
    return _unsloth(job, work) if who == "Unsloth" else _peft(job, liger=who.endswith("Liger"))


def _peft(job: Job, *, liger: bool) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model: Any = make_model(job.size, job.bits, device_kind(), torch.bfloat16, layer_of=_four_bits)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        kernels = {"rope": True, "rms_norm": True, "swiglu": True, "fused_linear_cross_entropy": True}
        apply_liger_kernel_to_llama(model=model, cross_entropy=False, **kernels)
    again = {"use_reentrant": False}
    if job.bits:
        _say_that_it_is_quantized(model)
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=again)
    else:
        model.gradient_checkpointing_enable(again)
        model.enable_input_require_grads()
    model.config.use_cache = False
    adapter: Any = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapter)


def _four_bits(weight: Tensor, bits: str) -> nn.Module:
    import bitsandbytes

    parts: Any = bitsandbytes.nn
    sizes = (weight.shape[1], weight.shape[0])
    layer: nn.Module = parts.Linear4bit(*sizes, bias=False, compute_dtype=weight.dtype, quant_type=bits, device="meta")
    layer.weight = parts.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type=bits, module=layer
    )
    layer.weight = layer.weight.to(weight.device)
    return layer


def _say_that_it_is_quantized(model: Any) -> None:
    """What transformers' loader sets, and Trainer and peft ask for."""
    from transformers import BitsAndBytesConfig

    model.is_loaded_in_4bit = model.is_quantized = True
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model.hf_quantizer = type("Quantizer", (), {"is_trainable": True, "is_serializable": True})()


def _unsloth(job: Job, work: Path) -> Any:
    from unsloth import FastLanguageModel

    folder = work / f"base-{job.size}"
    if not (folder / "config.json").exists():
        dense: PreTrainedModel | None = make_model(job.size, None, device_kind(), torch.bfloat16)
        assert dense is not None
        make_tokenizer(folder)
        dense.save_pretrained(folder, max_shard_size="4GB")
        del dense
        _free()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=job.tokens, dtype=torch.bfloat16, load_in_4bit=job.bits is not None
    )
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    offload = "unsloth" if dict(job.options).get("offload_activations") else True
    return FastLanguageModel.get_peft_model(
        model,
        r=_RANK,
        lora_alpha=2 * _RANK,
        lora_dropout=0,
        bias="none",
        target_modules=names,
        use_gradient_checkpointing=offload,
        random_state=0,
    )


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.at: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.at.append(_now())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.at.append(_now())


class _InOrder(Trainer):
    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def _by_trainer(model: Any, job: Job, work: Path) -> Json:
    rows, clock, kind = rows_of(job), _Clock(), resolve_device("auto")
    arguments = TrainingArguments(
        str(work / "trainer"),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused" if kind == "cuda" else "adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        gradient_checkpointing=not hasattr(model, "for_training"),  # Unsloth has its own
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=kind == "cpu",
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )
    data: Any = [
        {
            "input_ids": list(row.input_ids),
            "labels": [
                token if learned else -100 for token, learned in zip(row.input_ids, row.supervised, strict=True)
            ],
        }
        for row in rows
    ]
    reset_peak_memory(kind)
    trainer = _InOrder(model, arguments, train_dataset=data, data_collator=_collate, callbacks=[clock])
    trainer.train()
    counts = [sum(len(row.input_ids) for row in rows[at : at + job.batch]) for at in range(0, len(rows), job.batch)]
    ends = list(zip(clock.at, [0, *counts], strict=True))
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "first_step_seconds": round(ends[1][0] - ends[0][0], 3),
        "tokens_per_second": tokens_per_second(ends),
        "peak_gb": round(peak_memory_bytes(kind) / 1e9, 3),
    }


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[at < len(row["input_ids"]) for at in range(longest)] for row in rows]).long()
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def question(job: Job) -> str:
    """A job as the line that asks for it."""
    return json.dumps(asdict(job))


def _job(line: str) -> Job:
    value = json.loads(line)
    return Job(**(value | {"options": tuple((name, setting) for name, setting in value["options"])}))


class Child:
    """A side in a process of its own, which keeps its model between jobs; a context manager."""

    def __init__(self, who: str, work: Path, environment: Mapping[str, str] | None = None) -> None:
        root, packages = str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")
        if who == "Unsloth":
            packages = os.environ.get(UNSLOTH_PATH, packages)
        path = os.pathsep.join(filter(None, (root, packages)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "studies.gpu_side", who],
            cwd=work,
            env=os.environ | {"PYTHONPATH": path} | dict(environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def train(self, job: Job) -> Json:
        """The figures of a job; why there are none as ``not_done``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"not_done": f"the process ended with {self._process.wait()}"}
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                answer: Json = json.loads(line.removeprefix(ANSWER))
                return answer
        return {"not_done": f"the process ended with {self._process.wait()}"}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()


class Here:
    """With --quick: a side in this process, whose model is not kept."""

    def __init__(self, who: str, work: Path) -> None:
        self._who, self._work = who, work

    def train(self, job: Job) -> Json:
        """As `Child.train`."""
        try:
            return train_on(self._who, job, self._work)
        except TimeIsUpError:
            raise
        except Exception as error:  # noqa: BLE001 # as in a process of its own
            return {"not_done": why_not(error)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def main(who: str, work: Path) -> int:
    """Answer every line until there are no more."""
    model: Any = None
    for line in sys.stdin:
        try:
            job = _job(line)
            model = built(who, job, work) if model is None else model
            answer = train_on(who, job, work, model)
        except Exception as error:  # noqa: BLE001 # whatever a peer raises is what is to be known
            answer = {"not_done": why_not(error)}
        _free()
        print(ANSWER + json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path.cwd()))
