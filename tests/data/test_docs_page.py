"""Every piece of Python on docs/data.md runs, in order, and every check named there exists."""

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from graftline.data.checks import check_encoded, check_leakage, check_texts
from graftline.data.encoding import encode_rows
from graftline.data.rows import FORMATS, rows_from_objects
from graftline.data.template import TEMPLATES
from tests.tiny import make_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_code_on_the_page_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    printed = capsys.readouterr().out
    shown = re.search(r"```\n(Definition.*?)```", PAGE, re.DOTALL)
    assert shown is not None
    assert shown.group(1) in printed
    assert "80 20\n" in printed
    assert (tmp_path / "validate" / "data_docs" / "index.html").is_file()


def test_the_page_names_every_format_template_and_check(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = rows_from_objects([{"prompt": "a", "completion": "b"}], origin="test")
    encoded = encode_rows(rows, tokenizer, template="none", max_tokens=9, overlength="error")
    checks = [
        *check_encoded("training", encoded, tokenizer, template="none"),
        *check_texts("training", rows, labels=["b"]),
    ]
    named = {check.name for check in (*checks, check_leakage(rows, rows))}
    listed = set(re.findall(r"^\| `?([a-z-]+(?: [a-z]+)*)`? \|", PAGE, re.MULTILINE))
    assert named | set(FORMATS) | set(TEMPLATES) <= listed
