"""Tokens' bytes join to the text's for byte-level and for byte-fallback tokenizers, whatever the tokens."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from graftline.data.answer_parts import Said
from graftline.serve.answers import ChatForm, CompletionForm, Piece, TextOffsets
from graftline.serve.generation import SampledToken, TextStream
from graftline.serve.token_bytes import TokenBytes
from tests.tiny import make_tokenizer

TEXT = "a é 漢 😀 🙂🙂 end"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: pieces with "▁" for a blank, and bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aend", "▁a", "é", "漢"]
    core = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


Make = Callable[[], PreTrainedTokenizerFast]


@pytest.fixture(scope="module", params=["byte level", "byte fallback"])
def tokenizer(request: pytest.FixtureRequest, byte_level: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return byte_level if request.param == "byte level" else make_byte_fallback()


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    joined = b"".join(TokenBytes(tokenizer).of(token) for token in tokens)
    assert joined.decode().strip() == TEXT  # SentencePiece puts a blank before a text
    assert len({len(TokenBytes(tokenizer).of(token)) for token in tokens}) > 1


def test_added_tokens_are_their_own_bytes_and_unknown_ids_have_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.add_tokens(["<é tool>"])
    token = tokenizer.convert_tokens_to_ids("<é tool>")
    assert TokenBytes(tokenizer).of(token) == "<é tool>".encode()
    assert TokenBytes(tokenizer).is_text(token)
    assert not TokenBytes(tokenizer).is_text(tokenizer.eos_token_id)
    assert TokenBytes(tokenizer).of(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    assert TokenBytes(tokenizer).of(1_000_000) == b""


def test_parts_of_characters_are_written_as_openai_does_and_never_meet(tokenizer: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(tokenizer)
    tokens = tokenizer("😀", add_special_tokens=False).input_ids[-4:]
    assert [token_bytes.text(token) for token in tokens] == [
        "bytes:\\xf0",
        "bytes:\\x9f",
        "bytes:\\x98",
        "bytes:\\x80",
    ]
    texts = [token_bytes.text(token) for token in range(len(tokenizer))]
    contents = [token_bytes.of(token) for token in range(len(tokenizer))]
    assert len(set(texts)) == len(set(contents))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_stream_to_what_they_decode_to(byte_level: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, len(byte_level) - 1), max_size=30))
    out = TextStream(TokenBytes(byte_level))
    assert "".join([*map(out.push, tokens), out.finish()]) == byte_level.decode(tokens, skip_special_tokens=True)


def test_special_tokens_that_a_reader_needs_are_part_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(tokenizer)
    end = token_bytes.special([tokenizer.eos_token, "a"])
    assert end == {tokenizer.eos_token_id}
    tokens = [*tokenizer("a", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    for shown, ending in ((frozenset[int](), "a"), (end, f"a{tokenizer.eos_token}")):
        out = TextStream(token_bytes, shown=shown)
        assert "".join([*map(out.push, tokens), out.finish()]).strip() == ending


def test_bytes_that_make_no_character_are_shown_at_once_and_cost_the_same_each(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tokenizer("😀", add_special_tokens=False).input_ids[-3]  # a byte that begins nothing
    sizes: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **given: sizes.append(len(ids)) or decode(ids, **given))
    out = TextStream(TokenBytes(tokenizer))
    pieces = [out.push(part) for _ in range(200)]
    assert max(sizes, default=0) <= 8
    assert "".join(pieces[:100]).count("\N{REPLACEMENT CHARACTER}") >= 96


def exchange_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    return SimpleNamespace(served=SimpleNamespace(base=SimpleNamespace(token_bytes=TokenBytes(tokenizer))))


def test_logprobs_of_a_characters_parts_put_it_together(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer("🙂", add_special_tokens=False).input_ids[-4:]
    choices = [SampledToken(token, -0.5, ((token, -0.5), (tokens[0], -1.0), (0, float("-inf")))) for token in tokens]
    content = ChatForm(with_logprobs=True)._logprobs(exchange_of(tokenizer), choices)["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "🙂"
    assert bytes(byte for one in content for byte in one["top_logprobs"][0]["bytes"]).decode() == "🙂"
    assert content[0]["top_logprobs"][-1]["logprob"] == -9999.0  # JSON has no infinity


def test_alternatives_that_are_parts_of_characters_are_all_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, third = tokenizer("🙂", add_special_tokens=False).input_ids[-4:-1]
    choice = SampledToken(first, -0.1, ((first, -0.1), (second, -0.2), (third, -0.3)))
    piece = Piece(Said(), (choice,), None)
    logprobs = CompletionForm(with_logprobs=True)._whole_choice(exchange_of(tokenizer), piece)["logprobs"]
    assert sorted(logprobs["top_logprobs"][0].values()) == [-0.3, -0.2, -0.1]


def test_offsets_count_characters_of_the_text_over_all_of_a_stream(byte_level: PreTrainedTokenizerFast) -> None:
    tokens = byte_level("é😀 a", add_special_tokens=False).input_ids
    tokens.insert(0, byte_level.eos_token_id)  # not part of the text
    form, exchange = CompletionForm(with_logprobs=True), exchange_of(byte_level)
    found = [
        form._whole_choice(exchange, Piece(Said(), (SampledToken(token, -1.0),), None))["logprobs"]["text_offset"][0]
        for token in tokens
    ]
    token_bytes, offsets, text = TokenBytes(byte_level), TextOffsets(), b""
    for token, offset in zip(tokens, found, strict=True):
        assert offset == offsets.before(token_bytes, token) == len(text.decode(errors="ignore"))
        text += token_bytes.of(token) if token_bytes.is_text(token) else b""
    assert found[-1] == 3 - (len(token_bytes.of(tokens[-1])) - 1)
