"""When a pull request's adapter and scores are the base revision's: what counts, and what does not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from graftline.digest import of_json, write_json
from graftline.evaluate.scores import ItemScore, Scores, write_scores
from graftline.evaluate.verdict import ScoredInputs
from graftline.workflow.pull_request import _made as made

ITEM = ItemScore("a", (-1.0, -2.5), 0, 0, True, 1.0, 1, True)


def tree(folder: Path, *, run: str, weights: bytes = b"weights", base: str = "base", item: ItemScore = ITEM) -> Path:
    adapter = folder / "runs" / "demo" / "train" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    write_json(adapter / "graftline.json", {"format": 1, "base_digest": base, "training_run": run})
    digests = {name: of_json(name) for name in ("base", "base_files", "tokenizer", "rows", "texts")}
    scored = ScoredInputs(**digests, adapter=of_json([run, weights.hex(), base]))
    scores = Scores(template=of_json("chatml"), labels=("animal", "plant"), items=(item,), scored=scored)
    write_scores(folder / "runs" / "demo" / "evaluate" / "scores" / "candidate.jsonl", scores)
    return folder


def test_the_same_weights_and_scores_of_another_training_run_are_equal(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "1", run="demo/train-1"), tree(tmp_path / "2", run="demo/train-2")
    assert made(first, "demo") == made(second, "demo")
    identity = json.loads((second / "runs/demo/train/adapter/graftline.json").read_text(encoding="utf-8"))
    assert identity["training_run"] == "demo/train-2"


@pytest.mark.parametrize(
    "other", [{"weights": b"others"}, {"base": "other"}, {"item": replace(ITEM, chosen=1, correct=False)}]
)
def test_another_weight_another_base_or_another_answer_is_not_equal(tmp_path: Path, other: dict[str, object]) -> None:
    first = tree(tmp_path / "1", run="demo/train-1")
    assert made(first, "demo") != made(tree(tmp_path / "2", run="demo/train-1", **other), "demo")  # type: ignore[arg-type]
