"""The exported graph is the model: same logits, same greedy tokens, whatever the batch; and what cannot be exported."""

import concurrent.futures
import dataclasses
import json
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from graftline.errors import ExportError, NumberTypeError
from graftline.export.onnx_export import (
    BOUNDS,
    Agreement,
    agreement,
    cached_graph,
    export_graph,
    layout_of,
    logit_difference,
    write_graph,
)
from graftline.export.onnx_session import GraphLayout, GraphSession, Precision, Step
from graftline.export.served_models import max_served_positions
from graftline.serve import smoke
from graftline.weights.quant.folder import DequantizingReader
from tests.tiny import make_tiny_llama, tiny_llama_config
from tests.weights.families import edit_config

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14], [15, 16, 17, 18]]


def transformers_logits(base: Path, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(base).eval()(torch.tensor([tokens])).logits[0].numpy()


def test_logits_of_a_ragged_batch_equal_transformers_row_by_row(base: Path, graph: Path) -> None:
    session = GraphSession(graph)
    step = Step(PROMPTS, [len(prompt) for prompt in PROMPTS], every_position=True)
    logits_BTV = session.runner().step(session.new_cache(len(PROMPTS), 16), step)
    for row, prompt in enumerate(PROMPTS):
        expected_TV = transformers_logits(base, prompt)
        np.testing.assert_allclose(logits_BTV[row, : len(prompt)], expected_TV, atol=1e-5)


def test_greedy_decoding_of_a_batch_equals_transformers_generate(base: Path, graph: Path) -> None:
    session = GraphSession(graph)
    runner, cache = session.runner(), session.new_cache(len(PROMPTS), 32)
    lengths = [len(prompt) for prompt in PROMPTS]
    answers: list[list[int]] = [[] for _ in PROMPTS]
    tokens = runner.step(cache, Step(PROMPTS, lengths)).argmax(-1).tolist()
    for _ in range(12):
        for answer, token in zip(answers, tokens, strict=True):
            answer.append(token)
        lengths = [length + 1 for length in lengths]
        tokens = runner.step(cache, Step([[token] for token in tokens], lengths)).argmax(-1).tolist()
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert generated[0, len(prompt) :].tolist() == answer


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole(base: Path, graph: Path) -> None:
    prompt = list(range(20, 57))
    session = GraphSession(graph)
    runner, cache = session.runner(), session.new_cache(1, 64)
    for start in range(0, len(prompt), 10):
        piece = prompt[start : start + 10]
        logits_BV = runner.step(cache, Step([piece], [start + len(piece)]))
    np.testing.assert_allclose(logits_BV[0], transformers_logits(base, prompt)[-1], atol=1e-5)


def test_a_step_on_some_rows_leaves_the_others_alone(base: Path, graph: Path) -> None:
    session = GraphSession(graph)
    runner, cache = session.runner(), session.new_cache(3, 16)
    runner.step(cache.rows(1, 2), Step([[5, 6, 7]], [3]))
    before = [tensor[1].clone() for tensor in cache.tensors]
    runner.step(cache.rows(0, 1), Step([[8, 9]], [2]))
    runner.step(cache.rows(2, 3), Step([[10]], [1]))
    assert all(torch.equal(a, b[1]) for a, b in zip(before, cache.tensors, strict=True))
    cache.copy_row(1, 0, 3)
    logits_BV = runner.step(cache.rows(0, 1), Step([[11]], [4]))
    np.testing.assert_allclose(logits_BV[0], transformers_logits(base, [5, 6, 7, 11])[-1], atol=1e-5)


def test_a_sequence_longer_than_the_cache_is_refused(graph: Path) -> None:
    session = GraphSession(graph)
    with pytest.raises(ValueError, match="5 tokens does not fit a cache of 4"):
        session.runner().step(session.new_cache(1, 4), Step([[1, 2, 3, 4, 5]], [5]))


def test_the_graph_is_valid_onnx_and_small_without_its_weights(graph: Path) -> None:
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    assert (graph / "model.onnx").stat().st_size < 200_000
    assert {entry.domain for entry in model.opset_import} == {"", "com.microsoft"}
    names = [node.name for node in model.graph.node]
    assert len(names) == len(set(names))


def test_the_same_base_gives_the_same_bytes(base: Path, graph: Path, tmp_path: Path) -> None:
    export_graph(base, tmp_path / "again")
    for name in ("model.onnx", "model.onnx.data", "graph.json"):
        assert (tmp_path / "again" / name).read_bytes() == (graph / name).read_bytes(), name


def test_the_layout_is_read_back_as_it_was_written(graph: Path, tmp_path: Path) -> None:
    layout = GraphLayout.read(graph)
    layout.write(tmp_path)
    assert GraphLayout.read(tmp_path) == layout
    assert len(layout.past_names()) == len(layout.present_names()) == 2 * layout.num_layers


def test_the_cache_size_is_what_the_layout_says(graph: Path) -> None:
    session = GraphSession(graph)
    cache = session.new_cache(3, 10)
    assert sum(t.numel() * t.element_size() for t in cache.tensors) == 30 * session.layout.kv_bytes_per_token


def test_a_base_is_exported_once_and_found_again(tiny_llama: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    first = cached_graph(tiny_llama, tmp_path, on_progress=lambda done, total: calls.append(done))
    assert calls == [1, 2]
    assert cached_graph(tiny_llama, tmp_path, on_progress=lambda done, total: calls.append(done)) == first
    assert calls == [1, 2]
    other = make_tiny_llama(tmp_path / "other", seed=1)
    assert cached_graph(other, tmp_path) != first


def change_config(base: Path, **changes: object) -> Path:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return base


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "changes", [{"rope_parameters": YARN}, {"rms_norm_eps": 0.1}, {"max_position_embeddings": 64}], ids=str
)
def test_a_base_whose_configuration_changes_gets_another_graph(
    changes: dict[str, object], tiny_llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    before = cached_graph(base, tmp_path / "graphs")
    after = cached_graph(change_config(base, **changes), tmp_path / "graphs")
    assert after != before
    session, prompt = GraphSession(after), list(range(5, 45))
    found_BV = session.runner().step(session.new_cache(1, 64), Step([prompt], [len(prompt)]))
    np.testing.assert_allclose(found_BV[0], transformers_logits(base, prompt)[-1], atol=1e-4)


def test_who_wrote_a_configuration_makes_no_other_graph(tiny_llama: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    before = cached_graph(base, tmp_path / "graphs")
    assert cached_graph(change_config(base, transformers_version="1.0"), tmp_path / "graphs") == before


@pytest.mark.parametrize("size", [8, 20, 24, 40, 100])
def test_heads_of_a_size_that_attention_does_not_take_are_refused(size: int, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", num_hidden_layers=1, head_dim=size)
    with pytest.raises(ExportError, match=rf"heads of size {size} .* multiples of 16\); serve this base with vLLM"):
        cached_graph(base, tmp_path / "graphs")
    assert not list((tmp_path / "graphs").glob("*/"))


@pytest.mark.parametrize("size", [16, 48, 80])
def test_heads_of_other_sizes_are_transformers(size: int, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", num_hidden_layers=1, head_dim=size)
    export_graph(base, tmp_path / "graph")  # compares logits


def test_two_that_need_a_graph_at_once_export_it_once(tiny_llama: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def get(_: int) -> Path:
        return cached_graph(tiny_llama, tmp_path / "cache", on_progress=lambda done, total: calls.append(done))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(get, range(3)))
    assert len(folders) == 1
    assert calls == [1, 2]


def test_scaled_rotary_positions_equal_transformers(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    base = make_tiny_llama(tmp_path / "llama3", rope_parameters=rope)
    export_graph(base, tmp_path / "graph")
    session, prompt = GraphSession(tmp_path / "graph"), list(range(100))
    logits_BV = session.runner().step(session.new_cache(1, 128), Step([prompt], [len(prompt)]))
    np.testing.assert_allclose(logits_BV[0], transformers_logits(base, prompt)[-1], atol=1e-5)


def test_frequencies_that_change_with_the_length_end_the_graph_before_they_change() -> None:
    rope = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_type": "longrope", "rope_theta": 1e4}
    long = tiny_llama_config(rope_parameters=rope | {"original_max_position_embeddings": 128, "factor": 4.0})
    assert max_served_positions(long) == 128
    dynamic = tiny_llama_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert max_served_positions(dynamic) == 512


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "swish"])
def test_other_activations_are_transformers(activation: str, tiny_llama: Path, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", num_hidden_layers=1, hidden_act=activation)
    export_graph(base, tmp_path / "graph")  # which compares logits


def test_int4_logits_are_those_of_the_rounded_weights(base: Path, tmp_path: Path) -> None:
    export_graph(base, tmp_path / "int4", precision="int4")
    exact, found = transformers_logits(base, PROMPTS[0]), None
    session = GraphSession(tmp_path / "int4")
    found = session.runner().step(session.new_cache(1, 16), Step(PROMPTS[:1], [7], every_position=True))[0]
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.15  # NF4 would give about 0.09 a layer
    assert (tmp_path / "int4" / "model.onnx.data").stat().st_size < 0.75 * (base / "model.safetensors").stat().st_size


def test_fp16_logits_are_near(base: Path, tmp_path: Path) -> None:
    export_graph(base, tmp_path / "fp16", precision="fp16")
    session = GraphSession(tmp_path / "fp16")
    found = session.runner().step(session.new_cache(1, 16), Step(PROMPTS[:1], [7], every_position=True))[0]
    np.testing.assert_allclose(found, transformers_logits(base, PROMPTS[0]), atol=0.02)


def in_fp32(folder: Path) -> GraphSession:
    """A bf16 graph with the same numbers in fp32, which a CPU can compute."""
    model = onnx.load(folder / "model.onnx")
    bfloat16, float32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    for tensor in [one for one in model.graph.initializer if one.data_type == bfloat16]:
        array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == bfloat16:
            value.type.tensor_type.elem_type = float32
    (folder / "model.onnx.data").unlink()
    onnx.save(model, folder / "model.onnx")
    dataclasses.replace(GraphLayout.read(folder), precision="fp32").write(folder)
    return GraphSession(folder)


def test_a_bf16_graph_holds_the_model_in_bf16(base: Path, tmp_path: Path) -> None:
    reader = DequantizingReader(base)
    layout = layout_of(reader.config, base, "bf16")
    write_graph(reader, layout, tmp_path)
    stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    types = {one.type.tensor_type.elem_type for one in stored.input if one.name.startswith(("past", "layers"))}
    assert types == {onnx.TensorProto.BFLOAT16}
    assert 2 * layout.kv_bytes_per_token == dataclasses.replace(layout, precision="fp32").kv_bytes_per_token
    exact = transformers_logits(base, PROMPTS[0])
    session = in_fp32(tmp_path)
    found = session.runner().step(session.new_cache(1, 16), Step(PROMPTS[:1], [7], every_position=True))[0]
    assert 1e-5 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.03  # 8 bits


def test_bf16_on_a_cpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"bf16 on a GPU only, .*--precision fp32, or with --device cuda"):
        export_graph(tmp_path / "no-such-base", tmp_path / "graph", precision="bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "no serving graph for GPT2LMHeadModel"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"head_dim": 20}, r"heads of size 20 \(ONNX Runtime's attention takes multiples of 16"),
        ({"head_dim": 8}, "heads of size 8"),
        ({"head_dim": 100}, "heads of size 100"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            r"a part of each head \(partial_rotary_factor 0\.5\)",
        ),
        ({"hidden_act": "relu", "head_dim": 20}, "activation 'relu' .*; nor for heads of size 20 .*--print-vllm"),
        ({"sliding_window": 64}, "sliding window"),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "model_type": "gemma3_text",
                "head_dim": 16,
                "use_bidirectional_attention": True,
            },
            "attention to later tokens",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "model_type": "qwen3",
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "layers of the type 'chunked_attention'",
        ),
    ],
)
def test_what_the_graph_would_compute_wrongly_is_refused(
    changes: dict[str, object], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | changes
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=message):
        export_graph(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


EDITS = {
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
                                 "rope_theta": 10000.0}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "epsilon": {"rms_norm_eps": 0.1},
    "swish, another name of silu": {"hidden_act": "swish"},
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_configuration_gets_a_graph_that_computes_it(edit: str, tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    before = cached_graph(base, tmp_path / "graphs")
    edit_config(base, **EDITS[edit])
    after = cached_graph(base, tmp_path / "graphs")
    assert before != after
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    assert logit_difference(GraphSession(after), model, list(range(5, 25))) < 1e-3


def test_what_computes_the_same_has_one_graph(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    before = cached_graph(base, tmp_path / "graphs")
    edit_config(base, use_cache=False, eos_token_id=[2, 5], attention_dropout=0.1)
    assert cached_graph(base, tmp_path / "graphs") == before


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_exported(tiny_llama: Path, tmp_path: Path) -> None:
    base = make_tiny_llama(tmp_path / "base", vocab_size=40)
    export_graph(base, tmp_path / "out")
    assert GraphSession(tmp_path / "out").layout.vocab_size == 40


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 1.01), ("fp16", 1.5), ("int4", -1.0)])
def test_a_graph_that_is_not_the_model_is_not_written(
    precision: Precision, factor: float, tiny_llama: Path, tmp_path: Path
) -> None:
    # A config whose epsilon transformers reads otherwise than the graph would be such a case; here the base changes
    # between the two readings.
    base = shutil.copytree(tiny_llama, tmp_path / "base")

    def change_base(done: int, total: int) -> None:
        if done < total:
            return
        weights = load_file(base / "model.safetensors")
        weights["model.norm.weight"] *= factor
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ExportError, match=r"differs from transformers by .*nothing was written; .*(vLLM|--precision)"):
        export_graph(base, tmp_path / "out", precision=precision, on_progress=change_base)
    assert not [path for path in tmp_path.iterdir() if path.name != "base"]


def test_a_graph_that_onnx_runtime_cannot_compute_is_refused_with_a_way_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_llama(tmp_path / "base", num_hidden_layers=1, head_dim=20)
    monkeypatch.setattr("graftline.export.served_models._HEAD_SIZE_STEP", 1)  # nobody has looked at it before
    with pytest.raises(
        ExportError, match=r"cannot compute the serving graph .*head_size.*; serve this model with vLLM"
    ):
        export_graph(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_precision_has_bounds_for_its_graph_and_for_recorded_answers() -> None:
    assert set(BOUNDS) == set(get_args(Precision)) == {"fp32", *smoke.BOUNDS}


@pytest.mark.parametrize(
    "found", [Agreement(1e-4, 1e-9, 0.9), Agreement(0.1, 1e-9, 1), Agreement(1e-4, float("nan"), 1)]
)
def test_each_bound_counts_and_nan_holds_none(found: Agreement) -> None:
    assert not BOUNDS["fp32"].hold_for(found)
    assert BOUNDS["fp32"].hold_for(Agreement(1e-4, 1e-9, 1.0))


def test_agreement_is_kl_and_top1_by_their_definitions(tiny_llama: Path, graph: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    other = AutoModelForCausalLM.from_pretrained(make_tiny_llama(graph.parent / "other-model", seed=5)).eval()
    export = graph.parent / "of-tiny"
    export_graph(tiny_llama, export)
    tokens = list(range(5, 25))
    found = agreement(GraphSession(export), other, tokens)
    p, q, same = [], [], []
    for ids in ([*tokens[:13], tokens[18]], [*tokens[13:18], tokens[19]]):
        with torch.no_grad():
            a, b = (one(torch.tensor([ids])).logits[0].double() for one in (other, model))
        p.append(a.softmax(-1))
        q.append(b.softmax(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
    expected = (torch.cat(p) * (torch.cat(p) / torch.cat(q)).log()).sum(-1).mean()
    assert found.mean_kl == pytest.approx(float(expected), rel=1e-3)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()))


def test_biases_on_every_projection_are_in_the_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama_config(attention_bias=True, mlp_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    make_tiny_llama(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    export_graph(tmp_path / "base", tmp_path / "graph")


def test_a_folder_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"graph\.json is missing"):
        GraphSession(tmp_path)


def test_a_damaged_graph_is_refused(graph: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(graph, tmp_path / "broken")
    with (broken / "model.onnx.data").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(ExportError, match="cannot load"):
        GraphSession(broken)
    (broken / "graph.json").write_text('{"format": 2}')
    with pytest.raises(ExportError, match="damaged"):
        GraphSession(broken)


def test_a_weight_beyond_float16_is_refused_by_name_and_no_graph_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumberTypeError, match=r"model\.layers\.1\.mlp\.down_proj\.weight has values of up to 1e\+05"):
        export_graph(base, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
