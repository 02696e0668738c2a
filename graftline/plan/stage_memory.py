"""Memory of the stages other than training: how much each will take, and a stop before loading if it cannot fit.

Weights, adapters, caches and logits are counted; the activations of a forward pass are traced on tensors without memory
(`graftline.plan.trace`). ``low`` is the minimum, the weights alone; a stage is refused only if even these do not fit.
All figures are bytes, of the GPU's memory on a GPU, else of main memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graftline.adapters.attach import attach
from graftline.data.split import CALIBRATION_ROWS
from graftline.errors import GraftlineError
from graftline.plan.memory import HEAP_WASTE, untrained
from graftline.plan.trace import Ledger, block_linears, fake_model, quantized_sizes, quantized_stacks
from graftline.settings.model import Pipeline, StageName
from graftline.settings.start import Weighting
from graftline.train.devices import DeviceKind, free_bytes, resolve_device, scoring_dtype, what_limits
from graftline.weights.experts import open_experts
from graftline.weights.head import CHUNK_BYTES
from graftline.weights.quant.calibration import calibration_bytes
from graftline.weights.quant.scheme import NESTED_BLOCK_SIZE, plan_of
from graftline.weights.reader import ARCHITECTURES

_PROCESS_BYTES = 0.7e9
"""Taken by Python, torch and transformers, or by the CUDA context and buffers."""
_PARITY_CHUNKS_BYTES = 6 * (64 << 20)
_CONVERTED_BYTES = 256 << 20
"""Most of a 16-bit weight that is converted at once."""


@dataclass(frozen=True)
class StageMemory:
    """Peak memory of one stage, bytes."""

    stage: StageName
    low: float
    expected: float
    what: str
    """What most of it is."""
    in_main_memory: bool = False
    """Whether it takes main memory where the other stages take the GPU's."""


@dataclass(frozen=True)
class _Sizes:
    """Parameters of a base and of the adapter on it, and the ways in which stages hold them."""

    pipeline: Pipeline
    config: PretrainedConfig
    device: DeviceKind

    @cached_property
    def model(self) -> PreTrainedModel:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        open_experts(model)
        return model

    @cached_property
    def total(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def linears(self) -> list[torch.nn.Linear | Conv1D]:
        return list(block_linears(self.model).values())

    @cached_property
    def head(self) -> int:
        return int(self.model.get_output_embeddings().weight.numel())

    @cached_property
    def adapter(self) -> float:
        """Bytes of what the adapter adds to the base; full fine-tuning and trained biases add nothing."""
        with FakeTensorMode():
            model = fake_model(self.config, dtype=torch.float32, quantized=False)
            attach(model, untrained(self.pipeline.adapter), seed=0)
            return 4.0 * (sum(parameter.numel() for parameter in model.parameters()) - self.total)

    @property
    def tensors(self) -> list[int]:
        """Weights of each tensor in the folder of the base, where experts may have a matrix each."""
        stacks = [(stack.weight, stack.num_experts * stack.parts) for stack in quantized_stacks(self.model).values()]
        split = {id(weight): pieces for weight, pieces in stacks}
        return [parameter.numel() // split.get(id(parameter), 1) for parameter in self.model.parameters()]

    @property
    def stored(self) -> int:
        """Bytes a weight in the folder of the base."""
        return int(getattr(torch, self.pipeline.base.dtype).itemsize)

    def dense(self, arithmetic: torch.dtype, stored: int) -> float:
        """Bytes of a dense model: on a GPU, fp32 arithmetic keeps 16-bit weights."""
        held = arithmetic.itemsize if self.device == "cpu" or arithmetic != torch.float32 else stored
        return float(self.total * held)

    def judged(self, arithmetic: torch.dtype) -> float:
        """The base that the adapter is trained on, and the adapter."""
        spec = self.pipeline.adapter
        if spec.method == "full" or spec.modules_to_save or spec.bias != "none":
            return 4.0 * self.total + self.adapter
        dense = self.dense(arithmetic, self.stored)
        if self.pipeline.quantize.method == "none":
            return dense + self.adapter
        scheme = plan_of(self.pipeline.quantize).default
        block, rows = quantized_sizes(self.model)
        each = 1 + 4 / NESTED_BLOCK_SIZE if scheme.double_quant else 4
        constants = rows if scheme.code == "fp8" else block / scheme.block_size
        return block * scheme.bits / 8 + constants * each + dense * (1 - block / self.total) + self.adapter

    def forward(self, arithmetic: torch.dtype, rows: int, tokens: int) -> float:
        """Activations of a forward pass without gradients, its cache, and a separate mask for each row."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        cache = 2 * rows * tokens * heads * size * text.num_hidden_layers * arithmetic.itemsize
        mask = rows * tokens * tokens * (arithmetic.itemsize + 1)
        waste = 1 + HEAP_WASTE if self.device == "cpu" else 1.05
        return waste * (_traced(self.config, arithmetic, rows, tokens) + cache + mask)

    @property
    def converted(self) -> float:
        """How much of a 16-bit weight a GPU converts at once."""
        widest = max([self.head, *(layer.weight.numel() for layer in self.linears)])
        return 0.0 if self.device == "cpu" else min(4.0 * widest, 2.0 * _CONVERTED_BYTES)


def _traced(config: PretrainedConfig, dtype: torch.dtype, rows: int, tokens: int) -> float:
    """Activations at their peak; without gradients they do not grow with the layers."""
    with FakeTensorMode(), torch.no_grad():
        model = fake_model(
            config, layers=min(2, config.get_text_config().num_hidden_layers), dtype=dtype, quantized=False
        )
        ledger = Ledger(model.eval())
        with ledger:
            ledger.enter("activations")
            model.base_model(
                input_ids=torch.zeros(rows, tokens, dtype=torch.long),
                position_ids=torch.arange(tokens).expand(rows, -1),
                use_cache=False,
            )
        return max((sum(peak.values()) for peak in ledger.peaks.values()), default=0.0)


def stage_memory(pipeline: Pipeline, config: PretrainedConfig, device: DeviceKind) -> list[StageMemory]:
    """Memory of those of init, evaluate, merge and package that compute, for a base with this configuration.

    Args:
        pipeline: the settings.
        config: the base's configuration.
        device: where the stages compute.

    Raises:
        AdapterError: a target matches no layer.
    """
    return list(_stages(_Sizes(pipeline, config, device)))


def _stages(sizes: _Sizes) -> Iterator[StageMemory]:
    pipeline, exact = sizes.pipeline, torch.float32
    if pipeline.quantize.method != "none":
        yield _init(sizes)
    yield _evaluate(sizes)
    judged = sizes.judged(exact)
    one_row = sizes.forward(exact, 1, pipeline.data.max_tokens) + sizes.converted + _PROCESS_BYTES
    if pipeline.package.merged:
        merged = sizes.dense(exact, getattr(torch, pipeline.package.dtype).itemsize)
        head = sizes.head * (4.0 if sizes.device == "cpu" else sizes.stored)
        low, what = max((judged, "the judged model"), (merged, "the merged model"))
        compared = StageMemory("merge", low, low + head + one_row + _PARITY_CHUNKS_BYTES, what)
        yield _requantizing(sizes, compared) if pipeline.package.calibrates else compared
    yield StageMemory("package", judged, judged + one_row, "the judged model")


def _init(sizes: _Sizes) -> StageMemory:
    weighting = sizes.pipeline.quantize.weighting
    on_gpu = sizes.device == "cuda" and weighting == "none"
    largest = max([layer.weight.numel() for layer in sizes.linears] if on_gpu else sizes.tensors) * sizes.stored
    low, expected = 2.0 * largest, 4.0 * largest + _PROCESS_BYTES
    if weighting == "none" or (calibrated := _calibration_bytes(sizes, weighting)) is None:
        return StageMemory("init", low, expected, "a tensor at a time")
    return StageMemory("init", low, expected + calibrated, _CALIBRATING, in_main_memory=True)


def _requantizing(sizes: _Sizes, compared: StageMemory) -> StageMemory:
    """The comparison of the models, or calibrating the requantized one, which runs in main memory after it."""
    largest = max(sizes.tensors)
    stored = getattr(torch, sizes.pipeline.package.dtype).itemsize
    # Beside the judged model's head, which waits for the comparison.
    calibrated = 4.0 * (largest * stored + sizes.head) + _PROCESS_BYTES + (_calibration_bytes(sizes, "full") or 0)
    if sizes.device == "cuda" or calibrated <= compared.expected:
        return compared
    return replace(compared, expected=calibrated, what=_CALIBRATING)


_CALIBRATING = "a block and what enters it on the calibration rows, in main memory"


def _calibration_bytes(sizes: _Sizes, weighting: Weighting) -> int | None:
    """What calibration takes beside a tensor at a time; None for an unknown architecture."""
    architecture = ARCHITECTURES.get(type(sizes.model).__name__)
    if architecture is None:
        return None
    shapes = {name: tuple(parameter.shape) for name, parameter in sizes.model.named_parameters()}
    rows = [[0] * sizes.pipeline.data.max_tokens] * CALIBRATION_ROWS
    return calibration_bytes(shapes, architecture, rows, weighting)


def _evaluate(sizes: _Sizes) -> StageMemory:
    pipeline = sizes.pipeline
    dtype = scoring_dtype(pipeline.evaluate.precision, sizes.device)
    base, judged = sizes.dense(dtype, sizes.stored), sizes.judged(dtype)
    rows = max(1, pipeline.evaluate.batch_tokens // pipeline.data.max_tokens)
    step = sizes.forward(dtype, rows, pipeline.data.max_tokens) + 2 * CHUNK_BYTES + sizes.converted + _PROCESS_BYTES
    # On a GPU each process has a GPU to itself.
    copies = (pipeline.evaluate.processes or 1) if sizes.device == "cpu" else 1
    low, what = max((judged, "the candidate"), (base, "the base before quantization"))
    return StageMemory("evaluate", copies * low, copies * (low + step), what)


def check_stage(stage: StageName, pipeline: Pipeline, config: PretrainedConfig) -> None:
    """Stop a stage that cannot fit before it loads anything.

    Raises:
        GraftlineError: not even its weights fit into the free memory.
    """
    device = resolve_device(pipeline.train.device)
    needed = next((one for one in stage_memory(pipeline, config, device) if one.stage == stage), None)
    free = free_bytes(device)
    if needed is None or needed.low <= free:
        return
    where = "the GPU" if device == "cuda" else "this machine"
    raise GraftlineError(
        f"stage {stage} needs {needed.low / 1e9:.2f} to {needed.expected / 1e9:.2f} GB of {where}, most of it for "
        f"{needed.what}; {free / 1e9:.2f} GB are free{what_limits(device)}: take a smaller base or a larger device, or "
        f"end what else uses it; `graftline plan` shows every stage"
    )
