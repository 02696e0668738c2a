"""With the harness installed its own HF backend is the oracle; without it the refusal is what is left to test."""

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from graftline.errors import EvaluationError
from graftline.evaluate.items import _encode, harness_items
from graftline.evaluate.scoring import score_options

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="the extra graftline[harness] is not installed")
QUESTIONS = [
    {"question": "A small animal that lives in water", "choices": ["fish", "oak tree", "writer"], "answer": 0},
    {"question": "A tall plant with green leaves", "choices": ["dog", "tree", "a person who writes"], "answer": 1},
    {"question": "Who writes software?", "choices": ["the fox", "a programmer", "water"], "answer": 1},
]


def task(folder: Path, **changes: object) -> dict[str, object]:
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return {
        "task": "tiny_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    } | changes


@needs_harness
def test_items_score_as_in_the_harness_itself(tiny_llama: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    scores = score_options(model, harness_items([task(tmp_path)], tokenizer, max_items=None))
    oracle = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[task(tmp_path)], bootstrap_iters=0
    )
    samples = sorted(oracle["samples"]["tiny_questions"], key=lambda sample: sample["doc_id"])
    for score, sample in zip(scores, samples, strict=True):
        assert score.log_likelihoods == pytest.approx([pair[0] for pair in sample["filtered_resps"]], abs=1e-4)
        assert score.correct == bool(sample["acc"])
        assert score.gold == QUESTIONS[sample["doc_id"]]["answer"]


@pytest.mark.parametrize(
    ("single", "before"), [("$A <|im_end|>", []), ("<|im_start|> $A <|im_end|>", [1]), ("<|im_start|> $A", [1])]
)
def test_a_choice_follows_its_prompt_whatever_the_tokenizer_puts_around_a_text(
    tiny_llama: Path, single: str, before: list[int]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    prompt, choice = _encode("A plant is ", "green", tokenizer)
    assert list(prompt) == before + tokenizer("A plant is", add_special_tokens=False).input_ids
    assert tokenizer.decode(choice) == " green"


@needs_harness
def test_ids_are_stable_and_items_can_be_capped(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    items = harness_items([task(tmp_path)], tokenizer, max_items=None)
    assert harness_items([task(tmp_path)], tokenizer, max_items=2) == items[:2]
    assert all(item.item_id.startswith("tiny_questions-") for item in items)


@needs_harness
def test_tasks_that_cannot_be_scored_so_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    generation = task(tmp_path, output_type="generate_until", doc_to_choice=None, metric_list=[{"metric": "bleu"}])
    with pytest.raises(EvaluationError, match="type generate_until"):
        harness_items([generation], tokenizer, max_items=None)
    with pytest.raises(EvaluationError, match="cannot load no_such_task"):
        harness_items(["no_such_task"], tokenizer, max_items=None)


@pytest.mark.skipif(INSTALLED, reason="the extra graftline[harness] is installed")
def test_without_the_extra_the_command_that_installs_it_is_named(tiny_llama: Path) -> None:
    with pytest.raises(EvaluationError, match=r"pip install .*graftline\[harness\]"):
        harness_items(["hellaswag"], AutoTokenizer.from_pretrained(tiny_llama), max_items=None)
