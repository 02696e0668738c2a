"""The documentation site: built strictly, it has every page and asks nothing of another host."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import graftline

ROOT = Path(__file__).resolve().parents[1]
FETCHED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("link", "href")}
"""Attributes that a browser fetches by itself."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install '.[docs]'"
    ),
]


class Fetched(HTMLParser):
    """Addresses that a page makes the browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("rel") not in ("canonical", "prev", "next"):
            self.addresses += [value for name, value in attrs if (tag, name) in FETCHED and value]


def build(root: Path, site: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(sources) > 20
    assert [path for path in sources if not (site / path).is_file()] == []
    assert "graftline" in (site / "index.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.py"))


def test_the_reference_has_every_public_verb(site: Path) -> None:
    text = (site / "api.html").read_text(encoding="utf-8")
    sections = {"Adapter", "Evaluate", "Gate", "Quantize", "Train"}  # described in configuration.md
    missing = [name for name in sorted({*graftline.__all__} - sections) if f'id="graftline.{name}"' not in text]
    assert missing == []


def test_no_page_fetches_anything_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        assert [address for address in parser.addresses if re.match(r"(https?:)?//", address)] == [], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(['\"]?https?://", style.read_text(encoding="utf-8")), style


def test_links_to_source_files_lead_to_the_repository_where_its_address_is_known(tmp_path: Path) -> None:
    done = build(
        ROOT,
        tmp_path / "site",
        GITHUB_SERVER_URL="https://git.example.org",
        GITHUB_REPOSITORY="team/graftline",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert 'href="https://git.example.org/team/graftline/blob/main/graftline/api.py"' in text


def test_a_broken_link_and_an_unlisted_page_stop_the_build(tmp_path: Path) -> None:
    for name in ("docs", "graftline"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "docs" / "unlisted.md").write_text("# Nobody\n\n[finds](#this)\n", encoding="utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "unlisted.md" in done.stdout + done.stderr
