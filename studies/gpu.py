"""Training on a GPU: parity with the CPU, resume, speed beside peers, memory against the plan, profile, init, serving.

For a bare machine: torch, transformers, accelerate and peft; no Prefect, DVC, hub or network. Weights are random and of
true shapes, made on the device. Parts come in the order of what is wanted most, and each ends after its time: what it
had not begun then is written down as such, and so is memory that did not suffice. Peers (peft's Trainer, with Liger's
kernels too) run where they can be imported. Each case is a line of JSON when it is done. Without a GPU the same parts
run on the CPU with --quick, to show that they run.

parity   losses of three steps on the device and on the CPU, every method on dense and quantized bases, fp32 and bf16
resume   a training that was stopped after a step and went on: the same bytes as one that was not?
speed    tokens a second of our switches and of the peers, on one and the same rows
memory   peak memory beside what the planner expects
profile  where the time of one step goes
init     quantization, dequantization and the decomposition of PiSSA and LoftQ, by weight
serve    tokens a second of the exported graph
"""

import gc
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.data.template import Encoded
from graftline.plan.memory import plan_memory
from graftline.plan.preflight import workload_of
from graftline.settings.model import Adapter, Train
from graftline.train.devices import peak_memory_bytes, reset_peak_memory, resolve_device
from graftline.train.results import StepMetrics
from graftline.train.trainer import train
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.low_rank import truncated_svd
from graftline.weights.quant.scheme import Scheme
from studies.harness import Json, Setting

SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "70B": (8192, 28672, 80, 64, 8, 128256),
}
"""Width, inner width, layers, heads, key heads, vocabulary: Llama's."""
METHODS = ("lora", "rslora", "dora", "vera", "houlsby", "pfeiffer")
BASES = (None, "nf4", "nf3", "nf2")
_SECONDS = {"parity": 90, "resume": 60, "speed": 180, "memory": 90, "profile": 45, "init": 30, "serve": 45}
"""Time of each part."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training."""

    size: str
    bits: str | None = None
    method: str = "lora"
    tokens: int = 2048
    batch: int = 4
    steps: int = 6
    options: tuple[tuple[str, Any], ...] = ()
    """Settings of the training beside the usual ones."""


def config_of(size: str) -> LlamaConfig:
    """A Llama of this size."""
    width, inner, layers, heads, key_heads, words = SHAPES[size]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=words,
        max_position_embeddings=8192,
    )


def make_model(size: str, bits: str | None, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made on the device layer by layer, so that a quantized model never needs its dense memory."""
    with torch.device("meta"):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config_of(size), dtype=dtype)
    chooser = torch.Generator("cpu" if size == "tiny" else device).manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=device, dtype=dtype)
        drawn = torch.randn(shape, generator=chooser, device=chooser.device, dtype=torch.float32) * 0.02
        return drawn.to(device=device, dtype=dtype)

    for name, module in list(model.named_modules()):
        if bits and isinstance(module, nn.Linear) and name != "lm_head":
            weight = draw(module.weight.shape).float()
            model.set_submodule(name, QuantLinear(quantize(weight, Scheme(bits, 64, True))))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._parameters[last] = nn.Parameter(draw(parameter.shape), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model.eval()


def make_rows(count: int, tokens: int, words: int) -> list[Encoded]:
    """Rows of one length, all supervised but the first token."""
    ids = torch.randint(4, words, (count, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [Encoded(row, [at > 0 for at in range(tokens)]) for row in ids]


def settings_of(job: Job, device: str) -> Train:
    """Settings of a job's training."""
    given: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True, "compile": "never"}
    given |= dict(job.options)
    common: dict[str, Any] = {"learning_rate": 1e-4, "checkpoint_every": 0, "scheduler": "constant", "threads": 1}
    return Train(**(common | {"steps": job.steps, "batch_size": job.batch, "device": device} | given))


def adapter_of(job: Job) -> Adapter:
    """The adapter of a job."""
    rank = 16 if job.size != "tiny" else 4
    alpha: dict[str, Any] = {"alpha": 2.0 * rank} if job.method in ("lora", "rslora", "dora") else {}
    return Adapter(method=job.method, rank=rank, **alpha)  # type: ignore[arg-type]


def run_job(job: Job, device: str, work: Path, *, stop_after: int = 0) -> Json:
    """Train; returns losses, tokens a second after two steps of warm-up, and the peak."""
    settings = settings_of(job, device)
    dtype = torch.float32 if settings.precision == "fp32" else torch.bfloat16
    model = make_model(job.size, job.bits, device, dtype)
    attach(model, adapter_of(job), seed=0)
    rows, ends = make_rows(job.batch * job.steps, job.tokens, model.config.vocab_size), [(0.0, 0)]

    def on_step(metrics: StepMetrics) -> None:
        ends.append((time.perf_counter(), metrics.tokens))
        if metrics.step == stop_after:
            raise KeyboardInterrupt

    reset_peak_memory(resolve_device(device))  # type: ignore[arg-type]
    result = train(model, rows, settings=settings, work=work, on_step=on_step)
    peak = peak_memory_bytes(resolve_device(device))  # type: ignore[arg-type]
    timed = ends[3:] or ends[-1:]
    seconds = timed[-1][0] - ends[-len(timed) - 1][0]
    weights = {name: value.detach().cpu() for name, value in trainable_parameters(model).items()}
    return {
        "losses": list(result.losses),
        "tokens_per_second": round(sum(tokens for _, tokens in timed) / seconds, 1) if len(ends) > 2 else None,
        "peak_gb": round(peak / 1e9, 3),
        "weights": weights,
    }


class _TimeIsUpError(Exception):
    pass


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise _TimeIsUpError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_cases(part: str, setting: Setting, cases: dict[str, Callable[[], Json]]) -> Json:
    """Every case in the part's time: a line of JSON each, and a table. An error is a result."""
    ends, found = time.monotonic() + _SECONDS[part] * (10 if setting.quick else 1), {}
    for name, case in cases.items():
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        left = ends - time.monotonic()
        try:
            if left <= 0:
                raise _TimeIsUpError
            with _at_most(left):
                found[name] = case()
        except _TimeIsUpError:
            found[name] = {"not_done": f"the part's {_SECONDS[part]} seconds were over"}
        except Exception as error:  # noqa: BLE001 # whatever a card, a driver or a peer raises is what is to be known
            cause = error.__cause__ or error
            memory = isinstance(cause, torch.OutOfMemoryError)
            found[name] = {"not_done": "out of memory" if memory else f"{type(error).__name__}: {str(error)[:300]}"}
        line = json.dumps({"part": part, "case": name, "device": device_name(), **found[name]})
        print(line, flush=True)
        with (setting.work / "lines.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
    return {"device": device_name(), "cases": found, "table": table(found)}


def table(found: Json) -> list[str]:
    """A line of text for each case."""
    return [f"{name:<44}" + "  ".join(f"{key} {value}" for key, value in one.items()) for name, one in found.items()]


def device_name() -> str:
    """The card's name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _device() -> str:
    return resolve_device("auto")


def parity(setting: Setting) -> Json:
    """Losses on the device against fp32 on the CPU."""
    methods, bases = setting.size((METHODS, BASES), (("lora", "dora"), (None, "nf3")))
    reference: dict[tuple[str, str | None], list[float]] = {}

    def case(method: str, bits: str | None, precision: str) -> Json:
        options = (("precision", precision), ("gradient_checkpointing", False))
        job = Job(size="tiny", bits=bits, method=method, tokens=32, batch=4, steps=3, options=options)
        if (method, bits) not in reference:
            exact = replace(job, options=(("precision", "fp32"), ("gradient_checkpointing", False)))
            work = setting.folder(f"{method}-{bits}-reference")
            reference[method, bits] = run_job(exact, "cpu", work)["losses"]
        losses = run_job(job, _device(), setting.folder(f"{method}-{bits}-{precision}"))["losses"]
        gaps = [abs(a - b) / a for a, b in zip(reference[method, bits], losses, strict=True)]
        return {"largest_relative_gap": float(f"{max(gaps):.3g}")}

    return run_cases(
        "parity",
        setting,
        {
            f"{method} on {bits or 'dense'}, {precision}": partial(case, method, bits, precision)
            for bits in bases
            for method in methods
            for precision in ("fp32", "bf16")
        },
    )


def resume(setting: Setting) -> Json:
    """Stopped after step 3, with a checkpoint of step 2."""
    optimizers = setting.size(("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), ("adamw",))

    def case(bits: str | None, optimizer: str) -> Json:
        options = (("optimizer", optimizer), ("checkpoint_every", 2))
        job = Job(size="tiny", bits=bits, tokens=32, steps=5, options=options)
        whole = run_job(job, _device(), setting.folder(f"{bits}-{optimizer}-whole"))
        work = setting.folder(f"{bits}-{optimizer}-stopped")
        try:
            run_job(job, _device(), work, stop_after=3)
        except KeyboardInterrupt:
            resumed = run_job(job, _device(), work)
        pairs = [(resumed["weights"][name], tensor) for name, tensor in whole["weights"].items()]
        return {"same_bytes": all(torch.equal(a, b) for a, b in pairs)}

    cases = [(bits, optimizer) for bits in (None, "nf4") for optimizer in optimizers]
    return run_cases(
        "resume",
        setting,
        {f"{bits or 'dense'}, {name}": partial(case, bits, name) for bits, name in cases},
    )


def _figures(job: Job, setting: Setting, name: str) -> Json:
    found = run_job(job, _device(), setting.folder(name.replace(" ", "-").replace("/", "-")))
    return {key: found[key] for key in ("tokens_per_second", "peak_gb", "losses")}


def speed(setting: Setting) -> Json:
    """Ours, each switch by itself, and peers."""
    size, tokens = setting.size("8B", "tiny"), setting.size(2048, 32)
    compiled = (("compile", "always"),)
    jobs = {
        "ours nf4": Job(size=size, bits="nf4", tokens=tokens),
        "ours nf4 compiled": Job(size=size, bits="nf4", tokens=tokens, options=compiled),
        "ours nf4 offloaded": Job(size=size, bits="nf4", tokens=tokens, options=(("offload_activations", True),)),
        "ours bf16": Job(size=size, tokens=tokens),
        "ours bf16 dora": Job(size=size, method="dora", tokens=tokens),
        "ours bf16 vera": Job(size=size, method="vera", tokens=tokens),
        "ours nf3": Job(size=size, bits="nf3", tokens=tokens),
        "ours nf2": Job(size=size, bits="nf2", tokens=tokens),
    }
    if setting.quick:
        jobs = {name: jobs[name] for name in ("ours nf4", "ours bf16", "ours nf4 offloaded")}
    cases: dict[str, Callable[[], Json]] = {name: partial(_figures, job, setting, name) for name, job in jobs.items()}
    for liger in (False, True):
        cases[f"peft + Trainer{' + Liger' * liger} bf16"] = partial(_peer, jobs["ours bf16"], setting, liger)
    return run_cases("speed", setting, cases)


def _peer(job: Job, setting: Setting, liger: bool) -> Json:
    """The same rows by peft and transformers' Trainer."""
    import peft
    from transformers import Trainer, TrainingArguments

    model = make_model(job.size, None, _device(), torch.bfloat16)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    model.enable_input_require_grads()
    adapter: Any = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, adapter)
    rows = make_rows(job.batch * job.steps, job.tokens, model.config.vocab_size)
    arguments = TrainingArguments(
        str(setting.folder(f"peer-{liger}")),
        per_device_train_batch_size=job.batch,
        max_steps=job.steps,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        bf16=True,
        gradient_checkpointing=True,
        use_cpu=_device() == "cpu",
        disable_tqdm=True,
    )
    reset_peak_memory(resolve_device("auto"))
    data: Any = [{"input_ids": row.input_ids, "labels": row.input_ids} for row in rows]
    result = Trainer(wrapped, arguments, train_dataset=data, data_collator=_collate).train()
    tokens = job.batch * job.tokens * job.steps
    return {
        "tokens_per_second": round(tokens / result.metrics["train_runtime"], 1),
        "peak_gb": round(peak_memory_bytes(resolve_device("auto")) / 1e9, 3),
    }


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def memory(setting: Setting) -> Json:
    """Peaks beside the plan; the last case is the largest."""
    size, tokens = setting.size("8B", "tiny"), setting.size(2048, 32)
    paged = (("optimizer", "paged_adamw_8bit"),)
    jobs = {
        f"{size} nf4": Job(size=size, bits="nf4", tokens=tokens, steps=2),
        f"{size} bf16": Job(size=size, tokens=tokens, steps=2),
        f"{size} nf4 offloaded": Job(
            size=size, bits="nf4", tokens=tokens, steps=2, options=(("offload_activations", True),)
        ),
    }
    if not setting.quick:
        jobs["70B nf4"] = Job(size="70B", bits="nf4", tokens=512, batch=1, steps=2, options=paged)

    def case(job: Job, name: str) -> Json:
        config = config_of(job.size)
        rows, scheme = make_rows(job.batch, job.tokens, config.vocab_size), job.bits and Scheme(job.bits, 64, True)
        workload = workload_of(rows, settings_of(job, _device()), adapter_of(job), scheme or None)
        plan = plan_memory(config, workload)
        planned = sum(part.low for part in plan.parts if part.name != "CUDA context")
        peak = _figures(job, setting, name)["peak_gb"]
        return {"planned_gb": round(planned / 1e9, 3), "peak_gb": peak}

    return run_cases("memory", setting, {name: partial(case, job, name) for name, job in jobs.items()})


def profile(setting: Setting) -> Json:
    """The ten operations that take longest in two steps."""
    job = Job(size=setting.size("8B", "tiny"), bits="nf4", tokens=setting.size(2048, 32), steps=2)

    def case() -> Json:
        with torch.profiler.profile() as found:
            run_job(job, _device(), setting.folder("profile"))
        spent = "self_device_time_total" if _device() == "cuda" else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, spent))[:10]
        return {"milliseconds": {event.key[:60]: round(getattr(event, spent) / 1e3, 2) for event in events}}

    return run_cases("profile", setting, {"nf4": case})


def init(setting: Setting) -> Json:
    """Milliseconds a weight."""
    rows, columns = setting.size((4096, 14336), (64, 96))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(_device())

    def milliseconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            if _device() == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return round(1e3 * min(taken), 3)

    def code(bits: str) -> Json:
        scheme = Scheme(bits, 64, True)
        layer = QuantLinear(quantize(weight, scheme))
        quantizing = milliseconds(lambda: quantize(weight, scheme))
        return {"quantize": quantizing, "dequantize": milliseconds(lambda: layer.dense_weight(torch.bfloat16))}

    cases: dict[str, Callable[[], Json]] = {bits: partial(code, bits) for bits in ("nf4", "nf3", "nf2")}
    generator = torch.Generator().manual_seed(0)
    cases["decomposition, rank 16"] = lambda: {
        "milliseconds": milliseconds(lambda: truncated_svd(weight, 16, method="fast", generator=generator))
    }
    return run_cases("init", setting, cases)


def serve(setting: Setting) -> Json:
    """Steps of one token a second of a tiny graph, by the provider that runs it."""

    def case() -> Json:
        from graftline.export.onnx_export import export_graph
        from graftline.export.onnx_session import GraphSession, Step
        from studies.models import make_tiny_llama

        folder = setting.work / "graph"
        export_graph(make_tiny_llama(setting.folder("base")), folder, precision="fp32")
        session = GraphSession(folder, device=_device())
        runner, cache = session.runner(), session.new_cache(1, 64)
        runner.step(cache, Step([[5, 6, 7]], [3]))
        started = time.perf_counter()
        for at in range(16):
            runner.step(cache, Step([[8]], [4 + at]))
        return {"steps_per_second": round(16 / (time.perf_counter() - started), 1)}

    return run_cases("serve", setting, {"one row": case})


PARTS = {
    "parity": parity,
    "resume": resume,
    "speed": speed,
    "memory": memory,
    "profile": profile,
    "init": init,
    "serve": serve,
}

if __name__ == "__main__":
    import sys

    from studies.harness import main

    sys.exit(main(["gpu", *sys.argv[1:]]))
