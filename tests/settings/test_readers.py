"""What we read in pipelines.yaml, DVC reads; what it does not is refused with the line and the remedy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from graftline.errors import ConfigError
from graftline.settings import narrowed
from graftline.settings.channels import Document
from graftline.settings.model import Pipeline
from graftline.settings.tree import check_read_alike, read_tree
from tests.settings.documents import RIGHT, changed, read

ROOT = Path(__file__).parents[2]
REMEDY = r'put the text in quotes \(source: "path:rows.jsonl", starts: "2026-12-24T00:00:00Z"\)'


def accept(data: bytes) -> Any:
    """The value, if every reader is said to read it alike."""
    tree = read_tree(data, "p.yaml")
    check_read_alike(data, tree, "p.yaml")
    return tree.value


@pytest.mark.parametrize(
    "text",
    [
        "{source: path:rows.jsonl}",
        "{x: s3:bucket/key}",
        "[a, hf:b/c, d]",
        "{b: https://x}",
        "[::1]",
        "{b:}",
        "{a:1}",
        "{x: a?b}",
        "{starts: 2026-12-24T00:00:00Z}",
        "2026-12-24T00:00:00Z",
        "2026-12-24",
        "2026-13-45",
        "2001-01-01 10:00:00",
        "=",
        "<<",
        "&x.y b",
        "&é b",
    ],
)
def test_what_stops_dvc_is_refused_with_its_line_and_the_remedy(text: str, tmp_path: Path) -> None:
    data = f"first: 1\na: {text}\n"
    with pytest.raises(ConfigError, match=rf"^p\.yaml:2: DVC cannot read this line: .*{REMEDY}$"):
        accept(data.encode())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x 1\nb: &x 2\nc: *x\n", r"&x is given twice, first on line 1; give each its own name"),
        ("a: &x {p: 1}\nb: {<<: *x, <<: {q: 1}}\n", r"`<<` is given twice, first on line 2; write `<<: \[\*one, "),
    ],
)
def test_what_libyaml_refuses_to_be_given_twice_is_told_as_that(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^p\.yaml:2: {told}"):
        accept(text.encode())


def test_config_check_looks_at_both_readers() -> None:
    window = "[{starts: 2026-12-24T00:00:00Z, ends: 2027-01-02T00:00:00Z, reason: holidays}]"
    data = changed().decode().replace('"staging": {}', f'"staging": {{"freeze_windows": {window}}}')
    with pytest.raises(ConfigError, match=r"pipelines\.yaml:\d+: DVC cannot read this line"):
        read(data.encode())

    quoted = re.sub(r"(\d{4}-[^,}]+Z)", r'"\1"', data)
    assert read(quoted.encode()).document.channels["staging"].freeze_windows[0].starts.year == 2026


NUMBERS = (
    "0o17 017 0x1f 1_000 1:30 12:30:45 1e-3 1.e3 .5 +1 -0 0b11 08.5 1__0 _1 1,000 -1 123456789012345678901234567890"
)
WORDS = "on yes n TRUE ~ null '1' x#c {b} http://x path:rows.jsonl a::b {} [] '' ${b} '${b}' 😀 '2026-12-24' \"=\" '<<'"
SPACED = ("", "x #c", "{b: 1,}", "{0-7: 4}", "{a.b: 4}", "{'1': 2}", "'a: b'", r'"x\ty"', r'"a\u2028b"', "x" * 5000)
NESTED = ("|\n  x\n  y", ">-\n  x\n  y", "&x {b: 1}\nc: {<<: *x, d: 2}", "&x [1]\nc: *x")


@pytest.mark.parametrize("text", [*NUMBERS.split(), *WORDS.split(), *SPACED, *NESTED])
@pytest.mark.parametrize("form", ["{}", "\ufeff{}", "---\n{}\n...\n"])
def test_what_is_accepted_dvc_reads_as_we_do(text: str, form: str, tmp_path: Path) -> None:
    data = form.format(f"a: {text}\nlast: 1\n")
    (tmp_path / "p.yaml").write_text(data, encoding="utf-8")
    assert repr(accept(data.encode())) == repr(load_yaml(str(tmp_path / "p.yaml")))


PLAIN = st.text(st.sampled_from("ab01:-+._eoxn{}[],#&*!|>'\"%@`?=<~ \t\n\\\x85\u2028é😀TZ/$"), max_size=12)


@settings(max_examples=400, deadline=2000)
@given(PLAIN, st.sampled_from(["a: {}\n", "a: {{b: {}, c: 1}}\n", "a: [1, {}]\n", "a:\n- {}\n- 1\n", "{}: 1\n"]))
def test_any_text_that_is_accepted_is_read_alike(text: str, form: str) -> None:
    data = form.format(text)
    try:
        value = accept(data.encode())
    except ConfigError:
        return
    assert repr(value) == repr(YAML(typ="safe").load(data))


def document(license: str) -> bytes:
    data = changed(**{"demo.data.license": license})
    return (
        json.dumps(json.loads(data), ensure_ascii=False, indent=1)
        .replace("\u2028", "\\u2028")
        .replace("\x85", "\\x85")
        .encode()
    )


TEXTS = (
    *(
        "1e-3",
        "1_000",
        "0o7",
        "yes",
        "~",
        "null",
        "",
        " a ",
        "a\nb\n",
        "a\r\nb",
        "a: b",
        "- a",
        "=",
        "<<",
        "---",
        "#",
        "'\"",
    ),
    *("2026-01-01", "1:30", "${b}", "😀", "a\u2028b", "\ufeffa", "a\tb", "\x1b", "word " * 500, "{a}", "*a"),
)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_written_back_reads_as_it_was(text: str, tmp_path: Path) -> None:
    data = document(text)
    written = narrowed(data, ["demo"], "pipelines.yaml")
    (tmp_path / "pipelines.yaml").write_text(written, encoding="utf-8", newline="")

    before = read_tree(data, "pipelines.yaml").value
    assert repr(read_tree(written.encode(), "pipelines.yaml").value) == repr(before)
    assert repr(load_yaml(str(tmp_path / "pipelines.yaml"))) == repr(before)


def test_what_is_written_back_keeps_numbers_and_the_order_of_keys() -> None:
    bits = {"9-9": 4, "0-8": 2, ".*": 3}
    data = changed(**{"demo.quantize": {"method": "mixed", "bits": bits}, "demo.train.learning_rate": 1e-05})
    written = read_tree(narrowed(data, ["demo"], "pipelines.yaml").encode(), "pipelines.yaml").value

    assert list(written["pipelines"]["demo"]["quantize"]["bits"].items()) == list(bits.items())
    assert repr(written["pipelines"]["demo"]["train"]["learning_rate"]) == "1e-05"
    assert list(written["pipelines"]["demo"]) == list(RIGHT["pipelines"]["demo"])


def test_only_the_named_pipelines_are_written_back() -> None:
    data = changed(**{"pipelines.other": RIGHT["pipelines"]["demo"], "pipelines.on": RIGHT["pipelines"]["demo"]})
    written = read_tree(narrowed(data, ["on", "demo"], "pipelines.yaml").encode(), "pipelines.yaml").value
    assert list(written["pipelines"]) == ["on", "demo"]
    assert written["channels"] == RIGHT["channels"]

    with pytest.raises(ConfigError, match="pipeline nobody is not in it; expected some of demo, other, on"):
        narrowed(data, ["nobody"], "pipelines.yaml")


def test_an_old_line_end_that_dvcs_lock_file_would_lose_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"pipelines\.yaml:\d+: 'a\\x85b' holds U\+0085"):
        read(document("a\x85b"))


def test_a_character_written_as_two_halves_is_refused_with_what_to_write() -> None:
    with pytest.raises(ConfigError, match=r"pipelines\.yaml:\d+: '.*' cannot be read as str: half a character; write"):
        read(changed(**{"demo.data.license": "\U0001f600"}))


def _examples() -> list[tuple[str, str]]:
    """YAML of pipelines.yaml in the documentation: with its sections, or those of a pipeline."""
    known = set(Document.model_fields) | set(Pipeline.model_fields)
    found = []
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        for number, block in enumerate(re.findall(r"```ya?ml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            keys = set(re.findall(r"^ *([a-z_]+):", block, re.MULTILINE))
            if keys & known:
                found.append((f"{page.name}-{number}", block))
    return found


def test_the_documentation_has_examples() -> None:
    assert len(_examples()) >= 6


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in _examples()])
def test_every_example_of_the_documentation_is_read_alike(block: str) -> None:
    accept(block.encode())


def test_the_documented_policies_of_channels_are_right() -> None:
    blocks = [block for name, block in _examples() if name.startswith("promotion.md")]
    documented = [read_tree(block.encode(), "promotion.md").value["channels"] for block in blocks]
    reserve = {"demo.data.reserve_rows": 300}
    found = [
        read(changed(**(reserve if "reserve" in channels["production"] else {}), channels=channels))
        for channels in documented
    ]
    production = [config.channels["production"] for config in found]
    assert "holidays" in {window.reason for channel in production for window in channel.freeze_windows}
    assert "GRAFTLINE_WEBHOOK_SECRET" in {webhook.secret for channel in production for webhook in channel.webhooks}
