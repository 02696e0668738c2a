"""Each check fails on the rows at fault, names their lines, and passes without them."""

from pathlib import Path

import pytest
from tokenizers.normalizers import Lowercase
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.checks import (
    Check,
    ModelLimits,
    Side,
    check_dropped,
    check_encoded,
    check_labels,
    check_leakage,
    check_texts,
)
from graftline.data.encoding import EncodedRows, encode_rows
from graftline.data.rows import Message, Row
from graftline.data.template import Encoded, encode_prompt
from graftline.workflow.checking import place_of_lines


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def row(prompt: str, answer: str, line: int = 1) -> Row:
    return Row((Message("user", prompt, False), Message("assistant", answer, True)), line)


def encoded(tokenizer: PreTrainedTokenizerBase, *rows: Row, max_tokens: int = 99) -> EncodedRows:
    return encode_rows(rows, tokenizer, template="none", max_tokens=max_tokens, overlength="truncate")


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_good_rows_pass_every_check(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row("one", "A", 1), row("two", "B", 2)]
    checks = check_encoded("training", encoded(tokenizer, *rows), tokenizer, template="none")
    checks += check_texts("training", rows, labels=["A", "B "])
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 8


def test_rows_without_a_supervised_token_after_truncation_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer, row("a", "b", 4), row("a" * 30, "b", 5), max_tokens=10)
    check = named(check_encoded("training", rows, tokenizer, template="none"), "every row has supervised tokens")
    assert (check.stops, check.lines) == (True, (5,))
    assert "1 of 2 rows have no token to learn after truncation; raise data.max_tokens" in check.detail


def test_truncated_rows_are_a_warning_with_their_lines(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = encoded(tokenizer, row("a", "b" * 30, 4), max_tokens=10)
    checks = check_encoded("training", rows, tokenizer, template="none")
    check = named(checks, "no row is too long")
    assert (check.passed, check.stops, check.lines) == (False, False, (4,))
    assert named(checks, "the token that ends an answer is learned").passed


@pytest.mark.parametrize(
    "one",
    [Encoded([5, 6], [False, True]), Encoded([5, 2], [True, False]), Encoded([], [])],
    ids=["other", "hidden", "none"],
)
def test_an_answer_whose_end_is_not_learned_is_named(tokenizer: PreTrainedTokenizerBase, one: Encoded) -> None:
    rows = EncodedRows((one,), (row("a", "b", 8),), (), ())
    check = named(
        check_encoded("training", rows, tokenizer, template="none"), "the token that ends an answer is learned"
    )
    assert (check.stops, check.lines) == (True, (8,))


def test_a_tokenizer_whose_only_special_token_is_eos_is_no_reason_to_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    """Padding is masked, so its token never matters: GPT-2 has a single special token."""
    for name in ("bos_token", "unk_token", "pad_token"):
        setattr(tokenizer, name, tokenizer.eos_token)
    checks = check_encoded("training", encoded(tokenizer, row("a", "b")), tokenizer, template="none")
    assert not [check for check in checks if check.stops]


TOKENS, POSITIONS = "every token is in the model", "every row fits the model's positions"


def fits(tokenizer: PreTrainedTokenizerBase, name: str, *rows: Row, side: Side = "training", **limits: int) -> Check:
    given = ModelLimits(**{"num_tokens": len(tokenizer), "num_positions": 99} | limits)
    return named(check_encoded(side, encoded(tokenizer, *rows), tokenizer, template="none", limits=given), name)


def test_a_token_beyond_the_models_rows_is_named_with_the_lines_that_hold_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.add_tokens(["<sensor>"])
    added = len(tokenizer) - 1
    rows = [row("plain", "b", 3), row("a <sensor> b", "c", 4), row("d", "<sensor>", 5)]
    check = fits(tokenizer, TOKENS, *rows, num_tokens=added)
    assert (check.stops, check.lines) == (True, (4, 5))
    assert f"has {added} rows, so it has none for the tokens {added} ('<sensor>'); resize the base" in check.detail
    assert fits(tokenizer, TOKENS, *rows, num_tokens=added + 1).passed
    assert fits(tokenizer, TOKENS, rows[0], num_tokens=added).passed


def test_a_stop_token_beyond_the_models_rows_is_named_though_no_row_holds_it(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.add_special_tokens({"eos_token": "<stop>"})
    rows = EncodedRows((Encoded([5, 6], [False, True]),), (row("a", "b", 8),), (8,), ())
    limits = ModelLimits(num_tokens=len(tokenizer) - 1, num_positions=9)
    check = named(check_encoded("training", rows, tokenizer, template="none", limits=limits), TOKENS)
    assert (check.stops, check.lines) == (True, ())
    assert "'<stop>'" in check.detail


def test_rows_beyond_the_models_positions_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [row("a", "b", 1), row("a b c d e f", "g", 2)]
    longest = max(len(one.input_ids) for one in encoded(tokenizer, *rows).encoded)
    check = fits(tokenizer, POSITIONS, *rows, num_positions=longest - 1)
    assert (check.stops, check.lines) == (True, (2,))
    assert f"1 rows need up to {longest} positions, the model has {longest - 1}" in check.detail
    assert "data.overlength to drop or truncate" in check.detail
    assert fits(tokenizer, POSITIONS, *rows, num_positions=longest).passed


def test_what_evaluation_writes_behind_a_prompt_needs_positions_too(tokenizer: PreTrainedTokenizerBase) -> None:
    one = row("a b c d", "e", 2)
    prompt = len(encode_prompt(one, tokenizer, template="none"))
    needed = {"num_positions": prompt + 20, "num_new_tokens": 20}
    assert fits(tokenizer, POSITIONS, one, side="evaluation", **needed).passed
    short = needed | {"num_positions": prompt + 19}
    check = fits(tokenizer, POSITIONS, one, side="evaluation", **short)
    assert (check.stops, check.lines) == (True, (2,))
    assert f"need up to {prompt + 20} positions with up to 20 new tokens" in check.detail
    assert fits(tokenizer, POSITIONS, one, side="training", **short).passed


@pytest.mark.parametrize("text", ["x<|im_end|>", "<|pad|>"])
def test_special_tokens_in_a_prompt_or_an_answer_are_named(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    rows = encoded(tokenizer, row("a", "b", 1), row(text, "b", 2), row("a", text, 3), row("<im_end>", "b", 4))
    kept = check_encoded("training", rows, tokenizer, template="none", special_tokens="keep")
    assert not named(kept, "no special token in a text").stops
    check = named(check_encoded("training", rows, tokenizer, template="none"), "no special token in a text")
    assert (check.stops, check.lines) == (True, (2, 3))


def test_a_repeated_row_is_named_with_the_first_one() -> None:
    rows = [row("Q", "A", 1), row("Q", "B", 2), row("Q", "A", 4)]
    check = named(check_texts("training", rows, labels=None), "no row twice")
    assert (check.stops, check.lines) == (True, (4,))
    assert "4 = 1" in check.detail
    assert "set data.duplicates to drop" in check.detail


def test_repeated_rows_that_are_kept_warn_in_training_and_stop_an_evaluation() -> None:
    rows = [row("Q", "A", 1), row("Q", "A", 2)]
    for side, stops in (("training", False), ("evaluation", True)):
        check = named(check_texts(side, rows, labels=None, duplicates="keep"), "no row twice")  # type: ignore[arg-type]
        assert (check.passed, check.stops) == (False, stops)


PAIRS = [
    ("Does this run?\nif x:\n    y()", "Does this run?\nif x:\ny()"),
    ("Word class of: Polish", "Word class of: polish"),
    ("2\u00b2 =", "22 ="),
    ("\uff21?", "A?"),
    ("a b", "a  b"),
    ("stra\u00dfe", "strasse"),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_prompts_that_differ_in_case_width_or_blanks_are_different_prompts(one: str, other: str) -> None:
    for answers in (("yes", "no"), ("yes", "yes")):
        rows = [row(one, answers[0], 1), row(other, answers[1], 2)]
        checks = check_texts("training", rows, labels=["yes", "no"])
        assert not any(check.stops for check in checks)
        alike = named(checks, "prompts differ by more than case and blanks")
        assert (alike.passed, alike.severity, alike.lines) == (False, "warning", (2,))
        assert "2 = 1" in alike.detail


def test_contradictions_are_what_the_setting_says() -> None:
    rows = [row("Q", "A", 1), row("Q", "B", 2)]
    for contradictions, labels, stops in (("keep", ["A", "B"], False), ("error", None, True), (None, None, False)):
        checks = check_texts("training", rows, labels=labels, contradictions=contradictions)  # type: ignore[arg-type]
        assert named(checks, "one answer a prompt").stops == stops


def test_what_was_left_out_is_counted_and_listed() -> None:
    pairs = [(line, 1) for line in range(2, 9)]
    out, near = check_dropped({"duplicates": pairs, "contradictions": [(20, 20), (21, 20)]}, [(30, 4)])
    assert (out.passed, out.stops, out.lines) == (False, False, (*range(2, 9), 20, 21))
    assert "7 repeat an earlier row (lines 2 = 1, 3 = 1, 4 = 1, 5 = 1, 6 = 1 and 2 more); 2 ask what" in out.detail
    assert (near.passed, near.stops, near.lines) == (False, False, (30,))
    assert all(check.passed for check in check_dropped({}, []))


def test_a_line_of_several_files_is_told_with_its_file() -> None:
    spans = [
        {"name": "a.jsonl", "source": 0, "first": 1, "last": 3},
        {"name": "b.jsonl", "source": 0, "first": 4, "last": 9},
    ]
    place = place_of_lines({"files_of_lines": spans})

    out, _ = check_dropped({"evaluation": [(2, 12), (5, 4)]}, [], place=place)

    assert (
        "2 ask the same as a row of data.evaluation, or nearly (lines a.jsonl:2 = 12, b.jsonl:2 = b.jsonl:1)"
        in out.detail
    )
    assert place_of_lines({})(7) == "7"


def test_labels_with_the_same_token_ids_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    rows = [row("Word class of: Polish", " A")]
    check = check_labels("training", rows, tokenizer, template="none", labels=["A", "B", "a"])
    assert check.stops
    assert "'A' and 'a' have the same token ids" in check.detail
    assert check_labels("training", rows, tokenizer, template="none", labels=["A", "B"]).passed


def test_a_label_that_no_row_has_must_be_in_the_model_too(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_tokens(["<rare>"])
    rows, labels = [row("a", "b", 3)], ("b", "<rare>")
    found = [
        check_labels(
            "evaluation",
            rows,
            tokenizer,
            template="none",
            labels=labels,
            limits=ModelLimits(num_tokens, num_positions=9),
        )
        for num_tokens in (len(tokenizer) - 1, len(tokenizer))
    ]
    assert [check.passed for check in found] == [False, True]
    assert f"has {len(tokenizer) - 1} rows, so it has none for a token of '<rare>'" in found[0].detail


def test_labels_that_the_template_cannot_show_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    check = check_labels("training", [row("Q", "A", 3)], tokenizer, template="tokenizer", labels=["A", "b"])
    assert (check.stops, check.lines) == (True, (3,))
    assert "does not show turn 2" in check.detail


def test_two_answers_to_a_prompt_warn_in_generation_and_stop_with_labels() -> None:
    rows = [row("Q", "A", 1), row("Q", "B", 2)]
    warning = named(check_texts("training", rows, labels=None), "one answer a prompt")
    error = named(check_texts("training", rows, labels=["A", "B"]), "one answer a prompt")
    assert (warning.passed, warning.stops, error.stops, error.lines) == (False, False, True, (2,))


def test_answers_outside_the_labels_are_named_and_outer_blanks_do_not_matter() -> None:
    rows = [row("1", " A", 1), row("2", "C", 2), row("3", "a", 3)]
    check = named(check_texts("evaluation", rows, labels=["A", "B"]), "answers are labels")
    assert (check.stops, check.lines) == (True, (2, 3))
    assert "'C', 'a'" in check.detail
    assert "expected A, B" in check.detail


def test_labels_of_the_same_letters_composed_otherwise_are_told_apart() -> None:
    rows = [row("a", "caf\u0065\u0301", 2), row("b", "th\u00e9", 3)]
    check = named(check_texts("training", rows, labels=["caf\u00e9", "th\u00e9"]), "answers are labels")
    assert (check.stops, check.lines) == (True, (2,))
    assert "cafe\\u0301" in check.detail
    assert "composed otherwise: normalize the rows or the labels to NFC" in check.detail
    other = named(check_texts("training", [row("a", "dog", 2)], labels=["caf\u00e9"]), "answers are labels")
    assert "composed" not in other.detail


def test_a_leak_names_both_lines() -> None:
    check = check_leakage([row("Q", "A", 7)], [row("q", "B", 9), row("other", "B", 10)])
    assert (check.stops, check.lines) == (True, (9,))
    assert "1 of 2 evaluation prompts are in training (1 normalized): 9 = training 7 (normalized)" in check.detail
    assert check_leakage([row("Q", "A", 7)], [row("other", "B", 10)]).passed
