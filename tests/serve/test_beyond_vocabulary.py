"""A tokenizer with more tokens than the model has rows: a request that needs them is refused, others are answered."""

from pathlib import Path

import pytest

from graftline.data.rows import Message
from graftline.errors import ServingError
from graftline.serve.served_base import Base, Runtime
from tests.tiny import make_tiny_llama


def test_a_prompt_with_tokens_that_the_model_lacks_is_refused_by_number(tmp_path: Path) -> None:
    base = Base(make_tiny_llama(tmp_path / "base", vocab_size=260), Runtime(graphs=tmp_path / "graphs", num_threads=1))
    assert base.encode_text("0 1")
    with pytest.raises(ServingError, match=r"token \d+ is not in the vocabulary of 260"):
        base.encode_text("the quick brown fox")
    with pytest.raises(ServingError, match=r"token \d+ is not in the vocabulary of 260"):
        base.encode_chat([Message("user", "the quick brown fox", supervised=False)], "tokenizer")
