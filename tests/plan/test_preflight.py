import json

import pytest
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM

from graftline.data.template import Encoded
from graftline.errors import AdapterError, TrainError
from graftline.plan.preflight import check_fits, plan, workload_of
from graftline.settings.model import Adapter
from tests.sections import train_section
from tests.tiny import tiny_llama_config
from tests.train.rows import make_rows

_ROWS = make_rows(40)
_SETTINGS = train_section(epochs=1, batch_size=8, device="cpu")
_ADAPTER = Adapter(method="lora", rank=4)


def test_a_plan_names_coverage_rows_memory_and_time() -> None:
    made = plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER)
    assert made.fits
    assert made.num_steps == 5
    assert made.longest_row == max(len(row.input_ids) for row in _ROWS)
    assert sum(count for _, count in made.supervised_histogram) == 40
    assert [name for name, _ in made.supervised_histogram] == ["1", "2-3", "4-7"]
    assert made.seconds is not None
    assert 0 < made.seconds[0] < made.seconds[1]
    text = made.text()
    for expected in ("all-linear", "supervised tokens a row", "activations", "fits", "5 steps"):
        assert expected in text


def test_a_training_that_cannot_fit_is_stopped_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    settings = _SETTINGS.replace(batch_size=16)
    rows = [Encoded(list(range(4, 132)), [False] * 120 + [True] * 8)] * 16
    needed = plan(config, rows, settings=settings, adapter=_ADAPTER).memory.total
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: int(0.6 * needed.low))
    with pytest.raises(TrainError, match=r"GB are free; it fits with train\.gradient_checkpointing: true"):
        check_fits(config, rows, settings=settings, adapter=_ADAPTER)
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: 1000)
    with pytest.raises(TrainError, match="no setting makes it fit"):
        check_fits(config, rows, settings=settings, adapter=_ADAPTER)


@pytest.mark.parametrize(("share", "stops"), [(1.01, False), (0.99, True)])
def test_a_training_is_stopped_only_where_even_its_low_estimate_does_not_fit(
    share: float, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER).memory.total
    assert needed.low * 1.01 < needed.expected
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: int(share * needed.low))
    if stops:
        with pytest.raises(TrainError, match="GB are free"):
            check_fits(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER)
    else:
        check_fits(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", [("lm_head",), ("embed_tokens",), ("norm",), ("embed_tokens", "lm_head")])
def test_modules_trained_whole_are_planned(saved: tuple[str, ...], tied: bool) -> None:
    config, adapter = tiny_llama_config(tie_word_embeddings=tied), _ADAPTER.replace(targets=("q_proj",))
    plain = plan(config, _ROWS, settings=_SETTINGS, adapter=adapter)
    made = plan(config, _ROWS, settings=_SETTINGS, adapter=adapter.replace(modules_to_save=saved))
    model = LlamaForCausalLM(config)
    names = [f"model.{name}" if name != "lm_head" else name for name in saved]
    whole = sum(model.get_submodule(name).weight.numel() for name in names)
    assert made.coverage.num_trained == plain.coverage.num_trained + whole
    assert made.memory.total.low > plain.memory.total.low


def test_an_adapted_embedding_that_scales_is_planned() -> None:
    config = GemmaConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip
    adapter = _ADAPTER.replace(targets=("embed_tokens", "q_proj"))
    assert plan(config, _ROWS, settings=_SETTINGS, adapter=adapter).coverage.num_trained


def test_a_target_that_matches_nothing_is_refused_without_weights() -> None:
    adapter = _ADAPTER.replace(targets=("nothing_like_this",))
    with pytest.raises(AdapterError, match="nothing_like_this"):
        plan(LlamaConfig(num_hidden_layers=1), _ROWS, settings=_SETTINGS, adapter=adapter)


def test_a_plan_is_json_too() -> None:
    document = json.loads(json.dumps(plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER).document()))
    assert document["fits"]
    assert document["coverage"]["trained_parameters"] == document["memory"]["trained_parameters"]
    parts = {part["name"]: part["low_bytes"] for part in document["memory"]["parts"]}
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()), abs=len(parts))


def test_a_training_whose_blocks_do_not_fit_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: 1000)
    made = plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER)
    assert made.seconds is None
    assert "time unknown" in made.text()


def test_packed_rows_are_planned_as_the_sequences_that_they_fill() -> None:
    shape = workload_of(_ROWS, _SETTINGS.replace(packing=True), _ADAPTER, None).shape
    longest = sorted(len(row.input_ids) for row in _ROWS)[-8:]
    assert (shape.rows, shape.tokens, shape.packed) == (1, sum(longest), True)


def test_what_all_rows_begin_with_is_planned_once() -> None:
    rows = [Encoded([7] * 20 + [at, at + 1], [False] * 21 + [True]) for at in range(10, 40)]
    assert workload_of(rows, _SETTINGS, _ADAPTER, None).shape.prefix_tokens == 20
    again = _SETTINGS.replace(gradient_checkpointing=True)
    assert workload_of(rows, again, _ADAPTER, None).shape.prefix_tokens == 0
