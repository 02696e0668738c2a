"""`data.learned`: which of the assistant's turns a model learns; and the row that shows it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from graftline.data.mixing import FetchedSource, Span, as_learned
from graftline.data.preparation import prepare_rows
from graftline.data.rows import read_rows, rows_from_objects, write_rows
from graftline.data.template import encode
from graftline.data.validation import ValidationReport, marked_text
from graftline.errors import DataError
from graftline.settings.data import Data, EvaluationRows, Learned
from graftline.workflow.checking import in_colours
from tests.data.chat_templates import QWEN3

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "look", "arguments": {"day": "Monday"}}}],
}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Open?"},
    CALL,
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "Yes, open."},
]
SPANS = [Span("rows.jsonl", 0, 1, 9)]


def turns(learned: Learned, messages: list[dict[str, Any]] = TURNS) -> list[int]:
    (row,) = as_learned(rows_from_objects([{"messages": messages}], origin="test"), learned, SPANS)
    return [at for at, message in enumerate(row.messages) if message.supervised]


@pytest.mark.parametrize(
    ("learned", "expected"), [("every-turn", [1, 3, 5]), ("last-turn", [5]), ("answers", [1, 5]), ("calls", [3])]
)
def test_only_the_turns_that_are_asked_for_are_learned(learned: Learned, expected: list[int]) -> None:
    assert turns(learned) == expected


def test_a_turn_that_the_row_excludes_stays_excluded() -> None:
    messages = [*TURNS[:1], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    assert turns("answers", messages) == [5]


def test_rows_of_which_nothing_is_learned_are_named_together() -> None:
    rows = rows_from_objects([{"messages": TURNS[:2]}, {"messages": TURNS}, {"messages": TURNS[:2]}], origin="test")
    with pytest.raises(DataError, match=r"2 problems:(.|\n)*rows\.jsonl:1: no turn is learned(.|\n)*rows\.jsonl:3:"):
        list(as_learned(rows, "calls", SPANS))


def test_what_is_not_learned_is_so_in_the_file_that_the_training_reads(tmp_path: Path) -> None:
    objects = [{"messages": TURNS}]
    rows = list(as_learned(rows_from_objects(objects, origin="test"), "calls", SPANS))
    write_rows(tmp_path / "train.jsonl", rows)
    (again,) = read_rows(tmp_path / "train.jsonl")
    assert [message.supervised for message in again.messages] == [message.supervised for message in rows[0].messages]


def test_the_last_turn_alone_fits_a_template_that_rewrites_earlier_ones(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = QWEN3
    messages = [*TURNS[:1], TURNS[1] | {"reasoning_content": "A greeting."}, TURNS[0], TURNS[5]]
    rows = rows_from_objects([{"messages": messages}], origin="test")
    with pytest.raises(DataError, match="renders turn 2 differently"):
        encode(rows[0], tokenizer, template="tokenizer")
    (last,) = as_learned(rows, "last-turn", SPANS)
    marked = marked_text(encode(last, tokenizer, template="tokenizer"), tokenizer)
    assert marked.count("⟦") == 1
    assert marked.endswith("Yes, open.<|im_end|>⟧")


REASONED = [TURNS[0], TURNS[1] | {"reasoning_content": "A greeting. Hi"}]


def reasoned(tiny_llama: Path, *, reasoning: bool, path: Path) -> str:
    """A row as the model learns it, read again from the file that the training reads."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = QWEN3
    rows = rows_from_objects([{"messages": REASONED}], origin="test")
    write_rows(path, list(as_learned(rows, "every-turn", SPANS, reasoning=reasoning)))
    (row,) = read_rows(path)
    assert row.messages[1].content == rows[0].messages[1].content  # the row is still the same row
    return marked_text(encode(row, tokenizer, template="tokenizer"), tokenizer)


def test_reasoning_is_learned_or_read(tiny_llama: Path, tmp_path: Path) -> None:
    whole = reasoned(tiny_llama, reasoning=True, path=tmp_path / "train.jsonl")
    assert whole.endswith("assistant\n⟦<think>\nA greeting. Hi\n</think>\n\nHi<|im_end|>⟧")
    behind = reasoned(tiny_llama, reasoning=False, path=tmp_path / "train.jsonl")
    assert behind.endswith("assistant\n<think>\nA greeting. Hi\n</think>\n\n⟦Hi<|im_end|>⟧")


@pytest.mark.parametrize("words", ["Monday", "think", "end"])
def test_words_behind_reasoning_are_learned_whole_whatever_else_holds_them(tiny_llama: Path, words: str) -> None:
    """The call's arguments hold the first, the template's tags the others."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = QWEN3
    answer = CALL | {"content": words, "reasoning_content": "I must look.", "reasoning_weight": 0}
    (row,) = rows_from_objects([{"messages": [TURNS[0], answer]}], origin="test")
    marked = marked_text(encode(row, tokenizer, template="tokenizer"), tokenizer)
    assert f"</think>\n\n⟦{words}\n<tool_call>" in marked


def test_a_call_without_words_has_nothing_behind_its_reasoning(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = QWEN3
    messages = [TURNS[0], CALL | {"reasoning_content": "I must look.", "reasoning_weight": 0}]
    (row,) = rows_from_objects([{"messages": messages}], origin="test")
    with pytest.raises(DataError, match="shows no words of the answer behind it"):
        encode(row, tokenizer, template="tokenizer")


def test_a_weight_of_reasoning_that_means_nothing_is_refused() -> None:
    messages = [TURNS[0], TURNS[1] | {"reasoning_content": "A greeting.", "reasoning_weight": 0.5}]
    with pytest.raises(DataError, match=r"has reasoning_weight 0\.5; expected 0"):
        rows_from_objects([{"messages": messages}], origin="test")


def test_rows_of_data_evaluation_are_learned_from_as_the_others(tmp_path: Path) -> None:
    """Validation encodes them too: a template that rewrites earlier turns would stop it."""
    answer = TURNS[5] | {"reasoning_content": "It is Monday."}
    for name, word in (("rows", "Open"), ("frozen", "Still there")):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"messages": [*TURNS[:2], ask(f"{word} {i}?"), answer]}) + "\n" for i in range(3))
        )
    frozen: dict[str, Any] = {"source": "path:frozen.jsonl", "sha256": "0" * 64}
    asked = {"learned": "last-turn", "learned_reasoning": False, "evaluation_rows": 0, "evaluation": frozen}
    section = Data.model_validate_json(json.dumps({"source": "path:rows.jsonl", "max_tokens": 64} | asked))
    source = FetchedSource(section.all_sources[0], (("rows.jsonl", tmp_path / "rows.jsonl"),))
    other = FetchedSource(EvaluationRows(**frozen), (("frozen.jsonl", tmp_path / "frozen.jsonl"),))
    split = prepare_rows(section, [source], other, root=tmp_path, out=tmp_path).split
    for row in (*split.training, *split.evaluation):
        assert [message.supervised for message in row.messages] == [False, False, False, True]
        assert row.messages[3].fields["reasoning_weight"] == 0


def ask(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_is_learned_in_green(monkeypatch: pytest.MonkeyPatch) -> None:
    report = ValidationReport(None, None, (), "a⟦b⟧", (("a", False), ("b", True)), "", ())  # type: ignore[arg-type]
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert in_colours(report) == "a⟦b⟧"
    monkeypatch.setattr("sys.stderr", Terminal())
    assert in_colours(report) == "a\033[32mb\033[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert in_colours(report) == "a⟦b⟧"
