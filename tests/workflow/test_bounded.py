import pytest

from graftline.workflow.comment import clip, clip_pair, cut, size


def test_what_fits_is_left_as_it_is() -> None:
    assert cut(["a", "b"], 4) == ["a", "b"]


def test_what_does_not_fit_is_counted() -> None:
    kept = cut([f"line {i}" for i in range(100)], 200)

    assert size(kept) <= 200
    assert kept[0] == "line 0"
    assert kept[-1] == f"*{100 - (len(kept) - 2)} more lines are in the run's files.*"


@pytest.mark.parametrize(
    "opening",
    [["```"], ["````text", "```"], ["~~~"], ["<details><summary>x</summary>", ""], ["<details>", "<details>"]],
)
def test_what_is_open_at_the_cut_is_closed(opening: list[str]) -> None:
    kept = cut([*opening, *["| a | b |"] * 1000], 300)
    body = kept[:-2]

    fences = [line for line in body if line.startswith(opening[0][:3])]
    if opening[0].startswith("<"):
        assert sum(line.count("<details") for line in body) == sum(line.count("</details>") for line in body)
    else:
        assert body[-1] == opening[0].removesuffix("text") == fences[-1]
    assert size(kept) <= 300


def test_what_was_closed_is_not_closed_again() -> None:
    kept = cut(["```", "<details>", "```", "<details>", "</details>", *["x"] * 1000], 200)

    assert kept.count("```") == 2
    assert kept.count("</details>") == 1


def test_bytes_are_counted_and_no_character_is_cut_in_half() -> None:
    assert clip("▁" * 10, 12) == "▁▁▁…"
    assert clip("abc", 3) == "abc"
    assert size(["▁"]) == 4


def test_one_endless_line_is_cut() -> None:
    assert size(cut(["x" * 1_000_000], 5_000)) <= 5_000


def test_two_long_values_are_cut_where_they_differ() -> None:
    same = "label, " * 200
    old, new = clip_pair(same + "cat", same + "dog", 100)

    assert old.endswith("cat")
    assert new.endswith("dog")
    assert max(size([old]), size([new])) <= 104
    assert clip_pair("a", "b", 100) == ("a", "b")
    assert clip_pair("cat", "cat" * 200, 60)[0] == "cat"
