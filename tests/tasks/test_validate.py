"""The validate stage against the base: rows that the model cannot take stop the line before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from graftline.errors import DataError
from graftline.workflow import plan, resolve
from tasks import fetch, init, train, validate
from tests.line.project import write_yaml
from tests.tiny import make_tiny_llama
from tests.weights.families import edit_config
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


def make_project(root: Path, *, rows: list[dict[str, Any]] | None = None, **changes: dict[str, Any]) -> Opened:
    """A tiny project over ``root/base``, fetched."""
    (root / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows or make_rows(100)), encoding="utf-8"
    )
    pipeline = tiny_settings()
    pipeline["data"]["evaluation_rows"] = pipeline["gates"]["accuracy"]["min_items"] = 20
    pipeline["train"] |= {"steps": 2}
    for section, values in changes.items():
        pipeline[section] |= values
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    opened = open_pipeline(PIPELINE, root)
    resolve.run(*opened)
    fetch.run(*opened)
    return opened


def failed(opened: Opened) -> list[str]:
    report = json.loads((opened.at.folder("validate") / "report.json").read_text(encoding="utf-8"))
    return sorted({check["name"] for check in report["checks"] if not check["passed"] and check["severity"] == "error"})


def test_a_tokenizer_with_more_tokens_than_the_model_stops_the_line_and_shows_in_the_plan(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    size = len(AutoTokenizer.from_pretrained(base))
    make_tiny_llama(base, vocab_size=size - 1, eos_token_id=1, pad_token_id=0, bos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<end>")
    tokenizer.save_pretrained(base)
    opened = make_project(tmp_path)
    with pytest.raises(DataError, match=rf"has none for the tokens .*{size} \('<end>'\); resize the base"):
        validate.run(*opened)
    assert failed(opened) == ["every token is in the model"]
    assert "✗ every token is in the model" in plan.make(*opened).text()


def test_rows_longer_than_the_models_positions_stop_the_line(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base", max_position_embeddings=24)
    opened = make_project(tmp_path)
    with pytest.raises(DataError, match=r"positions.*the model has 24"):
        validate.run(*opened)
    assert failed(opened) == ["every row fits the model's positions"]


def test_free_answers_that_may_go_beyond_the_positions_stop_the_line(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base")
    answers = {"answers": {"max_new_tokens": 500}}
    with pytest.raises(DataError, match=r"with up to 500 new tokens, the model has 512"):
        validate.run(*make_project(tmp_path, evaluate=answers))


def test_a_configuration_that_reaches_further_lets_the_rows_through(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", max_position_embeddings=24)
    edit_config(base, max_position_embeddings=512)
    validate.run(*make_project(tmp_path))


def make_gpt2(folder: Path, *, num_positions: int = 256) -> None:
    """As GPT-2 is: positions are a table, and the tokenizer has one special token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [row["prompt"] for row in make_rows(50)],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=num_positions)
    GPT2LMHeadModel(config).save_pretrained(folder)


def test_a_base_with_a_single_special_token_is_validated_and_trained(tmp_path: Path) -> None:
    make_gpt2(tmp_path / "base")
    opened = make_project(tmp_path, base={"template": "none"})
    for stage in (validate, init, train):
        stage.run(*opened)
    assert (opened.at.folder("train") / "adapter" / "adapter_model.safetensors").is_file()


def test_a_table_of_positions_bounds_the_rows(tmp_path: Path) -> None:
    make_gpt2(tmp_path / "base", num_positions=8)
    with pytest.raises(DataError, match=r"the model has 8"):
        validate.run(*make_project(tmp_path, base={"template": "none"}))
