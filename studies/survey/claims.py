"""The claims that small trainings answer: 1 to 7 and 10. Each reads raw results and gives a verdict and its reasons.

Margins stood here before the first cell ran: 5 % of full fine-tuning's gain (claim 1), 0.01 nats a token (claim 6,
METHODS §6), 10 times fewer parameters (claim 5).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from studies.survey.arms import (
    BySeed,
    Estimate,
    Result,
    arm,
    decide,
    difference,
    estimate,
    forgotten,
    read_cells,
    test_loss,
    values,
)
from studies.survey.grid import BITS, RANKS
from studies.survey.probe_claims import gradient_ratios, perplexities

NOT_RUN = "not run"


@dataclass(frozen=True)
class Claim:
    """A claim with its verdict and what it rests on."""

    number: int
    title: str
    says: str
    method: str
    verdict: str
    findings: tuple[str, ...]
    table: tuple[tuple[str, ...], ...] = ()
    """The first row is the head."""
    figure: str | None = None
    """Name of the figure that shows it."""


def _not_run(number: int, title: str, says: str, method: str) -> Claim:
    return Claim(number, title, says, method, NOT_RUN, ("the part has no results; run `make evidence`",))


def _gain(cell: Result) -> float:
    return float(cell["before"]["test"] - cell["after"]["test"])


def full_and_lora(results: Path) -> Claim:
    """Claim 1."""
    title, says = (
        "LoRA and full fine-tuning",
        "LoRA reaches 95–99 % of full fine-tuning with a fraction of the parameters",
    )
    method = (
        "gain of the test loss over the base, LoRA's (rank 8) over full fine-tuning's, by seed, at tuned rates; size m "
        "with five seeds, SmolLM2-135M with three (accuracy on 300 held-out rows)"
    )
    cells = read_cells(results, "methods")
    lora, full = arm(cells, "lora"), arm(cells, "full")
    if not lora or not full:
        return _not_run(1, title, says, method)
    seeds = sorted(lora.keys() & full.keys())
    ratio = estimate([_gain(lora[seed]) / _gain(full[seed]) for seed in seeds])
    share = lora[0]["trained_parameters"] / full[0]["trained_parameters"]
    findings = [f"size m: {ratio.plain()} of full fine-tuning's gain, with {share:.1%} of its trained parameters"]
    verdict = decide(_negative(ratio), wanted_below=-0.95)
    table = [
        ("model", "arm", "rate", "after", "trained"),
        *(_row("m", name, arm(cells, name)) for name in ("full", "lora")),
    ]
    real = real_arms(results)
    if "full" in real and "lora" in real:
        gap = difference(accuracies(real["lora"]), accuracies(real["full"]))
        kept = estimate([a / b for a, b in _paired(accuracies(real["lora"]), accuracies(real["full"]))])
        findings.append(
            f"SmolLM2-135M: accuracy differs by {gap.text()} (LoRA − full); LoRA has {kept.plain()} of full's accuracy"
        )
        verdict = f"{verdict} on size m, {decide(_negative(kept), wanted_below=-0.95)} on SmolLM2-135M"
        table += [_real_row(name, real[name]) for name in ("full", "lora")]
    return Claim(1, title, says, method, verdict, tuple(findings), tuple(table), "methods")


def _negative(found: Estimate) -> Estimate:
    return Estimate(-found.mean, -found.high, -found.low, found.seeds)


def _paired(first: BySeed, second: BySeed) -> list[tuple[float, float]]:
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def _row(model: str, name: str, cells: dict[int, Result]) -> tuple[str, ...]:
    loss = estimate(list(values(cells, test_loss).values()))
    first = next(iter(cells.values()))
    return model, name, f"{first['learning_rate']:g}", f"{loss.plain()} nats", f"{first['trained_parameters']:,}"


def _real_row(name: str, cells: dict[int, Result]) -> tuple[str, ...]:
    first, found = next(iter(cells.values())), estimate(list(accuracies(cells).values()))
    trained = f"{first['train']['trained_parameters']:,}"
    return "SmolLM2-135M", name, first["variant"].split()[1], f"accuracy {found.plain()}", trained


def real_arms(results: Path) -> dict[str, dict[int, Result]]:
    """SmolLM2's arms at their tuned rates (those with more than one seed), by seed."""
    found: dict[str, dict[int, Result]] = {}
    for cell in read_cells(results, "real"):
        found.setdefault(cell["variant"], {})[cell["seed"]] = cell
    return {variant.split()[0]: cells for variant, cells in found.items() if len(cells) > 1}


def accuracies(cells: dict[int, Result]) -> BySeed:
    """Accuracy of real cells by seed."""
    return values(cells, lambda cell: float(cell["evaluate"]["accuracy"]))


def rank_scaling(results: Path) -> Claim:
    """Claim 2."""
    title, says = "rsLoRA over ranks", "rsLoRA keeps its gradients and gains with rank while LoRA stalls"
    method = (
        "SmolLM2-135M: norm of the gradient of all B at step 0, rank 4 to 256; size l: test loss at one alpha, "
        f"ranks {RANKS[0]} to {RANKS[-1]} (its width), each method at its rate for rank 16, three seeds"
    )
    cells = read_cells(results, "ranks")
    if not cells:
        return _not_run(2, title, says, method)
    gains: dict[str, Estimate] = {}
    table: list[tuple[str, ...]] = [("rank", "LoRA", "rsLoRA", "rsLoRA − LoRA")]
    for rank in RANKS:
        lora, rslora = (values(arm(cells, f"{name} r={rank}"), test_loss) for name in ("lora", "rslora"))
        if not lora or not rslora:
            return _not_run(2, title, says, method)
        both = (estimate(list(found.values())).plain() for found in (lora, rslora))
        table.append((str(rank), *both, difference(rslora, lora).text()))
    for name in ("lora", "rslora"):
        ends = [values(arm(cells, f"{name} r={rank}"), test_loss) for rank in (RANKS[0], RANKS[-1])]
        gains[name] = difference(ends[1], ends[0])
    findings = [f"{name} from rank {RANKS[0]} to {RANKS[-1]}: {found.text()} nats" for name, found in gains.items()]
    better = gains["rslora"].high < 0 and gains["rslora"].high < gains["lora"].low
    findings += gradient_ratios(results)
    return Claim(
        2, title, says, method, "supported" if better else "not supported", tuple(findings), tuple(table), "ranks"
    )


def dora(results: Path) -> Claim:
    """Claim 3."""
    title, says = "DoRA against LoRA", "DoRA is better than LoRA at equal rank, and as good at half of it"
    method = "test loss on size m, each arm at its own tuned rate, five seeds, differences by seed"
    cells = read_cells(results, "methods")
    lora, equal, half = (values(arm(cells, name), test_loss) for name in ("lora", "dora", "dora half rank"))
    if not lora or not equal or not half:
        return _not_run(3, title, says, method)
    at_equal, at_half = difference(equal, lora), difference(half, lora)
    findings = (
        f"equal rank (8): {at_equal.text()} nats (below 0: DoRA is better)",
        f"half rank (4 against 8): {at_half.text()} nats",
    )
    verdict = f"{decide(at_equal, wanted_below=0)} at equal rank, {decide(at_half, wanted_below=0.01)} at half rank"
    table = _method_table(cells, ("lora", "dora", "dora half rank"))
    return Claim(3, title, says, method, verdict, findings, table, "methods")


def _method_table(cells: list[Result], names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return (("model", "arm", "rate", "after", "trained"), *(_row("m", name, arm(cells, name)) for name in names))


def pissa(results: Path) -> Claim:
    """Claim 4."""
    title, says = "PiSSA's convergence", "PiSSA converges faster than LoRA"
    method = (
        "steps until the tuning loss has fallen by half of LoRA's final gain, interpolated between measurements, size "
        "m, each arm at its tuned rate, five seeds"
    )
    cells = read_cells(results, "methods")
    lora, other = arm(cells, "lora"), arm(cells, "pissa")
    if not lora or not other:
        return _not_run(4, title, says, method)
    threshold = _half_way(lora)
    steps = {
        name: values(found, lambda cell: steps_to(cell, threshold))
        for name, found in (("lora", lora), ("pissa", other))
    }
    gap, end = difference(steps["pissa"], steps["lora"]), difference(values(other, test_loss), values(lora, test_loss))
    findings = (
        f"steps to {threshold:.3f} nats: PiSSA − LoRA {gap.text(1)}",
        f"after all steps: {end.text()} nats (below 0: PiSSA is better)",
    )
    table = _method_table(cells, ("lora", "pissa"))
    return Claim(4, title, says, method, decide(gap, wanted_below=0), findings, table, "convergence")


def _half_way(cells: dict[int, Result]) -> float:
    starts = [cell["curve"][0]["task"] for cell in cells.values()]
    ends = [cell["curve"][-1]["task"] for cell in cells.values()]
    return float((sum(starts) + sum(ends)) / 2 / len(cells))


def steps_to(cell: Result, threshold: float) -> float:
    """Steps until the curve first falls to ``threshold``, between two looks on a straight line; infinity if never."""
    previous = None
    for look in cell["curve"]:
        if look["task"] <= threshold:
            if previous is None:
                return float(look["step"])
            share = (previous["task"] - threshold) / (previous["task"] - look["task"])
            return float(previous["step"] + share * (look["step"] - previous["step"]))
        previous = look
    return math.inf


def vera(results: Path) -> Claim:
    """Claim 5."""
    title, says = "VeRA", "VeRA does as well as LoRA with a tenth of the parameters or less"
    method = (
        "test loss on size m, VeRA of rank 32 against LoRA of rank 8, each at its tuned rate, five seeds; margin 0.01"
    )
    cells = read_cells(results, "methods")
    lora, found = arm(cells, "lora"), arm(cells, "vera")
    if not lora or not found:
        return _not_run(5, title, says, method)
    fewer = lora[0]["trained_parameters"] / found[0]["trained_parameters"]
    gap = difference(values(found, test_loss), values(lora, test_loss))
    ratio = estimate([_gain(found[seed]) / _gain(lora[seed]) for seed in sorted(lora.keys() & found.keys())])
    findings = (
        f"{fewer:.1f} times fewer trained parameters; loss {gap.text()} nats (VeRA − LoRA)",
        f"{ratio.plain()} of LoRA's gain",
    )
    verdict = decide(gap, wanted_below=0.01) if fewer >= 10 else "not testable: fewer than ten times"
    return Claim(5, title, says, method, verdict, findings, _method_table(cells, ("lora", "vera")), "methods")


def qlora(results: Path) -> Claim:
    """Claim 6."""
    title = "QLoRA"
    says = (
        "a LoRA on an NF4 base equals one on the 16-bit base; perplexity Int4 > FP4 > NF4; double quantization is free"
    )
    method = (
        "test loss, NF4 − 16 bits, on size l (three seeds, margin 0.01 nats); accuracy of SmolLM2-135M (three seeds, "
        "margin one point); perplexity of general text with SmolLM2's weights rounded to each code, documents resampled"
    )
    cells = read_cells(results, "bits")
    dense, four = (values(arm(cells, name), test_loss) for name in ("16 bits", "qlora 4 bits"))
    if not dense or not four:
        return _not_run(6, title, says, method)
    gap = difference(four, dense, level=0.9)
    findings = [f"size l: NF4 − 16 bits {gap.text(4)} nats (90 % interval)"]
    parts = [f"{decide(gap, wanted_below=0.01)} on size l"]
    real = real_arms(results)
    if "qlora" in real and "lora" in real:
        accuracy = difference(accuracies(real["lora"]), accuracies(real["qlora"]), level=0.9)
        findings.append(f"SmolLM2-135M: accuracy lost to NF4 {accuracy.text()} (90 % interval)")
        parts.append(f"{decide(accuracy, wanted_below=0.01)} on SmolLM2-135M")
    order, ordered, table = perplexities(results)
    findings += order
    if ordered is not None:
        parts.append(f"the order of perplexities {'supported' if ordered else 'not supported'}")
    return Claim(6, title, says, method, "; ".join(parts), tuple(findings), table, "codes" if table else "bits")


def loftq(results: Path) -> Claim:
    """Claim 7."""
    title, says = "LoftQ by bits", "LoftQ is better than QLoRA, the more the fewer bits"
    method = (
        "test loss on size l (eight blocks: 2.25 bits are one block in NF4, seven in NF2), rank 16, 100 steps, each at "
        "its rate for 3 bits, three seeds; on SmolLM2-135M at 2, 3 and 4 bits: "
        "studies/results/quantized_init.json, docs/quantization.md"
    )
    cells = read_cells(results, "bits")
    table: list[tuple[str, ...]] = [("bits", "weight error, QLoRA and LoftQ", "QLoRA", "LoftQ", "LoftQ − QLoRA")]
    gaps = {}
    for bits in BITS:
        plain, paired = arm(cells, f"qlora {bits} bits"), arm(cells, f"loftq {bits} bits")
        if not plain or not paired:
            return _not_run(7, title, says, method)
        gaps[bits] = difference(values(paired, test_loss), values(plain, test_loss))
        errors = f"{plain[0]['weight_error']:.3f}, {paired[0]['weight_error']:.3f}"
        both = (estimate(list(values(found, test_loss).values())).plain() for found in (plain, paired))
        table.append((str(bits), errors, *both, gaps[bits].text()))
    better = [str(bits) for bits, gap in gaps.items() if gap.high < 0]
    worse = [str(bits) for bits, gap in gaps.items() if gap.low > 0]
    findings = [f"better at {', '.join(better) or 'no'} bits, worse at {', '.join(worse) or 'none'}, else not decided"]
    verdict = (
        "supported"
        if len(better) == len(BITS)
        else f"{'supported at ' + ', '.join(better) if better else 'not supported'}"
    )
    return Claim(
        7,
        title,
        says,
        method,
        verdict + (" bits" if better and len(better) < len(BITS) else ""),
        tuple(findings),
        tuple(table),
        "bits",
    )


def forgetting(results: Path) -> Claim:
    """Claim 10."""
    title, says = "Forgetting", "adapters forget less than full fine-tuning at the same gain"
    method = (
        "general text's loss where the task's loss first reaches the level that the worst arm ends with, interpolated "
        "between measurements; size m, tuned rates, five seeds"
    )
    cells = read_cells(results, "methods")
    names = [name for name in ("full", "lora", "dora", "pissa", "vera", "houlsby") if arm(cells, name)]
    if "full" not in names or len(names) < 2:
        return _not_run(10, title, says, method)
    level = max(estimate([cell["curve"][-1]["task"] for cell in arm(cells, name).values()]).mean for name in names)
    table: list[tuple[str, ...]] = [
        ("arm", "rate", f"forgotten at {level:.3f} nats of task loss", "less full's", "forgotten at the end")
    ]
    at_level: dict[str, BySeed] = {name: _forgotten_at(arm(cells, name), level) for name in names}
    less = []
    for name in names:
        gap = difference(at_level[name], at_level["full"])
        less += [name] if name != "full" and gap.high < 0 else []
        end = estimate(list(values(arm(cells, name), forgotten).values()))
        matched = estimate(list(at_level[name].values())).plain()
        rate = f"{arm(cells, name)[0]['learning_rate']:g}"
        table.append((name, rate, matched, "–" if name == "full" else gap.text(), end.plain()))
    others = [name for name in names if name != "full"]
    findings = (
        f"less than full fine-tuning: {', '.join(less) or 'none'} of {', '.join(others)}",
        "rates were tuned for the task alone; part of the difference is that of the rates, not of the methods",
    )
    verdict = "supported" if less == others else ("supported for " + ", ".join(less) if less else "not supported")
    return Claim(10, title, says, method, verdict, findings, tuple(table), "forgetting")


def _forgotten_at(cells: dict[int, Result], level: float) -> BySeed:
    found = {}
    for seed, cell in sorted(cells.items()):
        steps = min(steps_to(cell, level), cell["curve"][-1]["step"])
        found[seed] = _at(cell, steps) - cell["curve"][0]["general"]
    return found


def _at(cell: Result, steps: float) -> float:
    """General loss at a step, on a straight line between two looks."""
    looks = cell["curve"]
    for before, after in pairwise(looks):
        if before["step"] <= steps <= after["step"]:
            share = (steps - before["step"]) / (after["step"] - before["step"])
            return float(before["general"] + share * (after["general"] - before["general"]))
    return float(looks[-1]["general"])


TRAINED: tuple[Callable[[Path], Claim], ...] = (
    full_and_lora,
    rank_scaling,
    dora,
    pissa,
    vera,
    qlora,
    loftq,
    forgetting,
)
