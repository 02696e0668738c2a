"""What `make mutants` draws and compares; mutmut itself takes an hour."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"graftline.registry.channel.x_read__mutmut_{number}" for number in range(2000)]


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "infra" / "mutants.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_same_mutants_are_drawn_each_time_whatever_stands_beside_them(mutants: ModuleType) -> None:
    drawn = mutants.sample(NAMES)
    assert 20 < len(drawn) < 60
    others = [name.replace("channel", "approval") for name in NAMES]
    assert [name for name in mutants.sample(others + NAMES) if name in NAMES] == drawn
    assert mutants.sample(NAMES, seed=1) != drawn


def test_modules_that_are_tried_whole_are_not_drawn_from(mutants: ModuleType) -> None:
    assert mutants.sample(["graftline.registry.policy.x_check__mutmut_1", "graftline.cli.x__mutmut_1"], share=1.0) == []


def test_a_survivor_s_line_does_not_hold_its_number(mutants: ModuleType) -> None:
    diff = "--- a.py\n+++ a.py\n@@ -1 +1 @@\n def f():\n-    return  a < b\n+    return a <= b\n"
    assert mutants.described("graftline.a.x_f__mutmut_7", diff) == "graftline.a.x_f: - return a < b + return a <= b"


def test_no_list_is_an_empty_one_and_a_heading_is_no_survivor(mutants: ModuleType, tmp_path: Path) -> None:
    assert mutants.known(tmp_path / "mutants.txt") == []
    (tmp_path / "mutants.txt").write_text("# heading\na: - b + c\n", encoding="utf-8")
    assert mutants.known(tmp_path / "mutants.txt") == ["a: - b + c"]


def test_the_modules_exist(mutants: ModuleType) -> None:
    for prefix in (*mutants.WHOLE, *mutants.SAMPLED):
        path = ROOT / prefix.rstrip(".").replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), prefix


OLD, NEW = "a: - b < c + b <= c", "a: - d + e"


def test_a_survivor_that_the_list_does_not_have_fails_and_so_does_one_that_died(
    mutants: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "mutants.txt"
    file.write_text(f"# the same number\n{OLD}\n", encoding="utf-8")
    assert mutants.compare(file, [OLD])[1] == 0
    told, code = mutants.compare(file, [OLD, NEW])
    assert code == 1
    assert f"new; write a test that notices:\n{NEW}\n" in told
    told, code = mutants.compare(file, [])
    assert code == 1
    assert f"dead; take out of mutants.txt:\n{OLD}\n" in told
    assert mutants.compare(tmp_path / "absent", [NEW])[1] == 1


def test_an_update_keeps_reasons_and_fails_until_somebody_gives_the_others(mutants: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "mutants.txt"
    file.write_text(f"# heading\n\n# the same number\n{OLD}\nz: - gone\n", encoding="utf-8")
    file.write_text(mutants.updated(file, [OLD, NEW]), encoding="utf-8")
    assert mutants.known(file) == [OLD, NEW]
    assert mutants.unexplained(file) == [NEW]
    assert mutants.compare(file, [OLD, NEW])[1] == 1
    file.write_text(file.read_text(encoding="utf-8").replace(mutants.TO_DO, "# nobody reads it"), encoding="utf-8")
    assert mutants.compare(file, [OLD, NEW])[1] == 0
    first = tmp_path / "first.txt"
    first.write_text(mutants.updated(first, [NEW]), encoding="utf-8")
    assert (mutants.known(first), mutants.unexplained(first)) == ([NEW], [NEW])


def test_a_part_says_nothing_of_the_others(mutants: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "mutants.txt"
    file.write_text("# why\nb.x: - f\n", encoding="utf-8")
    assert mutants.compare(file, [], only="a.")[1] == 0
    file.write_text(mutants.updated(file, ["a.x: - g"], only="a."), encoding="utf-8")
    assert mutants.known(file) == ["b.x: - f", "a.x: - g"]
    assert mutants.compare(file, [], only="b.")[1] == 1


def test_the_command_ends_with_the_comparison_s_exit_code(
    mutants: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = "graftline.registry.policy.x_check__mutmut_1"
    calls: list[tuple[str, ...]] = []

    def mutmut(*words: str) -> str:  # what the real one leaves and shows, without its hour
        calls.append(words)
        return "--- a\n+++ a\n-    return a\n+    return None\n"

    monkeypatch.setattr(mutants, "mutmut", mutmut)
    monkeypatch.setattr(mutants, "LIST", tmp_path / "mutants.txt")
    monkeypatch.setattr("sys.argv", ["mutants.py", "--only", "graftline.registry.policy."])
    monkeypatch.setattr(mutants, "results", lambda: {tried: 1})
    assert mutants.main() == 0
    monkeypatch.setattr(mutants, "results", lambda: {tried: 0})
    assert mutants.main() == 1
    assert "new; write a test that notices:\ngraftline.registry.policy.x_check: - return a + return None" in (
        capsys.readouterr().out
    )
    assert calls[0] == ("run", "--max-children", "2", "graftline.registry.policy.*")
