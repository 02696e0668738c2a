import ast
from pathlib import Path

import pytest

from graftline.digest import of_file
from graftline.settings import RowSource
from graftline.workflow import pinned_sources
from graftline.workflow.script import parts, parts_in, syntax_tree


def made_of(files: dict[str, str], script: str = "scripts/rows.py") -> list[str]:
    return parts(script, is_file=files.__contains__, read=lambda path: files[path].encode())


def test_a_script_alone_is_made_of_itself() -> None:
    assert made_of({"scripts/rows.py": "import json\nfrom pathlib import Path\n", "README.md": ""}) == [
        "scripts/rows.py"
    ]


def test_modules_of_modules_and_their_packages_are_parts() -> None:
    files = {
        "scripts/rows.py": "from lib.text import tidy",
        "lib/__init__.py": "",
        "lib/text.py": "from . import words\nfrom ..tools import hidden\n",
        "lib/words.py": "import rows",
        "tools.py": "",
        "unused.py": "",
    }
    assert made_of(files) == ["scripts/rows.py", "lib/__init__.py", "lib/text.py", "lib/words.py", "tools.py"]


def test_a_script_that_is_not_python_or_leads_out_of_the_project_is_itself() -> None:
    files = {"scripts/rows.py": "def (", "../secret.txt": "", "/etc/passwd": ""}
    assert made_of(files) == ["scripts/rows.py"]
    files["scripts/rows.py"] = "open('../../secret.txt'); open('/etc/passwd')"
    assert made_of(files) == ["scripts/rows.py"]


def test_a_file_is_found_by_its_name_behind_a_folder_that_is_known_at_run_time_only() -> None:
    files = {
        "scripts/rows.py": "open(f'{here}/words.txt'); open(here + '/data/more.txt'); open(here / 'plain'); "
        "import_module('.late', package)",
        "scripts/plain": "",
        "scripts/words.txt": "",
        "scripts/data/more.txt": "",
        "scripts/late.py": "",
    }
    assert made_of(files) == [
        "scripts/rows.py",
        "scripts/data/more.txt",
        "scripts/late.py",
        "scripts/plain",
        "scripts/words.txt",
    ]


def test_a_text_that_is_too_long_for_the_name_of_a_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(f"PROMPT = {'Answer in one word. ' * 20!r}\n")
    assert parts_in(tmp_path, "rows.py") == ["rows.py"]


def test_what_our_own_modules_name_in_strings_is_not_a_part() -> None:
    files = {
        "scripts/rows.py": "from graftline import settings",
        "graftline/__init__.py": "",
        "graftline/settings.py": "DEFAULT = 'pipelines.yaml'",
        "pipelines.yaml": "",
    }
    assert made_of(files) == ["scripts/rows.py", "graftline/__init__.py", "graftline/settings.py"]


def test_a_run_pins_a_script_by_its_modules_too_and_a_script_alone_by_itself(tmp_path: Path) -> None:
    script, helper = tmp_path / "rows.py", tmp_path / "helper.py"
    helper.write_text("first = 1\n")
    script.write_text("import json\n")
    data = RowSource(source="path:rows", prepare="rows.py")
    assert pinned_sources._script(tmp_path, data) == str(of_file(script))
    script.write_text("import helper\n")
    before = pinned_sources._script(tmp_path, data)
    helper.write_text("second = 2\n")
    assert pinned_sources._script(tmp_path, data) != before


def test_a_depth_that_python_miscounts_while_another_thread_parses_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 106905; a wrong depth that stays wrong is not hidden."""
    real, left = ast.parse, [2]

    def parse(code: bytes) -> ast.Module:
        left[0] -= 1
        if left[0] >= 0:
            raise SystemError("AST constructor recursion depth mismatch (before=63, after=77)")
        return real(code)

    monkeypatch.setattr(ast, "parse", parse)
    assert ast.unparse(syntax_tree(b"a = 1")) == "a = 1"
    left[0] = 10**6
    with pytest.raises(SystemError, match="depth mismatch"):
        syntax_tree(b"a = 1")
