"""Data Docs that can be read without a network."""

import errno
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest

from graftline.data.expectations import make_self_contained, run_expectations
from graftline.errors import DataError
from tests.sections import check_section

EVIL = "<script>alert(1)</script><img src=https://example.org/x>"


class Page(HTMLParser):
    """Tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    frame = pandas.DataFrame(
        {"line": [1, 7], "prompt": ["a", EVIL], "completion": ["x", "x"], "supervised_tokens": [1, 1]}
    )
    short = check_section("expect_column_value_lengths_to_be_between", {"column": "prompt", "max_value": 3})
    run_expectations({"training": frame, "evaluation": frame[:1]}, [short], site=folder)
    return folder


def test_no_page_loads_anything_or_runs_a_script(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == 4
    for path in pages:
        page = Page(path.read_text(encoding="utf-8"))
        names = {tag for tag, _ in page.tags}
        assert not names & {"script", "link", "img", "iframe", "footer"}
        assert any("default-src 'none'" in (given.get("content") or "") for tag, given in page.tags if tag == "meta")
    assert {path.suffix for path in site.rglob("*") if path.is_file()} == {".html"}


def test_every_link_leads_to_a_page(site: Path) -> None:
    checked = 0
    for path in site.rglob("*.html"):
        for tag, given in Page(path.read_text(encoding="utf-8")).tags:
            target = given.get("href") or ""
            if tag == "a" and target and not target.startswith("#"):
                assert (path.parent / target).is_file(), f"{path} -> {target}"
                checked += 1
    assert checked >= 5


def test_the_index_says_which_side_meets_the_suite(site: Path) -> None:
    text = re.sub(r"\s+", " ", Page((site / "index.html").read_text(encoding="utf-8")).text)
    assert "training✗ not met3 of 4results" in text
    assert "evaluation✓ met4 of 4results" in text


def test_the_row_at_fault_is_shown_by_line_and_as_text(site: Path) -> None:
    page = next(site.rglob("rows-training.html")).read_text(encoding="utf-8")
    assert "1 unexpected values found" in Page(page).text
    assert re.search(r">\s*7\s*<", page)
    assert EVIL in Page(page).text


def test_a_page_that_cannot_be_made_is_an_error_and_not_a_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from great_expectations.data_context.store import tuple_store_backend

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tuple_store_backend.TupleFilesystemStoreBackend, "_set", refuse)
    with pytest.raises((DataError, OSError), match="No space left on device"):
        run_expectations({"training": pandas.DataFrame({"line": [1]})}, [], site=tmp_path / "site")
    assert "Traceback" not in caplog.text
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("page", ["expectations/rows.html", "validations/**/rows-training.html"])
@pytest.mark.parametrize("left", [0, 200])
def test_a_page_that_a_full_disk_cut_or_never_had_is_told(page: str, left: int, site: Path, tmp_path: Path) -> None:
    """Great Expectations logs such an error and goes on."""
    shutil.copytree(site, tmp_path / "site")
    checks = run_expectations({"training": pandas.DataFrame({"line": [1]})}, [], site=tmp_path / "other")
    (cut,) = (tmp_path / "site").glob(page)
    if left:
        cut.write_bytes(cut.read_bytes()[:left])
    else:
        cut.unlink()
    with pytest.raises(DataError, match="did not write all of its pages"):
        make_self_contained(tmp_path / "site", checks)
