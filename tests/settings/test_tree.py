import pytest

from graftline.errors import ConfigError
from graftline.settings.tree import MAX_BYTES, read_tree


def value_of(text: str) -> object:
    return read_tree(text.encode(), "p.yaml").value


def test_lines_are_those_of_keys_and_items() -> None:
    tree = read_tree(b"a:\n  b: 1\n  c:\n    - x\n    - y\n", "p.yaml")

    assert tree.lines[("a", "b")] == 2
    assert tree.lines[("a", "c", 1)] == 5


def test_values_follow_yaml_1_2() -> None:
    text = "{a: 5e-4, b: yes, c: 0o17, d: 0x10, e: ~, f: 1_000, g: 2026-01-01, h: true, i: 1:30}"

    assert value_of(text) == {
        "a": 0.0005,
        "b": "yes",
        "c": 15,
        "d": 16,
        "e": None,
        "f": 1000,
        "g": "2026-01-01",
        "h": True,
        "i": "1:30",
    }


def test_a_byte_order_mark_is_accepted() -> None:
    assert read_tree(b"\xef\xbb\xbfa: 1", "p.yaml").value == {"a": 1}


def test_an_alias_gives_the_same_value_and_the_line_where_it_is_written() -> None:
    tree = read_tree(b"a: &x\n  b: 1\nc: *x\n", "p.yaml")

    assert tree.value == {"a": {"b": 1}, "c": {"b": 1}}
    assert tree.lines[("c", "b")] == 2


def test_own_keys_win_over_merged_ones_and_the_first_merged_mapping_over_the_second() -> None:
    text = "a: &a {k: 1, l: 1}\nb: &b {k: 2, m: 2}\nc: {<<: [*a, *b], l: 3}\nd: {l: 3, <<: *a}\n"

    value = value_of(text)

    assert value["c"] == {"k": 1, "l": 3, "m": 2}  # type: ignore[index]
    assert value["d"] == {"k": 1, "l": 3}  # type: ignore[index]


def test_a_quoted_merge_key_is_a_plain_key() -> None:
    assert value_of("{'<<': 1}") == {"<<": 1}


REFUSED = [
    ("a: 1\nb: 2\na: 3", 3, "key 'a' is given twice, first on line 1; keep one"),
    ("a: {b: 1, b: 1}", 1, "key 'b' is given twice"),
    ("a: !!python/object/apply:os.system [ls]", 1, "tag tag:yaml.org,2002:python/object/apply:os.system was given"),
    ("a: !custom 1", 1, "tag !custom was given; expected plain values; remove the tag"),
    ("a: !!binary aGk=", 1, "tag tag:yaml.org,2002:binary was given"),
    ("a: &a [*a]", 1, "aliases expand"),
    ("a: &a {<<: *a}", 1, "a mapping merges itself"),
    ("a: {<<: 3}", 1, "`<<` takes a mapping or a list of mappings"),
    ("x: 1\na: *nothing", 2, "found undefined alias"),
    ("[" * 10_000, 1, "nested deeper than 24 levels"),
    ("a: " + "{b: " * 30 + "1" + "}" * 30, 1, "nested deeper than 24 levels"),
    ("a: .inf", 1, ".inf is not a finite number"),
    ("a: .nan", 1, ".nan is not a finite number"),
    ("a: " + "9" * 5000, 1, "cannot be read as int"),
    ('a: "\\ud800"', 1, "cannot be read as str"),
    ("1: x", 1, "key 1 is not text; put it in quotes"),
    ("true: x", 1, "key true is not text; put it in quotes"),
    ("? [a]\n: 1", 1, "key a list or mapping is not text"),
    ("a: 1\n---\nb: 2", 2, "a second document starts here"),
    ("%YAML 1.1\n---\na: yes", 2, "a % directive was given"),
    ("a: b: c", 1, "not YAML: mapping values are not allowed here"),
    ("a: [1, 2", 1, "not YAML"),
    ("a:\n\t- 1", 2, "not YAML"),
    ("", 1, "the file is empty; `graftline init NAME` makes a project with a commented one"),
    ("# only a comment\n", 1, "the file is empty"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_not_plain_yaml_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        value_of(text)

    assert str(caught.value).startswith(f"p.yaml:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: \xff", "p.yaml:1: byte 3 is not UTF-8"),
        ("a: 1".encode("utf-16"), "p.yaml:1: byte 0 is not UTF-8"),
        (b"x: 1\na: \x00", "not YAML: unacceptable character"),
        (b"#" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes; expected at most {MAX_BYTES}"),
    ],
)
def test_bytes_that_are_no_text_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_tree(data, "p.yaml")

    assert message in str(caught.value)


def test_a_billion_laughs_are_refused_before_they_take_memory() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]

    with pytest.raises(ConfigError, match=r"aliases expand to more than 5\d{4} values"):
        value_of("\n".join(lines))


def test_merge_keys_cannot_multiply_keys_without_bound() -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(300)) + "}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12)]

    with pytest.raises(ConfigError, match=r"aliases expand to more than 5\d{4} values"):
        value_of("\n".join(lines))


def test_a_thousand_pipelines_that_share_sections_are_read() -> None:
    shared = "shared: &shared {" + ", ".join(f"key{i}: {i}" for i in range(50)) + "}\n"
    own = "".join(
        f"p{i}:\n  own: {{a: 1, b: 2, c: 3, d: 4, e: 5, f: 6, g: 7, h: 8}}\n  all: *shared\n" for i in range(2000)
    )
    assert len(read_tree((shared + own).encode(), "pipelines.yaml").value) == 2001
