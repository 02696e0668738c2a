"""The targets of training on a GPU: sides that take turns on one card, and limits of memory and time.

Each side is a process that keeps its model; they never run at the same time, and their order changes by the round. A
ratio's interval is Student's, at 90 %, of the rounds' log ratios; what must hold is its worse end. Every row has
``measured``, ``limit`` and ``passed``, which without a GPU is "not run here".
"""

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from graftline.errors import GraftlineError
from graftline.train.batches import pad_rows, use_row_attention
from graftline.train.loss import SupervisedLoss
from studies.gpu_jobs import Job, TimeIsUpError, device_kind, model_of, rows_of, run_cases, run_job, why_not
from studies.gpu_side import Child, Here, train_on
from studies.harness import Json, Setting

_STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""95 % quantiles of Student's t with 1, 2, … degrees of freedom."""
_COMPILED = (("compile", "always"),)
_OFFLOADED = (("offload_activations", True),)


@dataclass(frozen=True)
class Side:
    """Who trains what."""

    who: str
    job: Job


def take_turns(sides: Mapping[str, Side], setting: Setting, found: dict[str, list[float]]) -> dict[str, float]:
    """Fill ``found`` with each side's tokens a second, a round at a time; returns peaks in GB.

    A first turn of each, which compiles, is not counted.

    Raises:
        RuntimeError: a side cannot; the message says why.
    """
    peaks = dict.fromkeys(sides, 0.0)
    opened: dict[str, Any] = {}
    try:
        for name, side in sides.items():
            work = setting.folder(f"{'-'.join(sides)}-{name}".replace(" ", ""))
            opened[name] = (Here if setting.quick else Child)(side.who, work)
        order, chooser = list(sides), random.Random(setting.seed)
        for number in range(setting.turns(5) + 1):
            turn: dict[str, float] = {}
            for name in order:
                answer = opened[name].train(sides[name].job)
                if "not_done" in answer:
                    raise RuntimeError(f"{name}: {answer['not_done']}")
                peaks[name], turn[name] = max(peaks[name], answer["peak_gb"]), answer["tokens_per_second"]
            for name in sides if number else ():
                found.setdefault(name, []).append(turn[name])
            chooser.shuffle(order)
    finally:
        for each in opened.values():
            each.__exit__()
    return peaks


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and its 90 % interval, Student's of the logarithms: (mean, low, high)."""
    logs = [math.log(ratio) for ratio in ratios]
    mean, half = statistics.fmean(logs), math.inf
    if len(logs) > 1:
        half = _STUDENT[min(len(logs) - 2, len(_STUDENT) - 1)] * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = (math.exp(mean + sign * half) for sign in (-1, 1))
    return math.exp(mean), low, high


def judged(measured: object, limit: str, *, passed: bool) -> Json:
    """A row of the table of targets."""
    return {"measured": measured, "limit": limit, "passed": passed if device_kind() == "cuda" else "not run here"}


def _not_run(limit: str, error: Exception) -> Json:
    return {"measured": None, "limit": limit, "passed": f"not run here: {why_not(error)}"}


def _sign(at_least: bool, bound: float) -> str:
    return f"{'≥' if at_least else '≤'} {bound}"


def _fitting(limit: str, work: Callable[[], tuple[object, bool]]) -> Json:
    """A row of what ``work`` measures; memory that does not suffice is a result."""
    try:
        measured, passed = work()
    except (RuntimeError, GraftlineError) as error:
        if why_not(error) != "out of memory":
            raise
        measured, passed = "out of memory", False
    return judged(measured, limit, passed=passed)


def _compare(setting: Setting, sides: Mapping[str, Side], bounds: Mapping[str, tuple[str, str, float, bool]]) -> Json:
    """Rows: name -> (above, below, bound, whether at least); the ratio is of tokens a second, above over below."""
    found: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    in_time = True
    try:
        peaks = take_turns(sides, setting, found)
    except TimeIsUpError:
        in_time = False
    except RuntimeError as error:
        limits_of = {name: _sign(at_least, bound) for name, (_, _, bound, at_least) in bounds.items()}
        return {"rows": {name: _not_run(limit, error) for name, limit in limits_of.items()}}
    rounds = min((len(found.get(name, ())) for name in sides), default=0)
    if rounds < 2:
        raise TimeIsUpError
    rows: Json = {}
    for name, (above, below, bound, at_least) in bounds.items():
        ratios = [a / b for a, b in zip(found[above][:rounds], found[below][:rounds], strict=True)]
        mean, low, high = interval(ratios)
        measured = {"ratio": round(mean, 3), "interval_90": [round(low, 3), round(high, 3)], "turns": rounds}
        holds = low >= bound if at_least else high <= bound
        rows[name] = judged(measured, _sign(at_least, bound), passed=holds and in_time)
    return {"rows": rows, "tokens_per_second": found, "peak_gb": peaks}


def targets(setting: Setting) -> Json:
    """Against the peers, five turns of 20 steps behind two of warm-up."""
    size, tokens, steps = setting.size(("8B", 2048, 22), ("tiny", 32, 4))
    common: dict[str, Any] = {"size": size, "tokens": tokens, "steps": steps}
    nf4, bf16 = Job(bits="nf4", **common), Job(**common)
    packed = replace(nf4, instructions=True, batch=setting.size(16, 4), options=(*_COMPILED, ("packing", True)))
    fast = _COMPILED if device_kind() == "cuda" else ()
    unsloth = {"ours": Side("ours", replace(nf4, options=fast)), "Unsloth": Side("Unsloth", nf4)}
    liger = {"ours": Side("ours", replace(bf16, options=fast)), "Liger": Side("peft + Liger", bf16)}
    plain = {"ours": Side("ours", replace(bf16, options=fast)), "peft": Side("peft", bf16)}
    if device_kind() == "cpu":
        packed = replace(packed, options=(("packing", True),))

    def real_tokens() -> Json:
        found: dict[str, list[float]] = {}
        try:
            take_turns({"ours": Side("ours", packed)}, setting, found)
        except RuntimeError as error:
            return _not_run("≥ 10000", error)
        mean, low, high = interval(found["ours"])
        measured = {"tokens_per_second": round(mean), "interval_90": [round(low), round(high)]}
        return judged(measured, "≥ 10000", passed=low >= 10_000)

    cases: dict[str, Callable[[], Json]] = {
        "nf4 / Unsloth": partial(_compare, setting, unsloth, {"tokens a second": ("ours", "Unsloth", 1.05, True)}),
        "bf16 / peft + Liger": partial(_compare, setting, liger, {"tokens a second": ("ours", "Liger", 1.15, True)}),
        "packed instruction rows": real_tokens,
        "bf16 / peft": partial(_compare, setting, plain, {"tokens a second": ("ours", "peft", 1.15, True)}),
    }
    return run_cases("targets", setting, cases)


def ratios(setting: Setting) -> Json:
    """Our methods and bases against each other; a ratio of steps is the inverse of that of tokens a second."""
    size, tokens, steps = setting.size(("8B", 2048, 22), ("tiny", 32, 4))
    fast = _COMPILED if device_kind() == "cuda" else ()

    def side(bits: str | None = None, method: str = "lora") -> Side:
        return Side("ours", Job(size=size, bits=bits, method=method, tokens=tokens, steps=steps, options=fast))

    methods = {"lora": side(), "dora": side(method="dora"), "vera": side(method="vera")}
    bases = {"nf4": side("nf4"), "nf3": side("nf3"), "nf2": side("nf2")}
    return run_cases(
        "ratios",
        setting,
        {
            "methods": partial(
                _compare,
                setting,
                methods,
                {"DoRA's step": ("lora", "dora", 1.15, False), "VeRA's step": ("lora", "vera", 1.1, False)},
            ),
            "nf4 / bf16": partial(
                _compare, setting, {"nf4": bases["nf4"], "bf16": side()}, {"QLoRA": ("nf4", "bf16", 0.93, True)}
            ),
            "bases": partial(
                _compare,
                setting,
                bases,
                {"3 bits' step": ("nf4", "nf3", 1.15, False), "2 bits' step": ("nf4", "nf2", 1.15, False)},
            ),
        },
    )


def limits(setting: Setting) -> Json:
    """Memory that suffices, time to compile, and that nothing waits."""
    size, tokens = setting.size("8B", "tiny"), setting.size(2048, 32)
    usual = Job(size=size, bits="nf4", tokens=tokens, steps=setting.size(3, 2))

    def peak(job: Job, most: float) -> Json:
        def measure() -> tuple[object, bool]:
            found = run_job(job, device_kind(), setting.folder(f"peak-{most}"))["peak_gb"]
            return found, found <= most

        return _fitting(f"≤ {most} GB", measure)

    cases: dict[str, Callable[[], Json]] = {
        "nothing waits inside a micro-batch": partial(_waits, setting),
        "nf4, peak": partial(peak, usual, 10.4),
        "nf4 offloaded, peak": partial(peak, replace(usual, options=_OFFLOADED), 8.6),
        "compiled, cold and warm": partial(_compiling, setting, usual),
    }
    for context, gigabytes in ((8, 16), (32, 24), (128, 80)):
        job = replace(usual, batch=1, steps=1, tokens=setting.size(1024 * context, 32))
        job = replace(job, options=(*_OFFLOADED, ("optimizer", setting.size("paged_adamw_8bit", "adamw"))))
        cases[f"{context}k tokens on {gigabytes} GB"] = partial(_within, job, gigabytes, setting)
    return run_cases("limits", setting, cases)


def _within(job: Job, gigabytes: int, setting: Setting) -> Json:
    """Train within so much of the card's memory; what does not suffice is out of memory, as on a smaller card."""
    on_card = device_kind() == "cuda"
    if on_card:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))

    def measure() -> tuple[object, bool]:
        return run_job(job, device_kind(), setting.folder(f"within-{gigabytes}"))["peak_gb"], True

    try:
        return _fitting(f"{job.tokens} tokens within {gigabytes} GB", measure)
    finally:
        if on_card:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _compiling(setting: Setting, job: Job) -> Json:
    """Seconds up to the end of the first step, without and with what an earlier process has compiled."""
    seconds = []
    for attempt in ("cold", "warm"):
        work = setting.folder(f"compiling-{attempt}")
        if setting.quick:
            found = train_on("ours", job, work)
        else:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(setting.folder("compiled"))}
            with Child("ours", work, cache) as child:
                found = child.train(replace(job, options=_COMPILED))
        if "not_done" in found:
            return {"not_done": found["not_done"]}
        seconds.append(found["first_step_seconds"])
    return judged(seconds, "< 90 s cold, < 20 s warm", passed=seconds[0] < 90 and seconds[1] < 20)


def _waits(setting: Setting) -> Json:
    """One micro-batch with torch's own check on; on a CPU there is none."""
    del setting
    job = Job(size="tiny", bits="nf4", tokens=32)
    model = model_of(job, device_kind()).train()
    if device_kind() == "cuda":
        use_row_attention(model)
    given: Any = pad_rows(rows_of(job)[:4])
    batch = {name: value.to(device_kind()) if hasattr(value, "to") else value for name, value in given.items()}
    count = torch.tensor(128.0, device=device_kind())
    loss: Any = SupervisedLoss(model)
    loss(batch, num_supervised=count).backward()  # libraries are loaded
    if device_kind() == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        loss(batch, num_supervised=count).backward()
    finally:
        if device_kind() == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return judged(0, "0", passed=True)
