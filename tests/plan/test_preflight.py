import json
from typing import Any

import pytest
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM

from graftline.data.template import Encoded
from graftline.errors import AdapterError, TrainError
from graftline.plan.micro_batches import ways_to_cut
from graftline.plan.preflight import check_fits, count_work, plan, workload_of
from graftline.settings.model import Adapter
from graftline.settings.objective import Objective
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


def test_a_plan_says_that_it_fits_only_where_the_expected_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER).memory.total
    for free, fits in ((needed.expected, True), ((needed.low + needed.expected) / 2, False)):
        monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device, free=free: int(free) + 1)
        made = plan(tiny_llama_config(), _ROWS, settings=_SETTINGS, adapter=_ADAPTER)
        assert made.fits is fits
        assert bool(made.changes) is not fits


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


@pytest.mark.parametrize(("device", "sequences"), [("cpu", 4), ("cuda", 1)])
def test_where_attention_takes_bounds_packed_rows_are_planned_as_one_sequence(
    device: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftline.plan.preflight.resolve_device", lambda asked: device)
    monkeypatch.setattr("graftline.train.devices.has_bf16", lambda: True)
    rows = [Encoded([at + 4] * 900, [False] * 899 + [True]) for at in range(8)]
    shape = workload_of(rows, _SETTINGS.replace(packing=True, precision="bf16"), _ADAPTER, None).shape
    assert (shape.rows, shape.rows * shape.tokens) == (sequences, 7200)


def test_what_all_rows_begin_with_is_planned_once() -> None:
    rows = [Encoded([7] * 20 + [at, at + 1], [False] * 21 + [True]) for at in range(10, 40)]
    assert workload_of(rows, _SETTINGS, _ADAPTER, None).shape.prefix_tokens == 20
    again = _SETTINGS.replace(gradient_checkpointing=True)
    assert workload_of(rows, again, _ADAPTER, None).shape.prefix_tokens == 0


def test_a_pair_is_planned_as_two_rows_and_a_step_is_cut_between_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Encoded(list(range(4, 4 + length)), [False, *[True] * (length - 1)]) for length in (9, 5, 6, 6, 12, 1 + 6)]
    settings = _SETTINGS.replace(objective=Objective(kind="dpo"), batch_size=2, epochs=2)
    shape = workload_of(rows, settings, _ADAPTER, None).shape
    assert (shape.rows, shape.tokens, shape.supervised_tokens) == (4, 12, 8 + 4 + 11 + 6)
    assert count_work(rows, settings) == (3, 45 / 3 * 2)
    workload = workload_of(rows, settings.replace(batch_size=3, gradient_checkpointing=True), _ADAPTER, None)
    cuts = ways_to_cut(tiny_llama_config(), workload, limit_bytes=1e12)
    assert [(cut.batch_size, cut.tokens) for cut in cuts] == [(1, 24), (3, 72)]
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: 1000)
    with pytest.raises(TrainError, match=r"objective dpo with 5 rows.*expected two rows a pair"):
        check_fits(tiny_llama_config(), rows[:5], settings=settings, adapter=_ADAPTER)


def test_processes_on_a_cpu_share_its_memory_and_divide_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_llama_config(num_hidden_layers=24)
    one = _SETTINGS.replace(batch_size=1, gradient_checkpointing=True)  # nothing milder is left than sharding
    two = one.replace(processes=2)
    alone, made = (plan(config, _ROWS, settings=each, adapter=_ADAPTER) for each in (one, two))
    assert (alone.num_steps, made.num_steps) == (40, 20)
    assert made.tokens_per_step == 2 * alone.tokens_per_step
    low = made.memory.total.low
    monkeypatch.setattr("graftline.plan.preflight.free_bytes", lambda device: int(1.8 * low))
    check_fits(config, _ROWS, settings=one, adapter=_ADAPTER)
    with pytest.raises(
        TrainError, match=r"each of 2 processes of the training needs .*fits with train\.sharding: true"
    ):
        check_fits(config, _ROWS, settings=two, adapter=_ADAPTER)
    check_fits(config, _ROWS, settings=two.replace(sharding=True), adapter=_ADAPTER)
    monkeypatch.setenv("PET_NNODES", "2")  # one on each machine
    check_fits(config, _ROWS, settings=two, adapter=_ADAPTER)


@pytest.mark.parametrize(
    ("changes", "adapter"),
    [
        ({"processes": 1}, {}),
        ({"evaluate_every": 5}, {}),
        ({}, {"method": "full"}),
        ({}, {"method": "pissa"}),
        ({}, {"bias": "all"}),
    ],
)
def test_sharding_is_not_advised_where_it_is_refused(changes: dict[str, Any], adapter: dict[str, Any]) -> None:
    settings = _SETTINGS.replace(**{"processes": 2, **changes})
    assert not workload_of(_ROWS, settings, Adapter(**{"method": "lora", "rank": 4, **adapter}), None).may_shard
    assert workload_of(_ROWS, _SETTINGS.replace(processes=2), _ADAPTER, None).may_shard
