"""Streamed text is the whole text, cut anywhere; and a stop string is found wherever its tokens end."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from graftline.serve.generation import TextStream
from graftline.serve.token_bytes import TokenBytes
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def stream(tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    out = TextStream(TokenBytes(tokenizer), stop)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False).input_ids:
        pieces.append(out.push(token))
        if out.stopped:
            return pieces, out
    return [*pieces, out.finish()], out


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8"), max_size=30))
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    expected = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=True)
    assert "".join(stream(tokenizer, text)[0]) == expected


def test_a_character_of_several_tokens_comes_as_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = [piece for piece in stream(tokenizer, "aé漢😀b")[0] if piece]
    assert pieces == ["a", "é", "漢", "😀", "b"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("ab \n", max_size=20), stop=st.text("ab \n", min_size=1, max_size=4))
def test_a_stop_string_cuts_where_the_whole_text_would_be_cut(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: str
) -> None:
    pieces, out = stream(tokenizer, text, (stop,))
    assert out.stopped == (stop in text)
    assert "".join(pieces) == text.partition(stop)[0]


def test_of_several_stop_strings_the_one_that_is_complete_first_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, _ = stream(tokenizer, "one. two! three", ("three", "!", "two! th"))
    assert "".join(pieces) == "one. two"


def test_nothing_of_a_stop_string_is_shown_before_it_is_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    pieces, out = stream(tokenizer, "yes\nUser: no", ("\nUser:",))
    assert all("\n" not in piece for piece in pieces)
    assert "".join(pieces) == "yes"
    assert out.finish() == ""


def test_special_tokens_are_not_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert "".join(stream(tokenizer, "a<|im_end|>b")[0]) == "ab"
