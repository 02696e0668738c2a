"""How a step's rows are best cut into micro-batches on a GPU, and what each way of cutting costs.

A quantized base is dequantized again for every micro-batch, in forward, recomputation and backward; that time is spread
over the micro-batch's tokens. From some 8,000 tokens on it hardly counts, and more tokens only take memory. So the
choice is the smallest micro-batch of at least 8,192 tokens that fits, or the largest that fits at all.

Memory is planned for the smallest and the largest micro-batch; between them it grows with the tokens. Where another
moment of the step comes to need most, that is a little too much, never too little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from graftline.plan.memory import Workload, plan_memory

ENOUGH_TOKENS = 8192
_DEQUANTIZE_SECONDS = {
    code: seconds / (4096 * 14336)
    for code, seconds in {"nf4": 0.093e-3, "nf3": 0.1e-3, "nf2": 0.1e-3, "fp8": 0.1e-3}.items()
}
"""A weight, in bf16, by one kernel: bitsandbytes' on an H200; the others' is like it, and not measured."""
_PRODUCT_SECONDS = 2 / 350e12
"""A weight and token: what an H200 reached in graftline's own step (docs/training.md)."""


@dataclass(frozen=True)
class MicroBatchChoice:
    """One way to cut a step."""

    batch_size: int
    gradient_accumulation: int
    tokens: int
    """Of the largest micro-batch, with padding."""
    expected_bytes: float
    dequantizing: float
    """Time for dequantization over the time for products; 0 for a dense base."""
    fits: bool

    def text(self) -> str:
        """For a terminal."""
        cost = f", dequantization {self.dequantizing:.1%} on top of the products" if self.dequantizing else ""
        settings = f"train.batch_size: {self.batch_size}, train.gradient_accumulation: {self.gradient_accumulation}"
        verdict = "" if self.fits else ", does not fit"
        return f"{settings}: {self.tokens} tokens, {self.expected_bytes / 1e9:.2f} GB{cost}{verdict}"


def ways_to_cut(config: PretrainedConfig, workload: Workload, *, limit_bytes: float) -> tuple[MicroBatchChoice, ...]:
    """Every way to cut a step into equal micro-batches, the smallest first; the same rows and the same gradient.

    ``workload`` is one of them: its rows times its micro-batches are the step's.
    """
    shape = workload.shape
    rows = workload.batch_size or shape.rows
    step_rows, per_row = rows * shape.micro_batches, shape.rows * shape.tokens / rows
    sizes = [size for size in range(1, step_rows + 1) if step_rows % size == 0]

    def memory(size: int) -> float:
        supervised = max(1, round(shape.supervised_tokens * size / rows))
        cut = replace(shape, rows=size * shape.rows // rows, supervised_tokens=supervised)
        if shape.packed:
            cut = replace(cut, rows=1, tokens=round(per_row * size))
        cut = replace(cut, micro_batches=step_rows // size)
        return plan_memory(config, replace(workload, shape=cut, batch_size=size)).total.expected

    least, most = memory(sizes[0]), memory(sizes[-1])
    each = (most - least) / max(1, sizes[-1] - sizes[0])
    return tuple(
        MicroBatchChoice(
            batch_size=size,
            gradient_accumulation=step_rows // size,
            tokens=round(per_row * size),
            expected_bytes=least + each * (size - sizes[0]),
            dequantizing=_dequantizing(workload, per_row * size),
            fits=least + each * (size - sizes[0]) <= limit_bytes,
        )
        for size in sizes
    )


def _dequantizing(workload: Workload, tokens: float) -> float:
    if workload.quantization is None:
        return 0.0
    return _DEQUANTIZE_SECONDS[workload.quantization.code] / (_PRODUCT_SECONDS * tokens)


def best_of(choices: Sequence[MicroBatchChoice]) -> MicroBatchChoice | None:
    """The smallest with `ENOUGH_TOKENS` that fits, else the largest that fits; None where none does."""
    fitting = [choice for choice in choices if choice.fits]
    enough = [choice for choice in fitting if choice.tokens >= ENOUGH_TOKENS]
    return enough[0] if enough else fitting[-1] if fitting else None
