"""Packed rows: little padding, the same loss positions, and no row sees another on any attention implementation."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.models.auto import AutoModelForCausalLM

from graftline.data.template import Encoded
from graftline.errors import TrainError
from graftline.train.packing import attention_arguments, check_packing, pack_rows, plan_packing

COMMON = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA_LIKE = COMMON | {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
SEPARATING: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**LLAMA_LIKE),
    "qwen2": lambda: Qwen2Config(**LLAMA_LIKE),
    "qwen2 with a window": lambda: Qwen2Config(
        **LLAMA_LIKE, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral with a window": lambda: MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**LLAMA_LIKE, head_dim=8, sliding_window=4),
    "gpt2": lambda: GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4),
    "gpt_neox": lambda: GPTNeoXConfig(
        **COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    ),
}
IMPLEMENTATIONS = [(name, "eager") for name in SEPARATING] + [
    (name, "sdpa")
    for name in SEPARATING
    if name != "gemma2"  # transformers has none for it
]
LEAKING: dict[str, Callable[[], PreTrainedConfig]] = {
    "opt": lambda: OPTConfig(
        **COMMON, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "bloom": lambda: BloomConfig(**COMMON, hidden_size=32, n_layer=2, n_head=4),
    "mamba": lambda: MambaConfig(**COMMON, hidden_size=32, num_hidden_layers=2),
}


def make(config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def rows(lengths: list[int], seed: int = 0) -> list[Encoded]:
    chooser = torch.Generator().manual_seed(seed)
    return [
        Encoded(torch.randint(3, 128, (n,), generator=chooser).tolist(), [at >= n // 2 for at in range(n)])
        for n in lengths
    ]


@pytest.mark.parametrize(("name", "implementation"), IMPLEMENTATIONS)
def test_packed_logits_are_those_of_each_row_alone(name: str, implementation: str) -> None:
    model = make(SEPARATING[name](), implementation)
    given_rows = rows([9, 4, 12, 1, 6, 7])
    packed = pack_rows(given_rows, max_tokens=16)
    assert packed.input_ids.shape == (3, 16)
    arguments = attention_arguments(packed.position_ids, implementation=implementation)
    with torch.no_grad():
        logits_BTV = model(input_ids=packed.input_ids, use_cache=False, **arguments).logits
        compared = 0
        for b, members in enumerate(plan_packing([len(row.input_ids) for row in given_rows], max_tokens=16)):
            start = 0
            for row in (given_rows[at] for at in members):
                end = start + len(row.input_ids)
                alone_TV = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0]
                torch.testing.assert_close(logits_BTV[b, start:end], alone_TV, atol=2e-6, rtol=1e-5)
                start, compared = end, compared + 1
    assert compared == 6
    assert check_packing(model) < 2e-6


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_whose_rows_would_see_each_other_is_refused(name: str) -> None:
    with pytest.raises(
        TrainError, match=r"with eager attention lets packed rows see each other.*train it without packing"
    ):
        check_packing(make(LEAKING[name](), "eager"))


def test_the_proof_holds_in_bfloat16_and_leaves_the_mode_as_it_was() -> None:
    model = make(LlamaConfig(**LLAMA_LIKE), "sdpa").to(torch.bfloat16).train()
    check_packing(model)
    assert model.training


def test_loss_positions_and_targets_are_those_of_each_row_alone() -> None:
    given_rows = rows([9, 4, 12, 6])
    packed = pack_rows(given_rows, max_tokens=16)
    flat = packed.input_ids.flatten()
    assert torch.equal(flat[packed.predict_at + 1], packed.targets)
    wanted = sorted(
        row.input_ids[at] for row in given_rows for at in range(1, len(row.input_ids)) if row.supervised[at]
    )
    assert sorted(packed.targets.tolist()) == wanted
    assert packed.num_tokens == 31


def test_the_first_token_of_a_row_is_never_predicted_from_the_row_before() -> None:
    both = [Encoded([5, 6], [True, True]), Encoded([7, 8], [True, True])]
    packed = pack_rows(both, max_tokens=4)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8]]
    assert packed.predict_at.tolist() == [0, 2]
    assert packed.targets.tolist() == [6, 8]


def test_packed_loss_is_the_loss_of_the_rows_alone() -> None:
    model = make(LlamaConfig(**LLAMA_LIKE), "sdpa")
    given_rows = rows([9, 4, 12, 6])

    def loss(some: list[Encoded]) -> torch.Tensor:
        packed = pack_rows(some, max_tokens=16)
        arguments = attention_arguments(packed.position_ids, implementation="sdpa")
        logits_BTV = model(input_ids=packed.input_ids, use_cache=False, **arguments).logits
        picked_NV = logits_BTV.flatten(0, 1)[packed.predict_at]
        return torch.nn.functional.cross_entropy(picked_NV, packed.targets, reduction="sum")

    with torch.no_grad():
        torch.testing.assert_close(loss(given_rows), sum(loss([row]) for row in given_rows), atol=1e-4, rtol=1e-5)


def test_flash_attention_gets_the_bounds_that_transformers_would_find() -> None:
    packed = pack_rows(rows([9, 4, 12, 1, 6]), max_tokens=16)
    (bounds, _), (longest, _) = prepare_fa_kwargs_from_position_ids(packed.position_ids)
    found = attention_arguments(packed.position_ids, implementation="flash_attention_2")
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert torch.equal(found["cu_seq_lens_q"], bounds)
    assert torch.equal(found["cu_seq_lens_k"], bounds)
    assert found["max_length_q"] == found["max_length_k"] == int(longest)
    assert int(bounds.diff().min()) > 0


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=80))
def test_every_row_is_packed_once_within_the_limit_and_near_the_best(lengths: list[int]) -> None:
    plan = plan_packing(lengths, max_tokens=64)
    assert sorted(row for packed in plan for row in packed) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in packed) <= 64 for packed in plan)
    assert all(packed == sorted(packed) for packed in plan)
    least = math.ceil(sum(lengths) / 64)
    assert len(plan) <= max(least, math.ceil(2 * least))  # Any two packed rows together hold more than one.
    filled = sorted(sum(lengths[row] for row in packed) for packed in plan)
    assert len(filled) < 2 or filled[0] + filled[1] > 64


def test_a_plan_fills_what_can_be_filled() -> None:
    assert plan_packing([4, 8, 1, 4, 2, 1], max_tokens=10) == [[1, 4], [0, 2, 3, 5]]


def test_a_row_longer_than_a_packed_row_is_refused() -> None:
    with pytest.raises(TrainError, match=r"row 1 has 17 tokens, a packed row has 16; raise data.max_tokens"):
        pack_rows(rows([4, 17]), max_tokens=16)
