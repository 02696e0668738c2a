import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.errors import EvaluationError
from graftline.evaluate.option_tree import OptionItem
from graftline.evaluate.scoring import score_options
from graftline.weights import head

EOS = 2


def one_by_one(model: PreTrainedModel, item: OptionItem) -> list[float]:
    """The definition: one sequence, no batch, no cache, no tree."""
    sums = []
    for option in item.option_ids:
        ids = torch.tensor([[*item.prompt_ids, *option]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = len(item.prompt_ids)
        sums.append(sum(log_probs[start + i - 1, token].item() for i, token in enumerate(option)))
    return sums


def random_items(count: int, *, shared: int, seed: int = 0) -> list[OptionItem]:
    """Prompts of 1 to 40 tokens behind ``shared`` common ones; options of 1 to 5 tokens, some a prefix of others."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(4, 500, (length,), generator=generator).tolist())

    prefix = ids(shared)
    items = []
    for index in range(count):
        stem = ids(2)
        options = (stem, (*stem, 7), (*stem, 7, 9), (5,), ids(5), (stem[0], 11))
        length = 1 + int(torch.randint(0, 40, (1,), generator=generator))
        items.append(OptionItem(f"i{index}", prefix + ids(length), options, index % 6))
    return items


@pytest.mark.parametrize("shared", [0, 1, 30])
@pytest.mark.parametrize("batch_tokens", [1, 200, 100_000])
def test_scores_equal_those_of_one_option_at_a_time(model: PreTrainedModel, shared: int, batch_tokens: int) -> None:
    items = random_items(13, shared=shared)
    scores = score_options(model, items, stop_ids=[EOS], batch_tokens=batch_tokens)
    assert [score.item_id for score in scores] == [item.item_id for item in items]
    for item, score in zip(items, scores, strict=True):
        expected = one_by_one(model, item)
        assert score.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert score.chosen == expected.index(max(expected))
        assert score.nll == -score.log_likelihoods[item.gold]
        assert score.num_tokens == len(item.option_ids[item.gold])


def test_prompts_that_are_all_equal_leave_one_token_behind_the_prefix(model: PreTrainedModel) -> None:
    items = [OptionItem(str(i), (9, 8, 7), ((i + 10,), (5, 6)), 0) for i in range(3)]
    for item, score in zip(items, score_options(model, items), strict=True):
        assert score.log_likelihoods == pytest.approx(one_by_one(model, item), abs=1e-4)


def test_stop_says_whether_an_end_token_wins_after_the_gold_option(model: PreTrainedModel) -> None:
    item = random_items(1, shared=0)[0]
    ids = torch.tensor([[*item.prompt_ids, *item.option_ids[item.gold]]])
    with torch.no_grad():
        winner = int(model(input_ids=ids).logits[0, -1].argmax())
    assert score_options(model, [item], stop_ids=[winner])[0].stop is True
    assert score_options(model, [item], stop_ids=[winner + 1])[0].stop is False
    assert score_options(model, [item])[0].stop is None


def test_stop_looks_behind_the_text_where_options_are_scored_with_their_end(model: PreTrainedModel) -> None:
    bare = random_items(1, shared=0)[0]
    ended = replace(bare, option_ids=tuple((*option, EOS) for option in bare.option_ids), ended=True)
    score = score_options(model, [ended], stop_ids=[EOS])[0]
    assert score.log_likelihoods == pytest.approx(one_by_one(model, ended), abs=1e-4)
    ids = torch.tensor([[*bare.prompt_ids, *bare.option_ids[bare.gold]]])
    with torch.no_grad():
        winner = int(model(input_ids=ids).logits[0, -1].argmax())
    assert score_options(model, [ended], stop_ids=[winner])[0].stop is True
    assert score_options(model, [ended], stop_ids=[winner + 1])[0].stop is False


def test_the_models_mode_comes_back_and_no_gradient_is_kept(model: PreTrainedModel) -> None:
    model.train()
    score_options(model, random_items(2, shared=3))
    assert model.training
    model.eval()
    score_options(model, random_items(2, shared=3))
    assert not model.training


def test_single_token_options_cost_no_column_beyond_the_prompt(model: PreTrainedModel) -> None:
    columns: list[int] = []
    hook = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    score_options(model, [OptionItem("a", (4, 5, 6), ((7,), (8,), (9,)), 0)])
    hook.remove()
    assert sum(columns) == 3


def test_progress_counts_items_up_to_the_total(model: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    score_options(
        model, random_items(5, shared=0), batch_tokens=60, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen[0] == (0, 5)
    assert seen[-1] == (5, 5)
    assert len(seen) > 2


@pytest.mark.parametrize("bound", [30, 3], ids=["several items", "less than one item"])
def test_no_more_logits_exist_than_the_bound(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, bound: int
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * bound * model.config.vocab_size)
    kept: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: kept.append(out.shape[0] * out.shape[1]))
    items = random_items(9, shared=5)
    scores = score_options(model, items, batch_tokens=100_000)
    hook.remove()
    assert max(kept) <= bound
    assert len(kept) > 3
    assert scores[3].log_likelihoods == pytest.approx(one_by_one(model, items[3]), abs=1e-4)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "empty"),
        ([OptionItem("a", (4,), ((5,),), 0)] * 2, "twice"),
        ([OptionItem("a", (4,) * 600, ((5,),), 0)], "601 tokens.*takes 512"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused(model: PreTrainedModel, items: list[OptionItem], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_options(model, items)


def test_a_model_that_gives_nan_is_refused_by_item(tiny_llama: Path) -> None:
    broken = AutoModelForCausalLM.from_pretrained(tiny_llama)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(EvaluationError, match=r"item i0 .*not finite"):
        score_options(broken, random_items(1, shared=0))


@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="torch's attention in bf16 looks at the processor, not at this variable: pack_vnni2 is not there then",
)
def test_half_precision_models_are_scored_close_to_fp32(tiny_llama: Path, model: PreTrainedModel) -> None:
    half = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    items = random_items(12, shared=5)
    for exact, close in zip(score_options(model, items), score_options(half, items), strict=True):
        longest = max(map(len, items[0].option_ids))
        assert close.log_likelihoods == pytest.approx(exact.log_likelihoods, abs=0.005 * longest)
        assert (close.chosen, close.stop) == (exact.chosen, exact.stop)
