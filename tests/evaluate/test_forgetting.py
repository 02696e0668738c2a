import copy
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from graftline.errors import EvaluationError
from graftline.evaluate.scores import DocumentScore
from graftline.evaluate.scoring import score_documents

TEXTS = ["The quick brown fox.", "ab cd", "A longer text about dogs and plants " * 12, "0123456789 user system"]


def by_transformers_loss(model: PreTrainedModel, ids: list[int]) -> float:
    """transformers' own loss is the mean NLL over all but the first token."""
    batch = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=batch, labels=batch).loss.item() * (len(ids) - 1)


@pytest.mark.parametrize("batch_tokens", [1, 300, 10_000])
def test_nll_equals_transformers_loss_of_each_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int
) -> None:
    scores = score_documents(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
    assert len({score.item_id for score in scores}) == len(TEXTS)
    for text, score in zip(TEXTS, scores, strict=True):
        ids = tokenizer(text).input_ids
        assert score.num_tokens == len(ids) - 1
        assert score.nll == pytest.approx(by_transformers_loss(model, ids), rel=1e-4)


def test_what_a_tokenizer_puts_behind_every_text_is_not_predicted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = score_documents(model, tokenizer, TEXTS)
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    assert score_documents(model, ending, TEXTS) == plain


def test_windows_predict_every_token_but_the_first_once(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = tokenizer(TEXTS[2]).input_ids
    expected = sum(by_transformers_loss(model, ids[start : start + 51]) for start in range(0, len(ids) - 1, 50))
    score = score_documents(model, tokenizer, [TEXTS[2]], window=50)[0]
    assert score.num_tokens == len(ids) - 1
    assert score.nll == pytest.approx(expected, rel=1e-4)


def test_other_windows_are_another_item(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = (score_documents(model, tokenizer, TEXTS[:1], window=window)[0] for window in (50, 60))
    assert first.item_id != second.item_id


def test_a_text_that_appears_again_is_scored_once(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    scores: list[DocumentScore] = score_documents(model, tokenizer, [TEXTS[0], TEXTS[2], TEXTS[0]])
    assert [score.item_id for score in scores] == [
        score.item_id for score in score_documents(model, tokenizer, [TEXTS[0], TEXTS[2]])
    ]


def test_documents_longer_than_the_model_takes_are_windowed(tiny_llama: Path, tokenizer) -> None:
    small = AutoModelForCausalLM.from_pretrained(tiny_llama, max_position_embeddings=32)
    score = score_documents(small, tokenizer, [TEXTS[2]])[0]
    assert score.num_tokens == len(tokenizer(TEXTS[2]).input_ids) - 1


@pytest.mark.parametrize(("texts", "message"), [([], "general text is empty"), (["", "ab cd"], "0 tokens")])
def test_text_that_predicts_nothing_is_refused(model, tokenizer, texts: list[str], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        score_documents(model, tokenizer, texts)


def test_progress_counts_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    seen: list[tuple[int, int]] = []
    score_documents(model, tokenizer, TEXTS, window=50, on_progress=lambda done, total: seen.append((done, total)))
    done, total = seen[-1]
    assert done == total > len(TEXTS)
