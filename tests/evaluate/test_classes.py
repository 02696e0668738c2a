"""A head's classes as scores: the same numbers as transformers', and gates that compare them with likelihoods."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from graftline.adapters.class_head import add_class_head
from graftline.data.rows import read_rows
from graftline.data.template import encode_prompt
from graftline.digest import write_text
from graftline.errors import EvaluationError
from graftline.evaluate.evaluation import EvaluationPlan, evaluate_model
from graftline.evaluate.gates import judge
from graftline.evaluate.metrics import summarize
from graftline.weights.model_folder import load_tokenizer
from graftline.weights.quant.linear import load_model
from tests.sections import evaluate_section, gate_section
from tests.tiny import make_tiny_llama
from tests.workflow.tiny_project import make_rows

LABELS = ("cat", "dog")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("classes") / "base")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_text(file, "".join(json.dumps(row) + "\n" for row in make_rows(60)))
    return EvaluationPlan(read_rows(file), "none", LABELS, (), evaluate_section(batch_tokens=300))


def test_classes_are_scored_as_transformers_scores_them(base: Path, plan: EvaluationPlan):
    model, tokenizer = load_model(base), load_tokenizer(base)
    head = add_class_head(model, LABELS, seed=3)
    scores = evaluate_model(model, tokenizer, plan)
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32).eval()
    theirs.score.weight.data.copy_(head.weight)
    for row, item in zip(plan.rows, scores.items, strict=True):
        ids = torch.tensor([encode_prompt(row, tokenizer, template="none")])
        with torch.no_grad():
            expected = theirs(ids).logits[0].log_softmax(-1).tolist()
        assert item.log_likelihoods == pytest.approx(expected, abs=1e-5)
        assert item.nll == pytest.approx(item.class_nll)
        assert (item.num_tokens, item.stop) == (1, None)
    found = summarize(scores)
    assert "option_stop_rate" not in found
    assert found["class_nll"] == pytest.approx(found["nll"])


def test_a_head_is_compared_with_likelihoods_of_labels(base: Path, plan: EvaluationPlan):
    model, tokenizer = load_model(base), load_tokenizer(base)
    before = evaluate_model(model, tokenizer, plan)
    assert all(item.stop is not None for item in before.items)
    add_class_head(model, LABELS, seed=3)
    after = evaluate_model(model, tokenizer, plan)
    rules = {
        name: gate_section(name, direction, "non-inferiority", margin=1.0, against="base", min_items=10)
        for name, direction in (("accuracy", "higher"), ("macro_f1", "higher"), ("class_nll", "lower"))
    }
    verdict = judge(rules, after, {"base": before})
    by_name = {gate.name: gate for gate in verdict.gates}
    assert [gate.candidate is not None for gate in verdict.gates] == [True] * 3
    mean = sum(math.log(sum(math.exp(v) for v in i.log_likelihoods)) - i.log_likelihoods[i.gold] for i in before.items)
    assert by_name["class_nll"].reference == pytest.approx(mean / len(before.items))
    assert by_name["macro_f1"].candidate == pytest.approx(summarize(after)["macro_f1"])


def test_a_head_for_other_classes_is_refused(base: Path, plan: EvaluationPlan):
    model = load_model(base)
    add_class_head(model, ("dog", "cat"))
    with pytest.raises(EvaluationError, match="has the classes dog, cat, the rows have cat, dog"):
        evaluate_model(model, load_tokenizer(base), plan)
