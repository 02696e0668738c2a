"""Every family is trained as PEFT trains it, merged and exported; the page about families says what is shown here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftline.adapters.attach import adapter_layers, attach, trainable_parameters
from graftline.adapters.peft_config import AdapterIdentity
from graftline.adapters.peft_format import AdapterWeights, save_adapter
from graftline.data.encoding import Encoded
from graftline.errors import ExportError
from graftline.evaluate.option_tree import OptionItem
from graftline.evaluate.scoring import score_options
from graftline.export import gguf_adapter
from graftline.export.onnx_export import export_graph, graph_parameters, ort_values
from graftline.export.onnx_session import GraphSession, Step
from graftline.export.served_models import SUPPORTED
from graftline.export.targets import check_target, export_adapter, shapes_of
from graftline.merge.fold import merge_folder
from graftline.train.batches import pad_rows
from graftline.train.loss import SupervisedLoss, check_head
from graftline.weights.identity import read_identity
from graftline.weights.quant.linear import load_model
from graftline.weights.reader import ARCHITECTURES
from tests.adapters.stand_in import EXPERTS, make_experts
from tests.conformance.families import MODELS, make_model, tokens
from tests.sections import adapter_section
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")
RANK, ALPHA = 3, 6.0
FAMILIES = [name for name in MODELS if "," not in name]
"""Without the variants of rotary scaling, which no exported file holds."""


@dataclass(frozen=True)
class Family:
    """A family's base in a folder, and a model with LoRA on every linear layer, away from zero, saved beside it."""

    name: str
    base: Path
    adapter: Path
    model: PreTrainedModel
    at_zero: Tensor
    """Logits with the adapter as it is attached."""
    logits: Tensor


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    base, adapter = folder / "base", folder / "adapter"
    make_model(request.param).save_pretrained(base)
    model = load_model(base)
    attach(model, adapter_section("lora", rank=RANK, alpha=ALPHA), seed=0)
    at_zero, generator = logits(model), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, adapter, identity=AdapterIdentity(base_digest=read_identity(base).digest))
    return Family(request.param, base, adapter, model, at_zero, logits(model))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(tokens()).logits
    return found


def of_transformers(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_base_adapter_loss_and_gradients_are_those_of_transformers_and_peft(family: Family) -> None:
    base = of_transformers(family.base)
    assert torch.equal(family.at_zero, logits(base))
    theirs = peft.PeftModel.from_pretrained(base, family.adapter, is_trainable=True).eval()
    assert (family.logits - family.at_zero).abs().max() > 0.01
    assert_same(family.logits, logits(theirs))
    ids_BT = tokens()
    check_head(family.model, ids_BT[0].tolist())
    learned_T = torch.arange(ids_BT.shape[1]) % 2 == 1
    batch = pad_rows([Encoded(ids, learned_T.tolist()) for ids in ids_BT.tolist()])
    found = SupervisedLoss(family.model, chunk_tokens=4)(batch, num_supervised=torch.tensor(len(batch["targets"])))
    found.backward()
    logits_NV = theirs(ids_BT).logits[:, :-1].flatten(0, 1).float()
    expected = F.cross_entropy(logits_NV, ids_BT.where(learned_T, -100)[:, 1:].flatten(), ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = {n.split(".default")[0]: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    layers = adapter_layers(family.model)
    assert len(gradients) == 2 * len(layers) >= 2 * 3 * 4
    for name, layer in layers.items():
        for factor in "AB":
            wanted = gradients[f"base_model.model.{name}.lora_{factor}"]
            atol = 1e-4 * max(float(wanted.abs().max()), 1e-3)
            torch.testing.assert_close(getattr(layer, factor).grad, wanted, rtol=1e-3, atol=atol)


def test_the_merged_folder_computes_the_same_in_transformers(family: Family, tmp_path: Path) -> None:
    merge_folder(family.base, family.adapter, tmp_path / "merged", dtype=torch.float32)
    assert_same(logits(of_transformers(tmp_path / "merged")), family.logits)
    before, after = (load_file(folder / "model.safetensors") for folder in (family.base, tmp_path / "merged"))
    assert set(after) == set(before)  # the names that other software reads


WITHOUT_VLLM_ADAPTERS = ("GPT-NeoX", "GPT-2")


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_vllm_gets_factors_for_the_bases_layers_or_a_refusal(family: Family, tmp_path: Path) -> None:
    weights = AdapterWeights.open(family.adapter)
    if family.name in WITHOUT_VLLM_ADAPTERS:
        (reason,) = check_target(weights, "vllm").reasons
        assert reason == f"vLLM takes no adapters on {family.name}; merge it and serve the merged model"
        return
    export_adapter(family.adapter, tmp_path / "vllm", target="vllm", shape_of=shapes_of(family.base))
    spec = AdapterWeights.open(tmp_path / "vllm").spec
    assert spec.alpha == spec.rank == RANK
    stored = load_file(tmp_path / "vllm" / "adapter_model.safetensors")
    layers = adapter_layers(family.model)
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        A_RI, B_OR = (stored[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        assert_same(B_OR @ A_RI, (ALPHA / RANK * layer.B @ layer.A).detach())


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_llama_cpp_gets_a_factor_for_every_layer_in_its_order_of_rows(family: Family, tmp_path: Path) -> None:
    layers, config = adapter_layers(family.model), family.model.config
    assert gguf_adapter.export_adapter(family.adapter, tmp_path / "a.gguf", base=family.base) == len(layers)
    tensors = {t.name: torch.from_numpy(np.array(t.data)) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert len(tensors) == 2 * len(layers)
    names = gguf.get_tensor_name_map(gguf_adapter.ARCHITECTURES[MODELS[family.name][0]], config.num_hidden_layers)
    for name, layer in layers.items():
        expected_OI = (ALPHA / RANK * layer.B @ layer.A).detach()
        place = f"{names.get_name(name)}.weight"
        found_OI = tensors[f"{place}.lora_b"] @ tensors[f"{place}.lora_a"]
        rows = rows_in_llama_cpp(family.name.partition(",")[0], name, config)
        assert_same(found_OI, expected_OI if rows is None else expected_OI[rows])


def rows_in_llama_cpp(family: str, layer: str, config: Any) -> list[int] | None:
    """For each row of a weight in a GGUF file its row in transformers; None where both have the same order."""
    heads, last = config.num_attention_heads, layer.rpartition(".")[2]
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if last in ("q_proj", "k_proj") and family in ("Llama", "Mistral", "SmolLM3", "Granite"):
        count = heads if last == "q_proj" else config.num_key_value_heads
        # Rows 2i and 2i + 1 are rotated together, in transformers i and i + size / 2.
        return [
            head * size + half * size // 2 + i for head in range(count) for i in range(size // 2) for half in (0, 1)
        ]
    if last == "query_key_value":
        return [(head * 3 + part) * size + i for part in range(3) for head in range(heads) for i in range(size)]
    return None


SERVED = [name for name in MODELS if MODELS[name][0] in SUPPORTED]


@pytest.fixture(scope="module")
def session(family: Family) -> GraphSession:
    make_tokenizer(family.base)
    export_graph(family.base, family.base.with_name("graph"))
    return GraphSession(family.base.with_name("graph"))


@pytest.mark.parametrize("family", SERVED, indirect=True)
def test_the_serving_graph_computes_the_same_while_answers_grow_past_the_window(
    family: Family, session: GraphSession
) -> None:
    rows, prompts = tokens(3, 31).tolist(), [19, 4, 9]
    base = load_model(family.base)
    with torch.no_grad():
        expected_BTV = torch.stack([base(torch.tensor([row])).logits[0] for row in rows]).numpy()
    runner, cache = session.runner(), session.new_cache(3, 32)
    atol = 2e-5 * max(1.0, float(abs(expected_BTV).max()))
    first = Step([row[:end] for row, end in zip(rows, prompts, strict=True)], prompts, every_position=True)
    found_BTV = runner.step(cache, first)
    for row, end in enumerate(prompts):
        np.testing.assert_allclose(found_BTV[row, :end], expected_BTV[row, :end], rtol=0, atol=atol)
    for done in range(12):
        ends = [end + done for end in prompts]
        step = Step([[row[end]] for row, end in zip(rows, ends, strict=True)], [end + 1 for end in ends])
        found_BV = runner.step(cache, step)
        np.testing.assert_allclose(found_BV, expected_BTV[range(3), ends], rtol=0, atol=atol)


@pytest.mark.parametrize("family", SERVED, indirect=True)
def test_the_serving_graph_takes_the_adapter_and_a_prompt_in_pieces(family: Family, session: GraphSession) -> None:
    weights = AdapterWeights.open(family.adapter)
    runner = session.runner(ort_values(graph_parameters(weights, session.layout, family.base)))
    ids, cache = tokens()[0].tolist(), session.new_cache(1, 32)
    found_TV = [
        runner.step(cache, Step([ids[start : start + 7]], [min(start + 7, len(ids))], every_position=True))[0]
        for start in range(0, len(ids), 7)
    ]
    assert_same(torch.from_numpy(np.concatenate(found_TV)), family.logits[0])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in SERVED], indirect=True)
def test_what_the_serving_graph_does_not_compute_is_refused_with_a_way_on(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no serving graph for \w+ .*serve this base with vLLM .*or merge"):
        export_graph(family.base, tmp_path / "graph")


WINDOWED = [name for name in FAMILIES if "sliding_window" in MODELS[name][1]]


@pytest.mark.parametrize("family", WINDOWED, indirect=True)
def test_options_longer_than_a_sliding_window_are_scored_as_texts_of_their_own(family: Family) -> None:
    first, second = tokens(2, 24).tolist()
    prompts = [(*first[:12], *first[12:20]), (*first[:12], *second[:9])]  # a shared prefix longer than the window
    options = ((5, 6, 7), (5, 9), (60,))
    items = [OptionItem(str(at), prompt, options, 0) for at, prompt in enumerate(prompts)]
    model = load_model(family.base)
    for item, score in zip(items, score_options(model, items), strict=True):
        for option, found in zip(options, score.log_likelihoods, strict=True):
            ids = torch.tensor([[*item.prompt_ids, *option]])
            with torch.no_grad():
                logp_TV = model(ids).logits[0].double().log_softmax(-1)
            places = range(len(item.prompt_ids) - 1, ids.shape[1] - 1)
            expected = sum(float(logp_TV[at, token]) for at, token in zip(places, option, strict=True))
            assert found == pytest.approx(expected, abs=1e-4)


def test_the_page_lists_every_family_with_what_is_tried_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    page, _, of_experts = page.partition("## Mixtures of experts")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert [row[:6] for row in rows[1:]] == [
        [
            name,
            f"`{MODELS[name][0]}`",
            "yes",
            "merged" if name in WITHOUT_VLLM_ADAPTERS else "yes",
            "yes" if MODELS[name][0] in gguf_adapter.ARCHITECTURES else "no",
            "yes" if name in SERVED else "no",
        ]
        for name in FAMILIES
    ]
    with_experts = {name for name, architecture in ARCHITECTURES.items() if architecture.experts}
    assert {MODELS[name][0] for name in FAMILIES} == set(ARCHITECTURES) - with_experts
    # tests/adapters/test_experts.py and its neighbours try these.
    assert {type(make_experts(name)).__name__ for name in EXPERTS} == with_experts
    assert all(f" | `{name}` | " in of_experts for name in with_experts)
    (llama,) = (row for row in rows if row[0] == "Llama")
    variants = [name.partition(", ")[2] for name in MODELS if name.startswith("Llama, ")]
    assert llama[6] == f"rotary scaling: {', '.join(variants)}"
