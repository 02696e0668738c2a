import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.adapters.attach import attach, trainable_parameters
from graftline.adapters.methods import METHODS
from graftline.adapters.peft_format import AdapterIdentity, AdapterWeights, load_adapter, read_initial, save_adapter
from graftline.digest import of_bytes, of_folder
from graftline.errors import AdapterError, BaseMismatchError, GraftlineError
from graftline.settings.model import Adapter
from graftline.weights.identity import BaseIdentity
from tests.adapters.stand_in import disturb, make_model, make_tokens

BASE = BaseIdentity(of_bytes(b"base"), quantizer={"method": "nf4", "block_size": 64})
TEMPLATE = of_bytes(b"template")
IDENTITY = AdapterIdentity(
    base_digest=BASE.digest, quantizer=BASE.quantizer, template_digest=TEMPLATE, training_run="run"
)
SAVED = [name for name in METHODS if name not in ("loftq", "qpissa")]


def save(folder: Path, *, method: str = "lora", **values) -> torch.nn.Module:
    model = make_model("llama")
    attach(model, Adapter(**{"method": method, "rank": 3} | values), seed=0)
    disturb(model)
    save_adapter(model, folder, identity=IDENTITY)
    return model


@pytest.mark.parametrize("method", SAVED)
def test_an_adapter_comes_back_as_it_was(method, tmp_path: Path):
    model = save(tmp_path, method=method)
    again = make_model("llama")
    load_adapter(again, tmp_path, base=BASE, template_digest=TEMPLATE)
    assert torch.equal(again(make_tokens()).logits, model(make_tokens()).logits)
    assert not trainable_parameters(again)
    assert not again.training


@pytest.mark.parametrize("method", SAVED)
def test_the_same_adapter_gives_the_same_bytes(method, tmp_path: Path):
    save(tmp_path / "a", method=method)
    save(tmp_path / "b", method=method)
    load_adapter(model := make_model("llama"), tmp_path / "a", base=BASE, trainable=True)
    save_adapter(model, tmp_path / "c", identity=IDENTITY)
    digests = [of_folder(tmp_path / name) for name in "abc"]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"adapter_config.json", "adapter_model.safetensors", "graftline.json"}
    assert digests[2]["adapter_model.safetensors"] == digests[0]["adapter_model.safetensors"]


def test_no_path_of_this_machine_is_written(tmp_path: Path):
    save(tmp_path)
    for file in tmp_path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox"])
def test_targets_are_written_short_where_the_ends_name_the_same_layers(architecture, tmp_path: Path):
    model = make_model(architecture)
    attach(model, Adapter(method="lora", rank=3), seed=0)
    save_adapter(model, tmp_path, identity=IDENTITY)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    matched = {
        n for n, _ in make_model(architecture).named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)
    }
    assert matched == set(AdapterWeights.open(tmp_path).modules())


def test_another_base_is_refused_with_both_digests(tmp_path: Path):
    save(tmp_path)
    other = BaseIdentity(of_bytes(b"other"))
    with pytest.raises(BaseMismatchError) as caught:
        load_adapter(make_model("llama"), tmp_path, base=other)
    assert str(BASE.digest) in str(caught.value)
    assert str(other.digest) in str(caught.value)
    assert "quantized: block_size=64, method=nf4" in str(caught.value)


def test_another_template_is_refused_with_both_digests(tmp_path: Path):
    save(tmp_path)
    with pytest.raises(BaseMismatchError) as caught:
        load_adapter(make_model("llama"), tmp_path, base=BASE, template_digest=of_bytes(b"other"))
    assert str(TEMPLATE) in str(caught.value)


def test_an_adapter_of_unknown_origin_loads_with_a_warning(tmp_path: Path, caplog):
    save(tmp_path)
    (tmp_path / "graftline.json").unlink()
    load_adapter(make_model("llama"), tmp_path, base=BaseIdentity(of_bytes(b"any")))
    assert "cannot be checked" in caplog.text


def change_config(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def nan(tensors):
    tensors[FIRST][0, 0] = float("nan")


def infinite(tensors):
    tensors[FIRST][0, 0] = float("inf")


def missing(tensors):
    del tensors[FIRST]


def missing_layer(tensors):
    for key in [k for k in tensors if "layers.0.self_attn.q_proj" in k]:
        tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)


def surplus(tensors):
    tensors[FIRST.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(32)


def unannounced(tensors):
    tensors["base_model.model.model.norm.weight"] = torch.ones(32)


def unannounced_bias(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(32)


def no_prefix(tensors):
    tensors[FIRST.removeprefix("base_model.model.")] = tensors.pop(FIRST)


def wrong_rank(tensors):
    tensors[FIRST] = tensors[FIRST][:2].contiguous()


def wrong_width(tensors):
    tensors[FIRST] = tensors[FIRST][:, :5].contiguous()


DAMAGED = [
    (nan, "q_proj.lora_A.weight holds 1 values that are NaN or infinite"),
    (infinite, "q_proj.lora_A.weight holds 1 values that are NaN or infinite"),
    (missing, r"q_proj: the file holds \['B'\], expected \['A', 'B'\]; it is incomplete"),
    (missing_layer, "has the layer model.layers.7.self_attn.q_proj and 0 others that LlamaForCausalLM lacks"),
    (surplus, "lora_magnitude_vector' belongs to no tensor of the method lora"),
    (unannounced, "holds the tensor 'model.norm.weight', which adapter_config.json announces neither as"),
    (unannounced_bias, "holds the tensor 'model.layers.0.self_attn.q_proj.bias', which adapter_config.json announces"),
    (no_prefix, "does not start with 'base_model.model.'"),
    (wrong_rank, "its tensors have rank 2, adapter_config.json says 3"),
    (wrong_width, r"q_proj: A has shape \(3, 5\), expected \(3, 32\)"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_file_is_refused_with_what_is_wrong(change, message, tmp_path: Path):
    save(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(AdapterError, match=message):
        load_adapter(make_model("llama"), tmp_path, base=BASE)


CONFIGS = [
    ({"peft_type": "IA3"}, "peft_type 'IA3'; LORA and VERA can be loaded"),
    ({"peft_type": None}, "peft_type None"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa': its base is not the original"),
    ({"init_lora_weights": "loftq"}, "its base is not the original"),
    ({"use_dora": True, "use_rslora": True}, "holds|use_dora and use_rslora"),
    ({"lora_bias": True}, "uses lora_bias, which no method here computes"),
    ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_what_peft_can_and_we_cannot_is_refused_by_name(values, message, tmp_path: Path):
    save(tmp_path)
    (tmp_path / "graftline.json").unlink()
    change_config(tmp_path, **values)
    with pytest.raises(AdapterError, match=message):
        AdapterWeights.open(tmp_path)


TYPES = [
    ({"r": "3"}, "rank is '3'"),
    ({"r": 0}, "rank is 0"),
    ({"lora_alpha": None}, "alpha is None"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]: .* valid dictionary"),
    ({"lora_dropout": 2.0}, "dropout is 2.0: .* less than 1"),
    ({"bias": "some"}, "bias is 'some'"),
]


@pytest.mark.parametrize(("values", "message"), TYPES)
def test_a_config_value_of_the_wrong_type_or_range_is_refused(values, message, tmp_path: Path):
    save(tmp_path)
    change_config(tmp_path, **values)
    with pytest.raises(AdapterError, match=message):
        AdapterWeights.open(tmp_path)


def test_a_saved_module_that_the_model_lacks_or_of_another_size_is_refused(tmp_path: Path):
    save(tmp_path, targets=("q_proj",), modules_to_save=("lm_head",))
    key = "base_model.model.lm_head.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({key: tensors[key][:5].contiguous()}))
    with pytest.raises(AdapterError, match=r"lm_head.weight has shape \(5, 32\), expected \(96, 32\)"):
        load_adapter(make_model("llama"), tmp_path, base=BASE)
    change_config(tmp_path, modules_to_save=["value"])
    change_tensors(tmp_path, lambda tensors: tensors.update({"base_model.model.value.weight": tensors.pop(key)}))
    with pytest.raises(AdapterError, match=r"holds a tensor 'value\.weight' that LlamaForCausalLM lacks"):
        load_adapter(make_model("llama"), tmp_path, base=BASE)


def test_pickles_are_never_loaded(tmp_path: Path):
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(AdapterError, match="is a pickle file, which can run code"):
        AdapterWeights.open(tmp_path)


@pytest.mark.parametrize("cut", [4, 100, -10])
def test_a_truncated_file_is_refused(cut, tmp_path: Path):
    save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(GraftlineError, match=r"adapter_model\.safetensors"):
        AdapterWeights.open(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, tmp_path: Path):
    save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=name.replace(".", r"\.")):
        AdapterWeights.open(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"format": 2}', '{"format": 1, "base_digest": "sha256:x"}', "[" * 100_000],
)
def test_a_damaged_identity_is_refused(text, tmp_path: Path):
    save(tmp_path)
    (tmp_path / "graftline.json").write_text(text)
    with pytest.raises(AdapterError, match=r"graftline\.json"):
        AdapterWeights.open(tmp_path)


def test_a_failed_write_leaves_no_adapter_that_looks_whole(tmp_path: Path, monkeypatch):
    save(tmp_path)

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graftline.adapters.peft_format.write_json", fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, rank=2)
    assert not (tmp_path / "graftline.json").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path):
    model = make_model("llama")
    attach(model, Adapter(method="lora", rank=3), seed=0)
    next(iter(trainable_parameters(model).values())).data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"holds 1 values that are NaN or infinite"):
        save_adapter(model, tmp_path, identity=IDENTITY)
    assert not list(tmp_path.iterdir())


def test_folding_checks_the_shape_and_the_layer(tmp_path: Path):
    save(tmp_path)
    weights = AdapterWeights.open(tmp_path)
    with pytest.raises(AdapterError, match=r"the weight is \(5, 5\), the adapter is for \(32, 32\) \(out, in\)"):
        weights.fold_weight("model.layers.0.self_attn.q_proj", torch.zeros(5, 5))
    with pytest.raises(AdapterError, match=r"has no layer 'model\.nothing'"):
        weights.fold_weight("model.nothing", torch.zeros(5, 5))
    with pytest.raises(AdapterError, match="the folded weight holds 1024 values that are NaN"):
        weights.fold_weight("model.layers.0.self_attn.q_proj", torch.full((32, 32), float("nan")))


def test_initial_factors_are_read_by_layer(tmp_path: Path):
    save_file({"model.q.lora_A": torch.ones(2, 3), "model.q.lora_B": torch.ones(4, 2)}, tmp_path / "init.safetensors")
    initial = read_initial(tmp_path / "init.safetensors")
    assert {name: set(state) for name, state in initial.items()} == {"model.q": {"A", "B"}}
    save_file({"model.q.weight": torch.ones(2, 3)}, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterError, match=r"'model\.q\.weight' is no initial factor"):
        read_initial(tmp_path / "bad.safetensors")
