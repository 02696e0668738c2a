"""The validate stage against the base: rows that the model cannot take stop the line before anything is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from graftline.digest import of_file
from graftline.errors import ConfigError, DataError
from graftline.export.served_models import max_served_positions
from graftline.plan.base_limits import model_limits
from graftline.weights.model_folder import max_positions, read_config
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
    policy = {"reserve": True} if pipeline["data"].get("reserve_rows") else {}
    write_yaml(root, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": policy}})
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


def test_a_base_that_the_wanted_server_cannot_serve_stops_the_line(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base", head_dim=8)
    opened = make_project(tmp_path, base={"served_by": "graftline"})
    with pytest.raises(ConfigError, match=r"graftline serve cannot serve this: .*heads of size 8"):
        validate.run(*opened)
    assert not (opened.at.folder("validate") / "report.json").exists()


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


def test_an_option_needs_positions_for_the_token_that_ends_it(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base")
    pipeline, _ = make_project(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    longest = max(len(tokenizer(f" {label}").input_ids) for label in pipeline.data.labels or ())
    assert model_limits(pipeline, base, tokenizer).num_new_tokens == longest + 1


def test_a_configuration_that_reaches_further_lets_the_rows_through(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", max_position_embeddings=24)
    edit_config(base, max_position_embeddings=512)
    validate.run(*make_project(tmp_path))


def test_yarn_reaches_its_factor_times_the_original_positions(tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", max_position_embeddings=24)
    edit_config(base, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0})
    assert max_positions(read_config(base)) == max_served_positions(read_config(base)) == 96
    edit_config(base, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert max_positions(read_config(base)) == 24
    old = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16}
    edit_config(base, rope_parameters=None, rope_scaling=old)  # as older files write it
    assert max_positions(read_config(base)) == 256
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


def test_rows_that_only_promotions_look_at_are_split_off_with_their_clusters_and_checked(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "base")
    rows = [row | {"document": f"d{number // 2}"} for number, row in enumerate(make_rows(120))]
    opened = make_project(tmp_path, rows=rows, data={"reserve_rows": 20, "cluster": "document"})
    fetched = opened.at.folder("fetch")
    kept = fetched / "reserve" / "evaluation.jsonl"
    assert [len((fetched / name).read_bytes().splitlines()) for name in ("train.jsonl", "evaluation.jsonl")] == [80, 20]
    assert len(kept.read_bytes().splitlines()) == 20
    clusters = [json.loads((folder / "clusters.json").read_text()) for folder in (fetched, kept.parent)]
    assert [len(found) for found in clusters] == [20, 20]
    assert not clusters[0].keys() & clusters[1].keys()
    record = json.loads((fetched / "data.json").read_text())
    assert record["files"]["reserve/evaluation.jsonl"] == str(of_file(kept))

    first, rest = kept.read_text().split("\n", 1)
    row = json.loads(first)
    kept.write_text(json.dumps(row | {"completion": " bird"}) + "\n" + rest)
    with pytest.raises(DataError, match=r"\(rows kept back for promotions\)"):
        validate.run(*opened)
    assert all(name.endswith("(rows kept back for promotions)") for name in failed(opened))
