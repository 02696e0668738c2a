"""A pipeline is planned from its rows, or from a config.json alone."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, GraniteConfig, LlamaConfig, Qwen3Config

from graftline.data.sources.cache import Cache, Downloaded
from graftline.digest import of_file
from graftline.errors import ConfigError, DataError, SourceError
from graftline.plan.pipeline import PipelinePlan
from graftline.workflow import resolve
from graftline.workflow.plan import make
from graftline.workflow.workspace import Workspace
from studies.models import KNOWN as MODELS
from tasks import fetch
from tests.line.project import write_yaml
from tests.settings.documents import changed, read
from tests.tiny import tiny_llama_config
from tests.workflow.opened import Opened, open_pipeline
from tests.workflow.tiny_project import PIPELINE, make_rows, tiny_settings


def _open(folder: Path, **changes: object) -> Opened:
    return Opened(read(changed(**changes)).pipeline("demo"), Workspace(folder, "demo"))


def test_a_config_json_alone_says_what_is_covered_needed_and_served(tmp_path: Path) -> None:
    opened = _open(tmp_path, **{"demo.adapter.targets": ["q_proj", "v_proj"]})
    tiny_llama_config().save_pretrained(tmp_path)
    made = make(*opened, config_file=tmp_path / "config.json")
    assert made.training.memory.num_trained == 2 * 8 * ((64 + 64) + (64 + 32))
    assert made.training.fits
    for expected in ("q_proj", "rows are not fetched", "activations", "steps of about", "vllm: vllm serve"):
        assert expected in made.text()
    table = made.text().partition("peak of each stage")[2].splitlines()[1:]
    assert [line.split()[0] for line in table if " fits " in line][-2:] == ["merge", "package"]
    document = json.loads(json.dumps(made.document()))
    assert document["fetched"] is None
    assert {one["target"]: one["loads"] for one in document["targets"]} == dict.fromkeys(
        ("graftline", "vllm", "peft", "transformers"), True
    )


def test_a_training_in_several_processes_is_planned_for_each_and_the_other_stages_for_one(tmp_path: Path) -> None:
    tiny_llama_config().save_pretrained(tmp_path)
    several = {"demo.train.processes": 2, "demo.train.sharding": True}
    made = make(*_open(tmp_path, **several), config_file=tmp_path / "config.json")
    text, needed = made.text(), made.training.memory.total.expected / 1e9
    assert "divided over them: weights and quantization constants; each has the rest whole" in text
    table = text.partition("peak of each stage")[2].partition("what each stage takes")[0]
    rows = {line.split()[0]: line for line in table.splitlines()[1:] if line.strip()}
    assert "each of 2 processes" in rows["train"]
    assert rows["evaluate"].split()[2] == "fits"
    if not any(one.gpus for one in made.resources):  # then both take this machine's memory
        assert {one.stage: one.memory_gb for one in made.resources}["train"] == pytest.approx(2 * needed)


def test_what_our_server_cannot_serve_shows_in_the_plan(tmp_path: Path) -> None:
    GraniteConfig(**{**SIZES, "num_hidden_layers": 1}).save_pretrained(tmp_path)
    text = make(*_open(tmp_path), config_file=tmp_path / "config.json").text()
    assert "graftline: no: it does not compute GraniteForCausalLM (supported are LlamaForCausalLM, " in text


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
REFUSED = {
    "a family without a graph": ("graftline", GraniteConfig, {}, "compute GraniteForCausalLM .*served_by: vllm"),
    "a head size": ("graftline", LlamaConfig, {"base.head_dim": 24}, "heads of size 24"),
    "an adapted head": ("graftline", LlamaConfig, {"adapter.targets": ["q_proj", "lm_head"]}, "no adapter on lm_head"),
    "whole tensors": ("graftline", LlamaConfig, {"adapter.modules_to_save": ["lm_head"]}, "trained whole"),
    "a method of ours": ("vllm", LlamaConfig, {"adapter.method": "dora"}, r"vLLM has no DoRA.*package\.merged: true"),
    "a family without adapters": ("vllm", GPTNeoXConfig, {}, "takes no adapters on GPT-NeoX"),
    "codes of ours": ("vllm", LlamaConfig, {"quantize": {"method": "nf3"}}, "no code for nf3 weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_server_that_is_asked_for_and_cannot_serve_is_refused_before_anything_is_spent(
    case: str, tmp_path: Path
) -> None:
    server, config_class, given, message = REFUSED[case]
    of_base = {key.removeprefix("base."): value for key, value in given.items() if key.startswith("base.")}
    config_class(**SIZES, num_hidden_layers=1, **of_base).save_pretrained(tmp_path)
    changes = {f"demo.{key}": value for key, value in given.items() if not key.startswith("base.")}
    opened = _open(tmp_path, **{"demo.base.served_by": server} | changes)
    with pytest.raises(ConfigError, match=rf"base\.served_by: {server} was given; .*{message}"):
        make(*opened, config_file=tmp_path / "config.json")


@pytest.mark.parametrize("server", ["graftline", "vllm"])
def test_the_server_of_the_channel_counts_where_the_base_names_none(server: str, tmp_path: Path) -> None:
    LlamaConfig(**SIZES, num_hidden_layers=1).save_pretrained(tmp_path)
    changes = {"demo.adapter.modules_to_save": ["lm_head"], "channels.production.served_by": server}
    (tmp_path / "pipelines.yaml").write_bytes(changed(**changes))
    opened = _open(tmp_path, **changes)
    with pytest.raises(ConfigError, match=rf"channels\.production\.served_by: {server} was given; .*leave channels"):
        make(*opened, config_file=tmp_path / "config.json")


def test_a_family_with_a_graph_is_planned_for_our_server(tmp_path: Path) -> None:
    Qwen3Config(**SIZES, head_dim=16, num_hidden_layers=3, num_key_value_heads=1).save_pretrained(tmp_path)
    made = make(*_open(tmp_path, **{"demo.base.served_by": "graftline"}), config_file=tmp_path / "config.json")
    assert "graftline: graftline serve --base NAME=BASE" in made.text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["Llama 2 70B", *(pytest.param(name, marks=pytest.mark.long) for name in MODELS if name != "Llama 2 70B")]
)
def test_models_that_never_fit_here_are_planned_from_their_config(tmp_path: Path, model: str) -> None:
    MODELS[model].save_pretrained(tmp_path)
    opened = _open(tmp_path, **{"demo.train.batch_size": 1, "demo.data.max_tokens": 64})
    made = make(*opened, config_file=tmp_path / "config.json")
    billions = float(model.split()[-1].rstrip("B"))
    assert made.training.memory.num_parameters == pytest.approx(1e9 * billions, rel=0.05)
    assert made.training.fits or made.training.changes


def test_a_base_that_is_a_folder_here_is_planned_before_anything_is_fetched(tmp_path: Path) -> None:
    tiny_llama_config().save_pretrained(tmp_path / "base")
    made = make(*_open(tmp_path, **{"demo.base.source": "path:base"}))
    assert made.fetched is None
    assert made.training.memory.num_parameters > 0
    assert set(made.document()["stages"]) >= {"evaluate", "package"}


def test_before_anything_is_fetched_a_config_json_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run `graftline fetch demo`, or give the base's config\.json"):
        make(*_open(tmp_path))


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        make(*_open(tmp_path), config_file=tmp_path / "config.json")


def unfetched(folder: Path, base: Path, **data: Any) -> Opened:
    """A project whose base and rows are local; ``data`` changes the pipeline's section."""
    (folder / "base").symlink_to(base)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(80)), encoding="utf-8")
    pipeline = tiny_settings()
    pipeline["data"] |= {"evaluation_rows": 20} | data
    pipeline["gates"]["accuracy"]["min_items"] = 20
    pipeline["train"] |= {"held_out_rows": 5, "evaluate_every": 4}
    write_yaml(folder, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    return open_pipeline(PIPELINE, folder)


def counted(made: PipelinePlan) -> dict[str, Any]:
    """What follows from the rows."""
    document = made.document()
    return {"rows": document["fetched"], "memory": made.training.memory.document()}


def test_local_rows_are_planned_before_they_are_fetched_as_they_are_afterwards(
    tmp_path: Path, tiny_llama: Path
) -> None:
    opened = unfetched(tmp_path, tiny_llama)
    before = make(*opened)
    assert "rows are not fetched: they are read from their sources on this machine" in before.text()
    assert before.fetched is not None
    assert len(before.fetched.encoded) == 80 - 20 - 5
    assert {path.name for path in tmp_path.iterdir()} == {"base", "rows.jsonl", "pipelines.yaml"}  # nothing is written
    for part in (resolve, fetch):
        part.run(*opened)
    after = make(*opened)
    assert counted(after) == counted(before)
    assert before.document()["not_fetched"] is not None
    assert after.document()["not_fetched"] is None


def test_real_rows_take_less_than_the_longest_that_are_allowed(tmp_path: Path, tiny_llama: Path) -> None:
    opened = unfetched(tmp_path, tiny_llama, max_tokens=512)
    real = make(*opened).training.memory.total.expected
    tiny_llama_config().save_pretrained(tmp_path / "alone")  # without a tokenizer
    assumed = make(*opened, config_file=tmp_path / "alone" / "config.json")
    assert assumed.training.memory.total.expected > 1.5 * real
    assert assumed.fetched is None
    for told in ("the base's tokenizer is not on this machine", "each row is taken to have data.max_tokens tokens"):
        assert told in assumed.text()


def test_a_tokenizer_beside_the_given_config_encodes_the_rows(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "project").mkdir()
    opened = unfetched(tmp_path / "project", tiny_llama)
    (tmp_path / "project" / "base").unlink()
    shutil.copytree(tiny_llama, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("*.safetensors"))
    made = make(*opened, config_file=tmp_path / "elsewhere" / "config.json")
    assert made.fetched is not None


def test_rows_that_would_have_to_be_downloaded_are_assumed_and_named(tmp_path: Path, tiny_llama: Path) -> None:
    opened = unfetched(tmp_path, tiny_llama)
    for address in ("https://data.example.org/rows.jsonl", "s3://bucket/rows/*.parquet", "path:later.jsonl"):
        made = make(opened.pipeline.replace(data=opened.pipeline.data.replace(source=address)), opened.at)
        assert made.fetched is None
        assert f"{address} is not on this machine\neach row is taken to have data.max_tokens tokens" in made.text()


def test_rows_and_a_base_that_are_in_the_cache_are_at_hand(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(b"the base's archive").hexdigest()
    opened = unfetched(tmp_path, tiny_llama)
    rows = of_file(tmp_path / "rows.jsonl")

    def put(folder: Path) -> Downloaded:
        return Downloaded(Path(shutil.move(tmp_path / "rows.jsonl", folder / "rows.jsonl")), rows)

    Cache(tmp_path / "cache").put("moving", put, publish_as=lambda digest: f"{digest.hex}.jsonl")
    (tmp_path / "cache" / "bases").mkdir()
    (tmp_path / "cache" / "bases" / f"{sha256[:16]}-float32").symlink_to(tiny_llama)
    base = opened.pipeline.base.replace(source="pypi:a-base==1.0/base.gguf", sha256=sha256)
    data = opened.pipeline.data.replace(source="https://data.example.org/rows.jsonl", sha256=rows.hex)
    made = make(opened.pipeline.replace(base=base, data=data), opened.at)
    assert made.fetched is not None
    assert len(made.fetched.encoded) == 55


def test_local_rows_that_cannot_be_trained_on_are_refused_before_they_are_fetched(
    tmp_path: Path, tiny_llama: Path
) -> None:
    opened = unfetched(tmp_path, tiny_llama, max_tokens=8)
    with pytest.raises(DataError, match="max_tokens"):
        make(*opened)
    data = opened.pipeline.data.replace(sha256="0" * 64)
    with pytest.raises(SourceError, match=r"path:rows\.jsonl has digest sha256:\w+; expected sha256:000"):
        make(opened.pipeline.replace(data=data), opened.at)
