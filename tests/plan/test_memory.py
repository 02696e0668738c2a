from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

from graftline.adapters.attach import attach
from graftline.plan import memory
from graftline.plan.memory import Workload, plan_memory, what_would_fit
from graftline.plan.trace import StepShape, empty_batch
from graftline.settings.model import Adapter
from graftline.train.loss import SupervisedLoss
from graftline.weights.quant.scheme import FP8, Scheme
from studies.memory import peak_allocated
from tests.sections import adapter_section
from tests.tiny import tiny_llama_config

_SHAPE = StepShape(rows=2, tokens=64, supervised_tokens=32)
_WORK = Workload(
    adapter=Adapter(method="lora", rank=4), shape=_SHAPE, quantization=None, optimizer="adamw", device="cpu"
)
_CONFIG = tiny_llama_config()


def _parts(workload: Workload, config: PretrainedConfig = _CONFIG) -> dict[str, float]:
    return {part.name: part.low for part in plan_memory(config, workload).parts}


def test_weights_adapters_and_states_are_counted_exactly() -> None:
    made = plan_memory(_CONFIG, _WORK)
    parts = {part.name: part.expected for part in made.parts}
    # 512·64 embedding (tied), per block q 64·64, k and v 32·64, o 64·64, three of 64·128, two norms; a last norm
    assert made.num_parameters == 512 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    # LoRA: R·(I + O) a layer
    assert made.num_trained == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert parts["weights"] == 4 * made.num_parameters
    assert parts["adapters"] == 4 * made.num_trained
    assert parts["optimizer"] == 8 * made.num_trained


def test_a_quantized_base_holds_codes_and_constants() -> None:
    block = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    double, plain = (_parts(replace(_WORK, quantization=Scheme("nf4", 64, double))) for double in (True, False))
    assert double["weights"] == block / 2 + 4 * (512 * 64 + 5 * 64)
    assert double["quantization constants"] == pytest.approx(block / 64 * (1 + 4 / 256))
    assert plain["quantization constants"] == block / 64 * 4
    fp8 = _parts(replace(_WORK, quantization=FP8))
    assert fp8["weights"] == block + 4 * (512 * 64 + 5 * 64)
    assert fp8["quantization constants"] == 4 * 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64), "one a row"


def test_activations_grow_with_tokens_and_shrink_with_recomputation() -> None:
    once = _parts(_WORK)["activations"]
    twice = _parts(replace(_WORK, shape=replace(_SHAPE, rows=4)))["activations"]
    config = tiny_llama_config(num_hidden_layers=8)
    kept, again = (
        plan_memory(config, replace(_WORK, shape=replace(_SHAPE, checkpointing=on))).total.low for on in (False, True)
    )
    assert twice == pytest.approx(2 * once, rel=0.05)
    assert again < 0.7 * kept


def test_logits_exist_for_supervised_positions_only() -> None:
    config = tiny_llama_config(vocab_size=32768)
    few, many = (_parts(replace(_WORK, shape=replace(_SHAPE, supervised_tokens=n)), config)["logits"] for n in (16, 64))
    assert 3 * 16 * 32768 * 4 <= few < 4 * 16 * 32768 * 4  # logits, log-softmax, one-hot targets
    assert many == pytest.approx(4 * few, rel=0.1)


def test_layers_beyond_eight_continue_what_was_traced() -> None:
    shallow, deep = (_parts(_WORK, tiny_llama_config(num_hidden_layers=layers))["activations"] for layers in (8, 16))
    assert deep == pytest.approx(2 * shallow, rel=0.05)


def test_a_model_far_larger_than_this_machine_is_planned_from_its_configuration() -> None:
    llama_70b = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    shape = StepShape(rows=1, tokens=2048, supervised_tokens=2048, checkpointing=True, dtype=torch.bfloat16)
    made = plan_memory(llama_70b, replace(_WORK, shape=shape, quantization=Scheme("nf4", 64, True), device="cuda"))
    parts = {part.name: part.expected for part in made.parts}
    assert made.num_parameters == pytest.approx(68.977e9, rel=1e-3)
    assert parts["weights"] + parts["quantization constants"] == pytest.approx(36.4e9, rel=0.01)
    assert 38e9 < made.total.expected < 48e9  # METHODS §5: about 45


def test_what_would_fit_ends_with_the_first_change_that_does() -> None:
    config = tiny_llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    workload = replace(_WORK, shape=StepShape(rows=16, tokens=128, supervised_tokens=64))
    limit = 0.6 * plan_memory(config, workload).total.expected
    changes = what_would_fit(config, workload, limit_bytes=limit)
    assert changes[0].what == "train.gradient_checkpointing: true"
    assert changes[-1].plan.total.expected <= limit
    assert all(change.plan.total.expected > limit for change in changes[:-1])


def test_smaller_batches_of_packed_rows_are_shorter_sequences() -> None:
    shape = StepShape(rows=1, tokens=512, supervised_tokens=64, packed=True, checkpointing=True)
    changes = what_would_fit(_CONFIG, replace(_WORK, shape=shape, batch_size=8), limit_bytes=0)
    assert [change.what for change in changes[:3]] == [
        "train.batch_size: 4, train.gradient_accumulation: 2",
        "train.batch_size: 2, train.gradient_accumulation: 4",
        "train.batch_size: 1, train.gradient_accumulation: 8",
    ]
    sizes = [change.plan.total.low for change in changes[:3]]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("method", ["pissa", "loftq", "dora", "vera", "houlsby", "full"])
def test_every_method_can_be_planned_without_weights(method: str) -> None:
    made = plan_memory(_CONFIG, replace(_WORK, adapter=adapter_section(method, rank=4)))
    assert made.num_trained > 0
    assert made.total.low > 4 * made.num_parameters


def test_rows_behind_a_prefix_keep_less_than_rows_with_a_copy_each() -> None:
    apart = _parts(_WORK)["activations"]
    shared = _parts(replace(_WORK, shape=replace(_SHAPE, prefix_tokens=48)))["activations"]
    # 2 rows of 64 tokens, or 48 once and 2 of 16
    assert shared < 0.75 * apart


def test_only_packed_rows_have_a_mask() -> None:
    shape = replace(_SHAPE, rows=1, tokens=1024)
    plain, packed = (_parts(replace(_WORK, shape=replace(shape, packed=on)))["activations"] for on in (False, True))
    # the mask, (1, 1, T, T), in fp32 that each of the two layers keeps, and the booleans that it is made from
    assert 2 * 4 < (packed - plain) / 1024**2 < 2 * 4 + 2.5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trained_weights_are_fp32_whatever_the_arithmetic(method: str) -> None:
    workload = replace(_WORK, adapter=adapter_section(method, rank=4), shape=replace(_SHAPE, dtype=torch.bfloat16))
    made = plan_memory(_CONFIG, workload)
    assert made.parts[0].low == (4 if method == "full" else 2) * made.num_parameters


def test_a_deep_model_is_continued_to_what_its_whole_trace_says(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama_config(num_hidden_layers=24, vocab_size=4096)
    shape = replace(_SHAPE, checkpointing=True)
    work = replace(_WORK, adapter=Adapter(method="full"), shape=shape)
    continued = plan_memory(config, work)
    monkeypatch.setattr("graftline.plan.trace._TRACED_LAYERS", (1, 24))
    monkeypatch.setattr("graftline.plan.memory._trace", memory._trace.__wrapped__)  # no trace is kept
    whole = plan_memory(config, work)
    assert continued.total.low == pytest.approx(whole.total.low, rel=1e-6)


def test_what_is_traced_is_what_torch_allocates() -> None:
    """The oracle is torch's profiler on the same step with real tensors."""
    model = LlamaForCausalLM(_CONFIG)
    attach(model, _WORK.adapter, seed=0)
    loss, batch = SupervisedLoss(model.train()), empty_batch(_SHAPE)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss(batch, num_supervised=torch.tensor(1)).backward()
    peak = peak_allocated(profiled)
    parts = _parts(_WORK)
    assert sum(parts[name] for name in ("activations", "logits", "gradients", "transient")) == pytest.approx(
        peak, rel=0.03
    )


@pytest.mark.parametrize("scheme", [None, Scheme("nf4", 64, True)])
def test_a_sharded_base_is_divided_over_the_processes_and_its_blocks_are_gathered(scheme: Scheme | None) -> None:
    config = tiny_llama_config(num_hidden_layers=8, tie_word_embeddings=False)
    alone = replace(_WORK, quantization=scheme)
    one, four = (plan_memory(config, replace(alone, processes=4, sharded=on)) for on in (False, True))
    whole, share = ({part.name: part for part in made.parts} for made in (one, four))
    for name in ("weights", "quantization constants"):
        assert share[name].expected == whole[name].expected / 4
    for name in ("adapters", "optimizer", "gradients", "activations", "logits"):
        assert share[name] == whole[name], "every process has it whole"
    outside = 4 * (2 * 512 * 64 + 64)  # embedding, head, last norm
    block = (whole["weights"].low + whole["quantization constants"].low - outside) / 8
    gathered = share["gathered weights"]
    assert (gathered.low, gathered.expected) == pytest.approx((outside + block, outside + 3 * block))
    assert gathered.high >= gathered.expected
    assert "each has the whole base (train.sharding: true divides it)" in one.table()
    assert "4 processes, rank 0 to 3 alike; divided over them: weights and quantization constants" in four.table()
    assert four.document()["divided"] == ["weights", "quantization constants"]
    assert one.document()["divided"] == []
    assert "processes" not in plan_memory(config, alone).document()


def test_sharding_is_among_what_would_fit_where_several_processes_could() -> None:
    config = tiny_llama_config(num_hidden_layers=8)
    for may_shard in (True, False):
        workload = replace(_WORK, processes=2, may_shard=may_shard)
        changes = [change.what for change in what_would_fit(config, workload, limit_bytes=0)]
        assert ("train.sharding: true" in changes) == may_shard
