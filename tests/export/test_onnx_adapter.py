"""Adapters on the universal graph give peft's logits; one graph takes them all; and wrong pairings are refused."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.class_head import add_class_head, class_head_of
from graftline.adapters.methods import METHODS
from graftline.adapters.peft_config import AdapterIdentity, write_identity
from graftline.adapters.peft_format import AdapterWeights, save_adapter
from graftline.errors import BaseMismatchError, ExportError, NumberTypeError
from graftline.export.onnx_export import export_adapter, graph_parameters, ort_values, read_parameters, write_parameters
from graftline.export.onnx_session import GRAPH_FILE, GraphLayout, GraphSession, Step
from graftline.settings.model import Adapter
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from tests.adapters.stand_in import disturb
from tests.sections import adapter_section
from tests.tiny import make_tiny_llama

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [5, 6, 7, 8, 9, 10, 11]
NOT_HERE = {"full", "loftq", "qpissa"}
"""Whole tensors have no graph input; the others need a base that was made with them, and are LoRA from then on."""
VARIANTS: dict[str, dict[str, object]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora on v and up only": {"target_modules": ["v_proj", "up_proj"]},
    "lora with ranks of its own": {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"k_proj": 1}},
}


def make_adapter(base: Path, folder: Path, **settings: object) -> PreTrainedModel:
    """An adapter with random factors in ``folder``, bound to ``base``; returns peft's model."""
    torch.manual_seed(3)
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**defaults | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    method = "rslora" if settings.get("use_rslora") else "lora"
    write_identity(folder, AdapterIdentity(base_digest=read_identity(base).digest), method=method)
    return model.eval()


def expected_logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def graph_logits(session: GraphSession, adapter: Path | None) -> np.ndarray:
    runner = session.runner(None if adapter is None else read_parameters(adapter))
    step = Step([TOKENS], [len(TOKENS)], every_position=True)
    return runner.step(session.new_cache(1, 16), step)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_an_adapter_equal_pefts(variant: str, base: Path, graph: Path, tmp_path: Path) -> None:
    model = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    session = GraphSession(graph)
    found = graph_logits(session, tmp_path / "a.onnx_adapter")
    np.testing.assert_allclose(found, expected_logits(model), atol=1e-5)
    assert np.abs(found - graph_logits(session, None)).max() > 0.01


@pytest.mark.parametrize("method", sorted(set(METHODS) - NOT_HERE))
def test_every_method_gives_the_logits_of_our_own_layers(method: str, base: Path, graph: Path, tmp_path: Path) -> None:
    model = load_model(base)
    attach(model, adapter_section(method, rank=4), seed=0)
    disturb(model)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=read_identity(base).digest))
    export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    session = GraphSession(graph)
    found = graph_logits(session, tmp_path / "a.onnx_adapter")
    np.testing.assert_allclose(found, expected_logits(model.eval()), atol=1e-4)
    assert np.abs(found - graph_logits(session, None)).max() > 0.01


def test_a_method_that_changes_whole_tensors_is_refused(base: Path, graph: Path, tmp_path: Path) -> None:
    model = load_model(base)
    attach(model, Adapter(method="full"), seed=0)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=read_identity(base).digest))
    with pytest.raises(ExportError, match="merge this adapter"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)


def test_onnx_runtimes_own_way_of_switching_agrees_with_bound_inputs(base: Path, graph: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    session = GraphSession(graph)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "a.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    layout = session.layout
    empty = np.zeros((1, layout.num_kv_heads, 16, layout.head_dim), np.float32)
    feeds = {name: empty for name in layout.past_names()} | {
        "input_ids": np.array([TOKENS]),
        "last_position": np.array([len(TOKENS) - 1], np.int32),
        "total_length": np.array(len(TOKENS), np.int32),
        "logits_rows": np.arange(len(TOKENS)),
    }
    plain = onnxruntime.InferenceSession(graph / GRAPH_FILE, providers=["CPUExecutionProvider"])
    (logits,) = plain.run(["logits"], feeds, options)
    np.testing.assert_array_equal(logits, graph_logits(session, tmp_path / "a.onnx_adapter"))


def test_adapters_alternate_on_one_session_without_a_trace(base: Path, graph: Path, tmp_path: Path) -> None:
    session, alone = GraphSession(graph), {}
    for name in ("a", "b"):
        make_adapter(base, tmp_path / name, r=4 if name == "a" else 9)
        export_adapter(tmp_path / name, tmp_path / f"{name}.onnx_adapter", base=base, graph=graph)
        alone[name] = graph_logits(GraphSession(graph), tmp_path / f"{name}.onnx_adapter")
    plain = graph_logits(session, None)
    for name in ("a", "b", "a", "b"):
        np.testing.assert_array_equal(graph_logits(session, tmp_path / f"{name}.onnx_adapter"), alone[name])
        np.testing.assert_array_equal(graph_logits(session, None), plain)


def test_the_same_adapter_gives_the_same_bytes(base: Path, graph: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    digests = {
        export_adapter(tmp_path / "adapter", tmp_path / f"{i}.onnx_adapter", base=base, graph=graph) for i in range(3)
    }
    assert len(digests) == 1


def test_a_fused_factor_is_block_diagonal(base: Path, graph: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", rank_pattern={"k_proj": 3})
    layout = GraphSession(graph).layout
    parameters = graph_parameters(AdapterWeights.open(tmp_path / "adapter"), layout, base)
    qkv = layout.linears[0]
    B = parameters["layers.0.qkv.B"]
    assert B.shape == (4 + 3 + 4, sum(qkv.out_features))
    num_q, num_k, _ = qkv.out_features
    assert not B[:4, num_q:].any()
    assert not B[4:7, :num_q].any()
    assert not B[4:7, num_q + num_k :].any()
    assert B[4:7, num_q : num_q + num_k].all()


def test_a_layer_that_the_graph_has_no_input_for_is_refused(base: Path, graph: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ExportError, match=r"no input for lm_head .* merge this adapter"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_a_graph_of_another_base_is_refused(graph: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=9)
    make_adapter(other, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="export the graph of this base"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=other, graph=graph)


def test_an_adapter_of_another_base_is_refused(base: Path, graph: Path, tmp_path: Path) -> None:
    other = make_tiny_llama(tmp_path / "other", seed=9)
    make_adapter(other, tmp_path / "adapter")
    with pytest.raises(BaseMismatchError, match="was trained on the base"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)


def test_a_wrong_factor_is_found_before_the_file_is_written(
    base: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(base, tmp_path / "adapter")

    def doubled(*args: object) -> dict[str, np.ndarray]:
        return {name: 2 * value for name, value in graph_parameters(*args).items()}

    monkeypatch.setattr("graftline.export.onnx_export.graph_parameters", doubled)
    with pytest.raises(ExportError, match="differs from transformers by"):
        export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(b"not an adapter")
    with pytest.raises(ExportError, match="cannot read"):
        read_parameters(tmp_path / "a.onnx_adapter")


def test_values_survive_the_file(tmp_path: Path) -> None:
    values = {"x.A": np.arange(6, dtype=np.float32).reshape(3, 2), "x.g": np.ones(4, np.float16)}
    write_parameters(values, tmp_path / "a.onnx_adapter")
    found = read_parameters(tmp_path / "a.onnx_adapter")
    assert found.keys() == values.keys() == ort_values(values).keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name].numpy(), value)
        assert found[name].numpy().dtype == value.dtype


def test_an_adapter_in_bf16_survives_the_file(tmp_path: Path) -> None:
    bfloat16 = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
    write_parameters({"layers.0.o.A": np.array([[0.5, -3.0]], bfloat16)}, tmp_path / "a.onnx_adapter")
    (value,) = read_parameters(tmp_path / "a.onnx_adapter").values()
    assert (value.data_type(), value.shape(), value.tensor_size_in_bytes()) == ("tensor(bfloat16)", [1, 2], 4)


def test_an_adapter_that_float16_cannot_hold_is_refused_by_name(base: Path, graph: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "layers.1.self_attn.o_proj.lora_B" in name)
    weights[name][0, 0] = 1e6
    save_file(weights, file)
    layout = dataclasses.replace(GraphLayout.read(graph), precision="fp16")
    with pytest.raises(NumberTypeError, match=r"the adapter's layers\.1\.o\.B has values of up to .*float16 cannot"):
        graph_parameters(AdapterWeights.open(tmp_path / "adapter"), layout, base)


def test_a_head_for_classes_goes_with_the_adapter(base: Path, graph: Path, tmp_path: Path) -> None:
    model = load_model(base)
    add_class_head(model, ("a", "b", "c"), seed=2)
    attach(model, adapter_section("lora", rank=4), seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        hidden_TH = model.base_model(input_ids=torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
        head = class_head_of(model)
        assert head is not None
        expected_TL = head(hidden_TH).numpy()
    identity = read_identity(base)
    save_adapter(model, tmp_path / "adapter", identity=AdapterIdentity(base_digest=identity.digest))
    export_adapter(tmp_path / "adapter", tmp_path / "a.onnx_adapter", base=base, graph=graph)
    session = GraphSession(graph)
    runner = session.runner(read_parameters(tmp_path / "a.onnx_adapter"))
    every = Step([TOKENS, TOKENS[:3]], [len(TOKENS), 3], every_position=True)
    hidden, classes = runner.read(session.new_cache(2, 16), every)
    np.testing.assert_allclose(hidden[0], hidden_TH.numpy(), atol=1e-4)
    np.testing.assert_allclose(classes[0], expected_TL, atol=1e-4)
    last, of_last = runner.another().read(session.new_cache(2, 16), Step(every.tokens, every.lengths))
    np.testing.assert_allclose(of_last, [classes[0, -1], classes[1, 2]], atol=1e-5)
    assert last.shape == (2, hidden.shape[-1])
    assert session.runner().read(session.new_cache(1, 16), Step([TOKENS], [len(TOKENS)]))[1] is None
