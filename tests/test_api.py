"""The public names: what ``import graftline`` offers to a Python script, and the README's first example."""

import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

import graftline
from graftline.adapters.attach import trainable_parameters
from graftline.errors import AdapterError, BaseMismatchError, CheckpointError, DataError, QuantizeError, TrainError
from tests.sections import train_section
from tests.tiny import make_tiny_llama

ROOT = Path(__file__).resolve().parents[1]
LABELS = ["animal", "plant"]


def run(code: str, folder: Path) -> str:
    """What a fresh process prints, in a folder that is not the checkout."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_rows(path: Path, labels: list[str], count: int) -> None:
    # Digests: no prompt is a near duplicate of another, which would have to stay on the same side of a split.
    prompts = (hashlib.sha256(str(at).encode()).hexdigest()[:24] for at in range(count))
    rows = [
        {
            "prompt": " ".join(prompt[start : start + 4] for start in range(0, 24, 4)),
            "completion": labels[at % len(labels)],
        }
        for at, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "base")


@pytest.fixture
def rows(tmp_path: Path) -> list:
    write_rows(tmp_path / "rows.jsonl", LABELS, 24)
    return graftline.read_rows(tmp_path / "rows.jsonl")


def test_every_public_name_is_there_and_typed_where_it_is_defined() -> None:
    tree = ast.parse(Path(graftline.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {}
    for line in block.body:
        assert isinstance(line, ast.ImportFrom)
        typed |= {alias.asname or alias.name: (line.module, alias.name) for alias in line.names}
    assert sorted(typed) == sorted(graftline.__all__)
    for name, (module, there) in typed.items():
        assert getattr(graftline, name) is getattr(sys.modules[str(module)], there), name
    assert set(graftline.__all__) <= set(dir(graftline))


def test_importing_the_package_and_reading_settings_and_rows_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    code = (
        "import sys, graftline\n"
        "assert 'graftline.settings' not in sys.modules\n"
        "from graftline import Adapter, load_settings\n"
        "graftline.read_rows('rows.jsonl'), graftline.judge, dir(graftline)\n"
        "print(sorted({'torch', 'transformers', 'prefect', 'dvc', 'boto3'} & set(sys.modules)))"
    )
    assert run(code, tmp_path) == "[]\n"


def test_an_unknown_name_is_an_attribute_error_and_packages_stay_reachable() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tarin_adapter'"):
        graftline.tarin_adapter  # noqa: B018
    code = "import graftline.api, graftline; print(type(graftline.train).__name__, callable(graftline.train_adapter))"
    assert run(code, ROOT) == "module True\n"


def run_example(page: str, number: int, folder: Path) -> list[str]:
    """Run a page's Python example beside a tiny base and rows, where Prefect, DVC and boto3 cannot be imported."""
    code = examples(page)[number]
    labels = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.keyword) and node.arg == "labels"]
    make_tiny_llama(folder / "base")
    write_rows(folder / "rows.jsonl", ast.literal_eval(labels[0].value) if labels else LABELS, 340)
    absent = "import sys; sys.modules.update(dict.fromkeys(['prefect', 'dvc', 'boto3', 'botocore']))"
    return run(f"{absent}\n{code}", folder).splitlines()


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)


def test_the_readmes_first_example_is_ten_lines_and_runs(tmp_path: Path) -> None:
    code = examples("README.md")[0]
    assert len(list(filter(None, code.splitlines()))) <= 10
    assert re.findall(r"import \w+", code) == ["import graftline"]
    printed = run_example("README.md", 0, tmp_path)
    assert re.fullmatch(r"accuracy [\d.]+ against [\d.]+ \(base\): [+−].*", printed[-1])
    graftline.load_adapter(graftline.open_model(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.slow
def test_the_api_pages_example_plans_trains_and_merges(tmp_path: Path) -> None:
    printed = run_example("docs/api.md", 0, tmp_path)
    assert re.fullmatch(r"step \d+ of \d+ is kept", printed[-1])
    assert any("fits" in line for line in printed)
    graftline.open_model(tmp_path / "merged")
    assert list((tmp_path / "checkpoints").iterdir())


def test_an_adapter_that_is_saved_loaded_and_merged_scores_the_same(base: Path, rows: list, tmp_path: Path) -> None:
    training, held_out = rows[:16], rows[16:]
    model = graftline.open_model(str(base))
    coverage = graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
    settings = train_section(steps=6, batch_size=8, learning_rate=1e-2)
    result = graftline.train_adapter(model, training, settings)
    assert coverage.num_trained == sum(p.numel() for p in trainable_parameters(model.network).values())
    assert result.losses[-1] < result.losses[0]
    scores = graftline.evaluate_model(model, held_out, labels=LABELS)
    graftline.save_adapter(model, str(tmp_path / "adapter"))

    loaded = graftline.open_model(base)
    before = graftline.evaluate_model(loaded, held_out, labels=LABELS)
    graftline.load_adapter(loaded, str(tmp_path / "adapter"))
    again = graftline.evaluate_model(loaded, held_out, labels=LABELS)
    assert again == scores
    assert [item.nll for item in before.items] != [item.nll for item in scores.items]

    graftline.merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype="float32")
    merged = graftline.evaluate_model(graftline.open_model(tmp_path / "merged"), held_out, labels=LABELS)
    assert [item.nll for item in merged.items] == pytest.approx([item.nll for item in scores.items], abs=1e-4)
    export = graftline.export_adapter(base, tmp_path / "adapter", tmp_path / "exported", target="peft")
    assert export.loads
    assert (tmp_path / "exported" / "adapter_config.json").is_file()


def test_an_adapter_with_a_head_chooses_labels(base: Path, rows: list, tmp_path: Path) -> None:
    model = graftline.open_model(base)
    settings = train_section(steps=3, batch_size=8, learning_rate=1e-2, objective={"kind": "classify"})
    graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4), labels=LABELS)
    graftline.train_adapter(model, rows[:16], settings)
    scores = graftline.evaluate_model(model, rows[16:], labels=LABELS)
    assert all(sum(torch.tensor(item.log_likelihoods).exp()) == pytest.approx(1) for item in scores.items)
    graftline.save_adapter(model, tmp_path / "adapter")
    loaded = graftline.open_model(base)
    graftline.load_adapter(loaded, tmp_path / "adapter")
    assert graftline.evaluate_model(loaded, rows[16:], labels=LABELS) == scores

    other = graftline.open_model(base)
    graftline.attach_adapter(other, graftline.Adapter(method="lora", rank=4))
    with pytest.raises(TrainError, match=r"attach_adapter\(\.\.\., labels=\.\.\.\)"):
        graftline.train_adapter(other, rows[:16], settings)


def test_a_gate_judges_two_scores_of_the_same_rows(base: Path, rows: list) -> None:
    model = graftline.open_model(base)
    before = graftline.evaluate_model(model, rows)
    graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
    graftline.train_adapter(model, rows, train_section(steps=30, batch_size=8, learning_rate=1e-2))
    after = graftline.evaluate_model(model, rows)
    gate = graftline.Gate(
        metric="nll", direction="lower", test="superiority", margin=0.1, against="base", min_items=len(rows)
    )
    assert graftline.judge({"better": gate}, after, {"base": before}).outcome == "pass"
    assert graftline.judge({"better": gate}, before, {"base": after}).outcome == "fail"


@pytest.mark.parametrize("method", ["nf4", "nf2"])
def test_a_quantized_base_is_trained_and_its_adapter_is_refused_on_the_dense_one(
    method: str, base: Path, rows: list, tmp_path: Path
) -> None:
    report = graftline.quantize_model(str(base), str(tmp_path / "small"), graftline.Quantize(method=method))
    assert report.bits_per_weight < 5
    model = graftline.open_model(tmp_path / "small")
    graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
    graftline.train_adapter(model, rows, train_section(steps=1))
    graftline.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="was trained on the base"):
        graftline.load_adapter(graftline.open_model(base), tmp_path / "adapter")


def test_a_base_that_was_quantized_with_an_adapter_wants_that_adapter(base: Path, rows: list, tmp_path: Path) -> None:
    adapter, quantize = graftline.Adapter(method="loftq", rank=4), graftline.Quantize(method="nf2", init="loftq")
    with pytest.raises(QuantizeError):
        graftline.quantize_model(base, tmp_path / "nothing", quantize)
    graftline.quantize_model(base, tmp_path / "small", quantize, adapter=adapter)
    model = graftline.open_model(tmp_path / "small")
    with pytest.raises(BaseMismatchError, match="no adapter"):
        graftline.evaluate_model(model, rows)
    graftline.attach_adapter(model, adapter)
    graftline.evaluate_model(model, rows)
    graftline.save_adapter(model, tmp_path / "adapter")
    again = graftline.open_model(tmp_path / "small")
    graftline.load_adapter(again, tmp_path / "adapter")
    assert graftline.evaluate_model(again, rows) == graftline.evaluate_model(model, rows)


def test_a_training_with_a_work_folder_continues_and_one_without_writes_nothing(
    base: Path, rows: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = train_section(steps=4, batch_size=8, checkpoint_every=2)

    def train(work: Path | None) -> bytes:
        model = graftline.open_model(base)
        graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
        graftline.train_adapter(model, rows, settings, work=work)
        graftline.save_adapter(model, tmp_path / "adapter")
        return (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()

    plain = train(None)
    assert list(Path().iterdir()) == []
    assert train(tmp_path / "work") == plain
    assert (tmp_path / "work").is_dir()
    assert train(tmp_path / "work") == plain


def test_held_out_rows_choose_the_best_step(base: Path, rows: list) -> None:
    model = graftline.open_model(base)
    graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
    settings = train_section(steps=4, batch_size=8, evaluate_every=2)
    result = graftline.train_adapter(model, rows[:16], settings, held_out=rows[16:])
    assert [step for step, _ in result.scores] == [2, 4]


def test_a_plan_and_encoded_rows_need_no_weights(base: Path, rows: list) -> None:
    (base / "model.safetensors").unlink()
    model = graftline.open_model(base)
    encoded = graftline.encode_rows(model, rows)
    assert all(0 < row.num_supervised < len(row.input_ids) for row in encoded)
    plan = graftline.plan_training(
        model,
        rows,
        adapter=graftline.Adapter(method="lora"),
        train=train_section(steps=4, batch_size=8),
        quantize=graftline.Quantize(method="nf4"),
    )
    assert plan.num_steps == 4
    assert plan.num_rows == len(rows)


def test_rows_longer_than_the_context_are_an_error_unless_they_are_to_be_cut(base: Path, tmp_path: Path) -> None:
    row = {"prompt": "a " * 2000, "completion": "b"}
    (tmp_path / "long.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows, model = graftline.read_rows(str(tmp_path / "long.jsonl")), graftline.open_model(base)
    with pytest.raises(DataError, match="more than 512 tokens"):
        graftline.encode_rows(model, rows)
    (cut,) = graftline.encode_rows(model, rows, max_tokens=64, overlength="truncate")
    assert len(cut.input_ids) == 64


@pytest.mark.parametrize("adapter", [{"method": "full"}, {"method": "lora", "bias": "all"}], ids=["full", "biases"])
def test_weights_of_the_base_are_trained_in_fp32_only(adapter: dict, base: Path) -> None:
    model = graftline.open_model(base, precision="bf16")
    with pytest.raises(AdapterError, match="precision='fp32'"):
        graftline.attach_adapter(model, graftline.Adapter(**adapter))


def test_a_model_in_bf16_is_trained_and_scored_in_bf16(base: Path, rows: list) -> None:
    model = graftline.open_model(base, precision="bf16")
    graftline.attach_adapter(model, graftline.Adapter(method="lora", rank=4))
    with pytest.raises(TrainError, match="the model is held in bf16"):
        graftline.train_adapter(model, rows, train_section(steps=1, precision="fp32"))
    graftline.train_adapter(model, rows, train_section(steps=1, precision="bf16"))
    assert {p.dtype for p in trainable_parameters(model.network).values()} == {torch.float32}
    assert len(graftline.evaluate_model(model, rows, labels=LABELS).items) == len(rows)


def test_sections_take_lists_as_python_code_writes_them_and_check_their_items() -> None:
    listed = graftline.Adapter(method="lora", targets=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    assert listed == graftline.Adapter(method="lora", targets=("q_proj", "v_proj"), modules_to_save=("lm_head",))
    assert graftline.Train(steps=1, batch_size=1, learning_rate=1e-4, report_to=["dvclive"]).report_to == ("dvclive",)
    for wrong in ([], [1], ["q_proj", None]):
        with pytest.raises(ValidationError):
            graftline.Adapter(method="lora", targets=wrong)


def test_what_is_wrong_is_said_at_once(base: Path, tmp_path: Path, rows: list) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        graftline.open_model(tmp_path / "nowhere")
    with pytest.raises(DataError, match="chat-ml"):
        graftline.open_model(base, template="chat-ml")
    with pytest.raises(AdapterError, match="has no adapter"):
        graftline.save_adapter(graftline.open_model(base), tmp_path / "adapter")
    with pytest.raises(DataError, match="evaluation_rows is 24, but there are 24 rows"):
        graftline.split_rows(rows, 24)
