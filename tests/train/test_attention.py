"""Attention by bounds, on a CPU: the twin of what torch's kernel for packed rows computes on a GPU."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.train import attention
from graftline.train.attention import attend, can_run_here, set_attention
from graftline.train.batches import can_share_prefix, hidden_states, pack_rows, pad_rows, use_row_attention
from graftline.train.packing import check_packing
from graftline.train.trainer import train
from tests.sections import train_section
from tests.train.rows import lora_model, make_rows


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_kernel_for_packed_rows_gives_the_hidden_states_and_gradients_of_rows_alone(
    tiny_llama: Path,
) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).cuda()
    exact = _load(tiny_llama)
    assert can_run_here(model)
    assert use_row_attention(model)
    values: dict[str, Any] = dict(pack_rows(make_rows(7)))
    bounds = values["row_bounds"].tolist()
    moved: Any = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    together = hidden_states(model, moved).flatten(0, 1)
    # Not the sum of squares: behind a norm it is nearly constant, and its gradient is what rounding leaves.
    direction_H = torch.randn(together.shape[-1], generator=torch.Generator().manual_seed(0))
    (together.float() * direction_H.cuda()).sum().backward()
    for start, end in itertools.pairwise(bounds):
        ids = values["input_ids"].flatten()[None, start:end]
        alone = exact.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        (alone * direction_H).sum().backward()
        assert float((together[start:end].float().cpu() - alone).norm()) <= 0.03 * float(alone.norm())
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        if other.grad is not None and one.grad is not None:
            assert float((one.grad.float().cpu() - other.grad).norm()) <= 0.1 * float(other.grad.norm()), name


def test_packed_rows_have_the_hidden_states_that_they_have_alone(tiny_llama: Path) -> None:
    model, rows = _load(tiny_llama), make_rows(7)
    assert use_row_attention(model)
    packed = pack_rows(rows)
    assert packed["row_bounds"].tolist()[-1] == packed["input_ids"].numel()
    assert packed["longest_row"] == int(packed["row_bounds"].diff().max())
    with torch.no_grad():
        together = hidden_states(model, packed).flatten(0, 1)
        bounds = packed["row_bounds"].tolist()
        for start, end in itertools.pairwise(bounds):
            alone = model.base_model(input_ids=packed["input_ids"].flatten()[None, start:end], use_cache=False)
            torch.testing.assert_close(together[start:end], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    assert check_packing(model) < 1e-4


def test_a_training_on_packed_rows_gives_the_losses_of_one_with_a_mask(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = train_section(steps=3, batch_size=8, learning_rate=1e-2, checkpoint_every=0, device="cpu", packing=True)
    monkeypatch.setattr("graftline.train.batches._PACKED_TOKENS", 32)
    masked = train(lora_model(tiny_llama), make_rows(24), settings=settings, work=tmp_path / "mask")
    monkeypatch.setattr("graftline.train.trainer.can_run_here", lambda model: True)
    model, names = lora_model(tiny_llama), []

    def score(scored: PreTrainedModel) -> float:
        names.append(scored.config._attn_implementation)
        return 1.0

    watched = settings.replace(evaluate_every=2)
    told, shapes = [], []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].shape)))
    bounded = train(
        model,
        make_rows(24),
        settings=watched,
        work=tmp_path / "bounds",
        evaluate=score,
        on_step=lambda _: told.append(model.config._attn_implementation),
    )
    assert told == [attention.NAME] * 3
    assert set(names) == {"sdpa"}, "who scores may pad on the left"
    assert model.config._attn_implementation == "sdpa", "the model is given back as it came"
    assert bounded.losses == pytest.approx(masked.losses, rel=1e-5)
    in_steps = shapes[-3:]
    assert sum(num_sequences * length for num_sequences, length in in_steps) == bounded.tokens, "no padding"
    assert {num_sequences for num_sequences, _ in in_steps} == {1}


def test_rows_behind_a_shared_prefix_see_it_whole(tiny_llama: Path) -> None:
    model = _load(tiny_llama)
    assert use_row_attention(model)
    assert can_share_prefix(model)


def _parts(queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)


@pytest.mark.parametrize(("queries", "keys", "window"), [(9, 9, 4), (9, 9, 9), (3, 9, 4), (3, 9, None)])
def test_a_query_sees_its_window_of_the_keys_before_it_and_nothing_after(
    queries: int, keys: int, window: int | None
) -> None:
    query, key, value = _parts(queries, keys)
    back = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    mask = (back >= 0) & (back < (window or keys))
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, scale=0.3)
    found, _ = attend(nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_a_window_holds_inside_packed_rows() -> None:
    query, key, value = _parts(12, 12)
    bounds = torch.tensor([0, 5, 12, 20, 24], dtype=torch.int32)
    found, _ = attend(
        nn.Identity(), query, key, value, None, scaling=0.3, sliding_window=3, cu_seq_lens_q=bounds, max_length_q=8
    )
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    for start, end in ((0, 5), (5, 12), (12, 20), (20, 24)):
        alone = [part[start:end].transpose(0, 1)[None] for part in flat]
        expected, _ = attend(nn.Identity(), *alone, None, scaling=0.3, sliding_window=3)
        torch.testing.assert_close(found.flatten(0, 1)[start:end], expected[0])


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}])
def test_attention_that_is_another_one_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"without {next(iter(given))}"):
        attend(nn.Identity(), *_parts(3, 3), None, **given)


def test_a_model_whose_attention_differs_keeps_its_own(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(tiny_llama)
    monkeypatch.setattr(attention, "attend", lambda *given, **more: (attend(*given, **more)[0] * 1.1, None))
    assert not use_row_attention(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.undo()
    set_attention(model, "eager")
    assert not use_row_attention(model)
    assert model.config._attn_implementation == "eager"


def test_the_padded_batch_of_the_probes_is_the_same_too(tiny_llama: Path) -> None:
    own, ours, batch = _load(tiny_llama), _load(tiny_llama), pad_rows(make_rows(5))
    assert use_row_attention(ours)
    assert not can_run_here(ours), "a CPU has no such kernel"
    with torch.no_grad():
        assert torch.equal(hidden_states(ours, batch), hidden_states(own, batch))
