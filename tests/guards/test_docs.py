"""The documentation is what is there: trees, links, commands."""

import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from graftline.plan.memory import HEAP_WASTE

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


def test_the_page_of_files_is_current() -> None:
    code = "import runpy; print(runpy.run_path('docs/tree.py')['render'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "tree.md").read_text() == done.stdout, "run `make docs`"


def test_links_lead_somewhere() -> None:
    links = [(page, link) for page in PAGES for link in LINK.findall(page.read_text(encoding="utf-8"))]
    assert len(links) > 100
    missing = [f"{page.relative_to(ROOT)}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not missing, "\n".join(missing)


def test_the_readme_tree_names_what_is_there() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.strip().splitlines() if not line.startswith(" ")}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    # A file that is not committed yet is no part of the project.
    there = {name.split("/")[0] for name in filter(None, listed.split("\0"))} or {path.name for path in ROOT.iterdir()}
    hidden = {name for name in there if name.startswith(".")} | {"dvc.lock"}
    assert named == there - hidden


def test_the_readme_tree_names_every_part_of_the_library() -> None:
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    named = set(re.findall(r"^  (\w+)/", tree, flags=re.M))
    parts = {path.parent.name for path in (ROOT / "graftline").glob("*/__init__.py")}
    assert parts <= named


def test_every_page_is_listed_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    unlisted = [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text]
    assert not unlisted


def test_make_targets_in_the_docs_exist() -> None:
    targets = re.findall(r"^([a-z0-9.%-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    used = {name for page in PAGES for name in re.findall(r"`make ([a-z0-9.-]+)", page.read_text(encoding="utf-8"))}
    patterns = [target.replace("%", "*") for target in targets]
    assert {name for name in used if not any(fnmatchcase(name, pattern) for pattern in patterns)} == set()


def test_the_page_of_memory_tables_is_current() -> None:
    code = "import runpy; print(runpy.run_path('docs/make_memory.py')['render'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (ROOT / "docs" / "memory-tables.md").read_text() == done.stdout, "run `make docs`"


def test_the_planner_has_the_waste_that_was_measured() -> None:
    measured = json.loads((ROOT / "studies" / "results" / "memory.json").read_text())
    assert measured["measured"]["heap_waste"] == HEAP_WASTE


def test_each_cell_of_the_threat_table_is_shown_by_tests_that_exist() -> None:
    """A cell without a number must say that there is nothing to show: not possible, possible, or as the cell before."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    section = page.split("## Who can do what")[1].split("\n## ")[0]
    _, _, *rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [cell.strip() for row in rows for cell in row[1:]]
    numbered = [re.findall(r"\((\d[\d, ]*)\)", cell) for cell in cells]
    bare = [cell for cell, numbers in zip(cells, numbered, strict=True) if not numbers]
    assert [cell for cell in bare if not cell.startswith(("–", "the same", "yes", "**yes**", "by load"))] == []

    listed = dict(re.findall(r"^(\d+)\. (.*(?:\n    .*)*)", section, flags=re.M))
    used = {number for found in numbered for numbers in found for number in numbers.split(", ")}
    assert used == set(listed)
    for number, tests in listed.items():
        folder = next(iter(re.findall(r"(tests/\w+)/\w+\.py", tests)), "tests/registry")
        files = re.findall(r"(?<!/)\b(?:tests/[\w/]+/)?test_\w+\.py", tests)
        files = [name if "/" in name else f"{folder}/{name}" for name in files] or ["tests/registry/test_trust.py"]
        there = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in files)
        for name in re.findall(r"`(test_\w+)(?:…)?`", tests):
            assert re.search(rf"^def {name}", there, flags=re.M), f"{number}: {name} is not in {files}"
