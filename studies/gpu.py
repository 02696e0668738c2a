"""Training on a GPU: parity with the CPU, resume, speed, memory against the plan, profile, init, serving, targets.

For a bare machine: torch, transformers, accelerate and peft; no Prefect, DVC, hub or network. Weights are random and of
true shapes, made on the device. Parts come in the order of what is wanted most, and each ends after its time: what it
had not begun then is written down as such, and so is memory that did not suffice. Each case is a line of JSON when it
is done. Without a GPU the same parts run on the CPU with --quick, to show that they run. The first seven take less than
eight minutes together; `large` is the 70B model, and `targets`, `ratios` and `limits` are what targets are judged by.

parity   losses of three steps on the device and on the CPU, every method on dense and quantized bases, fp32 and bf16
resume   a training that was stopped after a step and went on: the same bytes as one that was not?
speed    tokens a second of our switches and of the peers, once, on one and the same rows
memory   peak memory beside what the planner expects
profile  where the time of one step goes
init     quantization, dequantization and the decomposition of PiSSA and LoftQ, by weight
serve    decoding and prefill of the exported graph beside transformers and vLLM, an adapter's cost and swap, its caches
large    70B in NF4: the peak
targets  against Unsloth and peft with Liger, in turns: the ratio with its 90 % interval; packed rows
ratios   our methods and bases against each other, in turns
compiled every method and base compiled, once, and packed rows; where the time of a compiled step goes
limits   long contexts in little memory, time to compile, waiting inside a micro-batch
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from graftline.plan.memory import plan_memory
from graftline.plan.preflight import workload_of
from graftline.weights.quant.blockwise import quantize
from graftline.weights.quant.linear import QuantLinear
from graftline.weights.quant.low_rank import truncated_svd
from studies.gpu_jobs import (
    Job,
    adapter_of,
    config_of,
    device_kind,
    make_rows,
    model_of,
    run_cases,
    run_job,
    scheme_of,
    settings_of,
)
from studies.gpu_side import figures_of
from studies.gpu_targets import limits, ratios, targets
from studies.harness import Json, Setting

METHODS = ("lora", "rslora", "dora", "vera", "houlsby", "pfeiffer")
BASES = (None, "nf4", "nf3", "nf2", "fp8")


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
        losses = run_job(job, device_kind(), setting.folder(f"{method}-{bits}-{precision}"))["losses"]
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
        whole = run_job(job, device_kind(), setting.folder(f"{bits}-{optimizer}-whole"))
        work = setting.folder(f"{bits}-{optimizer}-stopped")
        try:
            run_job(job, device_kind(), work, stop_after=3)
        except KeyboardInterrupt:
            resumed = run_job(job, device_kind(), work)
        pairs = [(resumed["weights"][name], tensor) for name, tensor in whole["weights"].items()]
        return {"same_bytes": all(torch.equal(a, b) for a, b in pairs)}

    cases = [(bits, optimizer) for bits in (None, "nf4") for optimizer in optimizers]
    return run_cases(
        "resume",
        setting,
        {f"{bits or 'dense'}, {name}": partial(case, bits, name) for bits, name in cases},
    )


def _figures(job: Job, setting: Setting, name: str) -> Json:
    found = run_job(job, device_kind(), setting.folder(name.replace(" ", "-").replace("/", "-")))
    return {key: found[key] for key in ("tokens_per_second", "peak_gb", "losses")}


def speed(setting: Setting) -> Json:
    """Ours, each switch by itself, and peers."""
    size, tokens = setting.size("8B", "tiny"), setting.size(2048, 32)
    compiled = (("compile", "always"),)
    jobs = {
        "ours nf4 compiled": Job(size=size, bits="nf4", tokens=tokens, options=compiled),
        "ours nf4": Job(size=size, bits="nf4", tokens=tokens),
        "ours nf4 offloaded": Job(size=size, bits="nf4", tokens=tokens, options=(("offload_activations", True),)),
        "ours bf16": Job(size=size, tokens=tokens),
        "ours bf16 dora": Job(size=size, method="dora", tokens=tokens),
        "ours bf16 vera": Job(size=size, method="vera", tokens=tokens),
        "ours nf3": Job(size=size, bits="nf3", tokens=tokens),
        "ours nf2": Job(size=size, bits="nf2", tokens=tokens),
        "ours fp8": Job(size=size, bits="fp8", tokens=tokens),
        "ours fp8, products too": Job(size=size, bits="fp8", tokens=tokens, options=(("fp8_products", True),)),
    }
    if setting.quick:
        jobs = {name: jobs[name] for name in ("ours nf4", "ours bf16", "ours nf4 offloaded", "ours fp8, products too")}
    cases: dict[str, Callable[[], Json]] = {name: partial(_figures, job, setting, name) for name, job in jobs.items()}
    for who in ("peft", "peft + Liger", "Unsloth"):
        for bits in ("nf4", None) if device_kind() == "cuda" else (None,):
            job = Job(size=size, bits=bits, tokens=tokens)
            cases[f"{who} {bits or 'bf16'}"] = partial(figures_of, who, job, setting)
    return run_cases("speed", setting, cases)


def memory(setting: Setting) -> Json:
    """Peaks beside the plan."""
    size, tokens = setting.size("8B", "tiny"), setting.size(2048, 32)
    jobs = {
        f"{size} nf4": Job(size=size, bits="nf4", tokens=tokens, steps=2),
        f"{size} bf16": Job(size=size, tokens=tokens, steps=2),
        f"{size} nf4 offloaded": Job(
            size=size, bits="nf4", tokens=tokens, steps=2, options=(("offload_activations", True),)
        ),
        f"{size} fp8": Job(size=size, bits="fp8", tokens=tokens, steps=2),
    }
    return run_cases("memory", setting, {name: partial(_planned, job, setting, name) for name, job in jobs.items()})


def large(setting: Setting) -> Json:
    """70B in NF4, one row of 512 tokens, paged states: under 44 GB?"""
    size, tokens = setting.size("70B", "tiny"), setting.size(512, 32)
    job = Job(
        size=size,
        bits="nf4",
        tokens=tokens,
        batch=1,
        steps=2,
        options=(("optimizer", setting.size("paged_adamw_8bit", "adamw")),),
    )

    def case() -> Json:
        found = _planned(job, setting, "large")
        return found | {
            "limit_gb": 44.0,
            "passed": found["peak_gb"] < 44 if device_kind() == "cuda" else "not run here",
        }

    return run_cases("large", setting, {f"{size} nf4": case})


def _planned(job: Job, setting: Setting, name: str) -> Json:
    config = config_of(job.size)
    rows, scheme = make_rows(job.batch, job.tokens, config.vocab_size), job.bits and scheme_of(job.bits)
    plan = plan_memory(config, workload_of(rows, settings_of(job, device_kind()), adapter_of(job), scheme or None))
    planned = sum(part.low for part in plan.parts if part.name != "CUDA context")
    peak = _figures(job, setting, name)["peak_gb"]
    return {"planned_gb": round(planned / 1e9, 3), "peak_gb": peak}


def profile(setting: Setting) -> Json:
    """The ten operations that take longest in two steps."""
    job = Job(size=setting.size("8B", "tiny"), bits="nf4", tokens=setting.size(2048, 32), steps=2)
    return run_cases("profile", setting, {"nf4": partial(_slowest, job, setting)})


def _slowest(job: Job, setting: Setting) -> Json:
    """The operations that take longest in a whole training, and how often each ran."""
    with torch.profiler.profile() as found:
        run_job(job, device_kind(), setting.folder("profile"))
    spent = "self_device_time_total" if device_kind() == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, spent))[:16]
    return {"milliseconds": {event.key[:60]: [round(getattr(event, spent) / 1e3, 2), event.count] for event in events}}


def compiled(setting: Setting) -> Json:
    """What compiles, each by itself; `speed` has the uncompiled ones."""
    size, tokens, steps = setting.size("8B", "tiny"), setting.size(2048, 32), setting.size(8, 4)
    compile_it = (("compile", "always" if device_kind() == "cuda" else "never"),)
    nf4 = Job(size=size, bits="nf4", tokens=tokens, steps=steps, options=compile_it)
    packed = replace(nf4, instructions=True, batch=setting.size(16, 4), options=(*compile_it, ("packing", True)))
    fp8_products = (*compile_it, ("fp8_products", True))
    jobs = {
        "nf4": nf4,
        "nf4, packed instruction rows": packed,
        "bf16": replace(nf4, bits=None),
        "bf16, dora": replace(nf4, bits=None, method="dora"),
        "bf16, vera": replace(nf4, bits=None, method="vera"),
        "nf3": replace(nf4, bits="nf3"),
        "nf2": replace(nf4, bits="nf2"),
        "fp8, products too": replace(nf4, bits="fp8", options=fp8_products),
    }
    cases: dict[str, Callable[[], Json]] = {name: partial(_warm, job, setting, name) for name, job in jobs.items()}
    cases["where the time goes, nf4"] = partial(_slowest, replace(nf4, steps=setting.size(6, 2)), setting)
    return run_cases("compiled", setting, cases)


def _warm(job: Job, setting: Setting, name: str) -> Json:
    """A training whose model has been trained on the same rows before, so that all its shapes are compiled."""
    model = model_of(job, device_kind())
    work = setting.folder(name.replace(" ", "-"))
    cold, warm = (run_job(job, device_kind(), work / which, model=model) for which in ("cold", "warm"))
    seconds = {"cold_step_seconds": cold["step_seconds"], "step_seconds": warm["step_seconds"]}
    return {key: warm[key] for key in ("tokens_per_second", "peak_gb", "losses")} | seconds


def init(setting: Setting) -> Json:
    """Milliseconds a weight."""
    rows, columns = setting.size((4096, 14336), (64, 96))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device_kind())

    def milliseconds(work: Callable[[], object]) -> float:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            if device_kind() == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - started)
        return round(1e3 * min(taken), 3)

    def code(bits: str) -> Json:
        scheme = scheme_of(bits)
        layer = QuantLinear(quantize(weight, scheme))
        quantizing = milliseconds(lambda: quantize(weight, scheme))
        return {"quantize": quantizing, "dequantize": milliseconds(lambda: layer.dense_weight(torch.bfloat16))}

    cases: dict[str, Callable[[], Json]] = {bits: partial(code, bits) for bits in ("nf4", "nf3", "nf2", "fp8")}
    generator = torch.Generator().manual_seed(0)
    cases["decomposition, rank 16"] = lambda: {
        "milliseconds": milliseconds(lambda: truncated_svd(weight, 16, method="fast", generator=generator))
    }
    return run_cases("init", setting, cases)


def serve(setting: Setting) -> Json:
    """The exported graph beside transformers and vLLM; see `studies.gpu_serving`."""
    from studies.gpu_serving import cases

    return run_cases("serve", setting, cases(setting))


PARTS = {
    "parity": parity,
    "resume": resume,
    "speed": speed,
    "memory": memory,
    "profile": profile,
    "init": init,
    "serve": serve,
    "large": large,
    "targets": targets,
    "ratios": ratios,
    "compiled": compiled,
    "limits": limits,
}

if __name__ == "__main__":
    import sys

    from studies.harness import main

    sys.exit(main(["gpu", *sys.argv[1:]]))
