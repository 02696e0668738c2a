import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from graftline.data.rows import Message, Row
from graftline.errors import EvaluationError
from graftline.evaluate.evaluation import AnswerItem, answer_items, generate_answers

NEW_TOKENS = 6


def greedy(model: PreTrainedModel, prompt: tuple[int, ...], stop_ids: list[int]) -> list[int]:
    """The definition: one token at a time, no batch, no cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def items() -> list[AnswerItem]:
    generator = torch.Generator().manual_seed(0)
    prompts = [tuple(torch.randint(4, 300, (length,), generator=generator).tolist()) for length in (3, 17, 5, 11, 3)]
    return [AnswerItem(f"q{index}", prompt, ("x",)) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_answers_equal_unbatched_greedy_decoding(model, tokenizer, batch_tokens: int) -> None:
    # A token that some answers reach makes them end at different lengths.
    stop_ids = [greedy(model, items()[0].prompt_ids, [])[2]]
    scores = generate_answers(
        model, tokenizer, items(), stop_ids=stop_ids, max_new_tokens=NEW_TOKENS, batch_tokens=batch_tokens
    )
    assert [score.item_id for score in scores] == [item.item_id for item in items()]
    assert scores[0].stop
    for item, score in zip(items(), scores, strict=True):
        expected = greedy(model, item.prompt_ids, stop_ids)
        assert score.answer == tokenizer.decode(expected, skip_special_tokens=True)
        assert score.num_tokens == len(expected)
        assert score.stop == (len(expected) < NEW_TOKENS)


def test_an_answer_equal_to_its_reference_scores_one(model, tokenizer) -> None:
    item = items()[1]
    text = tokenizer.decode(greedy(model, item.prompt_ids, [2]), skip_special_tokens=True)
    right = AnswerItem("a", item.prompt_ids, ("something else", text))
    score = generate_answers(model, tokenizer, [right], stop_ids=[2], max_new_tokens=NEW_TOKENS)[0]
    assert (score.exact_match, score.f1, score.rouge_l) == (1.0, 1.0, 1.0)


def test_rows_become_prompts_with_their_last_answer_as_reference(tokenizer: PreTrainedTokenizerBase) -> None:
    row = Row((Message("user", "Hello", supervised=False), Message("assistant", "World", supervised=True)), 1)
    item = answer_items([row], tokenizer, template="chatml")[0]
    assert tokenizer.decode(item.prompt_ids).endswith("<|im_start|>assistant\n")
    assert item.references == ("World",)


@pytest.mark.parametrize(
    ("questions", "stop_ids", "message"),
    [
        ([], [2], "0 items"),
        (items()[:1], [], "0 stop tokens"),
        (items()[:1] * 2, [2], "twice"),
        ([AnswerItem("long", (5,) * 510, ("x",))], [2], "510 tokens and may get 6 more.*takes 512"),
    ],
)
def test_what_cannot_be_answered_is_refused(model, tokenizer, questions, stop_ids, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        generate_answers(model, tokenizer, questions, stop_ids=stop_ids, max_new_tokens=NEW_TOKENS)
