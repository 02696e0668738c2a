"""What decides and differs between two commits of a scratch repository; no stage runs."""

import ast
from pathlib import Path
from typing import Any

import pytest

from graftline.digest import of_bytes
from graftline.errors import GraftlineError
from graftline.evaluate.scores import ItemScore, Scores
from graftline.workflow.deciding import JUDGES, DecidingSetting, find_settings, measured_settings
from tests.line.project import read_yaml, write_yaml
from tests.registry.people import ROLES, People
from tests.workflow.stand_in_project import make_repository
from tests.workflow.tiny_project import PIPELINE, commit, git


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("repository") / "project")


@pytest.fixture
def branch(repository: Path) -> Path:
    git(repository, "checkout", "-q", "--force", "--detach", "main")
    return repository


def edit(folder: Path, path: str, value: Any) -> None:
    """Set a value of pipelines.yaml, or remove it (None)."""
    document = read_yaml(folder)
    *parents, last = path.split(".")
    place = document
    for part in parents:
        place = place.setdefault(part, {})
    if value is None:
        del place[last]
    else:
        place[last] = value
    write_yaml(folder, document)


def found(folder: Path, base: str = "main") -> list[tuple[str, str | None, str | None]]:
    commit(folder, "change")
    return [(each.key, each.old, each.new) for each in find_settings(folder, base, "HEAD")]


OWN = f"pipelines.{PIPELINE}"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{OWN}.gates.accuracy.margin", 0.5, ("gates.accuracy.margin", "0.1", "0.5")),
        (f"{OWN}.gates.accuracy.alpha", 0.2, ("gates.accuracy.alpha", "0.05", "0.2")),
        (f"{OWN}.gates.accuracy.min_items", 10, ("gates.accuracy.min_items", "100", "10")),
        (f"{OWN}.guards.template", "off", ("guards.template", "true", "false")),
        (f"{OWN}.data.evaluation_rows", 110, ("data.evaluation_rows", "120", "110")),
        (f"{OWN}.data.seed", 1, ("data.seed", "0", "1")),
        (f"{OWN}.data.labels", ["cat", "cow"], ("data.labels", '["cat", "dog"]', '["cat", "cow"]')),
        (f"{OWN}.base.template", "chatml", ("base.template", "none", "chatml")),
        (f"{OWN}.evaluate.latency_tokens", 8, ("evaluate.latency_tokens", None, "8")),
        (f"{OWN}.release.store", "elsewhere", ("release.store", "store", "elsewhere")),
        ("channels.production.approvals", {"roles": ["qa"]}, ("channels.production.approvals.roles", "[]", '["qa"]')),
        ("channels.production.approvals", {"count": 2}, ("channels.production.approvals.count", "0", "2")),
        ("channels.production.verdicts", ["inconclusive"],
         ("channels.production.verdicts", '["pass"]', '["inconclusive"]')),
    ],
)  # fmt: skip
def test_what_decides_is_found_with_its_old_and_new_value(
    branch: Path, path: str, value: Any, expected: tuple[str, str | None, str | None]
) -> None:
    edit(branch, path, value)

    assert found(branch) == [expected]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{OWN}.train.steps", 9),
        (f"{OWN}.adapter.rank", 2),
        (f"{OWN}.data.license", "MIT"),
        (f"{OWN}.evaluate.batch_tokens", 128),
        (f"{OWN}.gates.accuracy.alpha", 0.05),  # the default, written out
        ("channels.production.approvals", {"count": 0}),
    ],
)
def test_what_decides_nothing_is_left_out(branch: Path, path: str, value: Any) -> None:
    edit(branch, path, value)

    assert found(branch) == []


def test_an_anchor_that_is_written_out_is_no_difference(branch: Path) -> None:
    path = branch / "pipelines.yaml"
    text = path.read_text(encoding="utf-8")
    assert "margin: 0.1" in text
    path.write_text(text.replace("margin: 0.1", "margin: &same 0.1"), encoding="utf-8")

    assert found(branch) == []


def test_an_anchor_that_many_use_is_a_difference_of_each(branch: Path) -> None:
    path = branch / "pipelines.yaml"
    text = path.read_text(encoding="utf-8").replace("margin: 0.1", "margin: &same 0.1\n        alpha: *same")
    path.write_text(text, encoding="utf-8")
    base = commit(branch, "anchor")
    path.write_text(text.replace("&same 0.1", "&same 0.2"), encoding="utf-8")

    assert found(branch, base) == [("gates.accuracy.margin", "0.1", "0.2"), ("gates.accuracy.alpha", "0.1", "0.2")]


def test_a_gate_that_is_removed_is_one_difference(branch: Path) -> None:
    edit(
        branch,
        f"{OWN}.gates.stops",
        {"metric": "option_stop_rate", "direction": "higher", "test": "limit", "limit": 0.8},
    )
    base = commit(branch, "stops")
    edit(branch, f"{OWN}.gates.stops", None)

    ((key, old, new),) = found(branch, base)

    assert (key, new) == ("gates.stops", None)
    assert old is not None
    assert old.startswith("metric: option_stop_rate, direction: higher, test: limit, ")


def test_a_new_pipeline_and_a_removed_one_are_named_with_their_gates(branch: Path) -> None:
    document = read_yaml(branch)
    document["pipelines"]["birds"] = document["pipelines"].pop(PIPELINE)
    write_yaml(branch, document)
    commit(branch, "renamed")

    old, new = find_settings(branch, "main", "HEAD")

    gates = "gates accuracy; guards switched off: stops"
    whole = f"{gates}; rows path:rows.jsonl; channel production of store"
    assert old == DecidingSetting(PIPELINE, "the whole pipeline", whole, None)
    assert (new.pipeline, new.old) == ("birds", None)


def test_a_new_pipeline_says_which_guards_it_switches_off(branch: Path) -> None:
    document = read_yaml(branch)
    document["pipelines"]["birds"] = {**document["pipelines"][PIPELINE], "guards": {"stops": "off", "training": "off"}}
    write_yaml(branch, document)

    ((key, old, new),) = found(branch)

    assert (key, old) == ("the whole pipeline", None)
    assert new == (
        "gates accuracy; guards switched off: stops, training; rows path:rows.jsonl; channel production of store"
    )


def test_keys_are_named_with_their_roles_and_never_shown_whole(branch: Path, tmp_path: Path) -> None:
    people = People(tmp_path)
    (branch / "keys.yaml").write_text(people.text, encoding="utf-8")
    base = commit(branch, "keys")
    (branch / "keys.yaml").write_text(
        people.text.replace("name: eve\n  roles: [reviewer]", "name: eve\n  roles: [maintainer]")
    )

    assert found(branch, base) == [("keys.yaml.eve.roles", '["reviewer"]', '["maintainer"]')]
    added = find_settings(branch, "main", base)
    assert {each.key for each in added} == {f"keys.yaml.{name}" for name in (*ROLES, "unsigned")}
    assert "BEGIN" not in repr(added)


def test_whose_key_it_is_decides_because_people_are_counted_not_keys(branch: Path, tmp_path: Path) -> None:
    """Ada's key written down as Eve's would be a second person's yes."""
    text = People(tmp_path).text
    (branch / "keys.yaml").write_text(text.replace("name: ada", "name: ada\n  person: eve"), encoding="utf-8")
    base = commit(branch, "keys")
    (branch / "keys.yaml").write_text(text.replace("name: ada", "name: ada\n  person: ada"), encoding="utf-8")

    assert found(branch, base) == [("keys.yaml.ada.person", "eve", "ada")]


def test_a_person_who_has_the_key_s_name_is_no_change_when_written_out(branch: Path, tmp_path: Path) -> None:
    text = People(tmp_path).text
    (branch / "keys.yaml").write_text(text, encoding="utf-8")
    base = commit(branch, "keys")
    (branch / "keys.yaml").write_text(text.replace("name: ada", "name: ada\n  person: ada"), encoding="utf-8")

    assert found(branch, base) == []


def test_a_key_file_that_cannot_be_read_is_a_difference_too(branch: Path) -> None:
    (branch / "keys.yaml").unlink()
    base = commit(branch, "no keys")
    (branch / "keys.yaml").write_text("keys: [nonsense]\n")

    ((key, old, new),) = found(branch, base)

    assert (key, old) == ("keys.yaml.all of it", None)
    assert new is not None
    assert "cannot be read" in new


@pytest.mark.parametrize("source", ["path:rows.jsonl", "path:./rows.jsonl"])
def test_the_content_of_the_rows_is_found_however_they_are_named(branch: Path, source: str) -> None:
    edit(branch, f"{OWN}.data.source", source)
    edit(branch, f"{OWN}.data.license", "MIT")
    base = commit(branch, "source")
    (branch / "rows.jsonl").write_text('{"prompt": "digs:", "completion": " dog"}\n')

    ((key, old, new),) = found(branch, base)

    assert key == "content of rows.jsonl"
    assert old != new


def test_the_script_that_makes_rows_and_rows_that_dvc_tracks_are_found(branch: Path) -> None:
    edit(branch, f"{OWN}.data.prepare", "scripts/rows.py")
    edit(branch, f"{OWN}.data.source", "path:scripts/big.jsonl")
    (branch / "scripts").mkdir()
    (branch / "scripts" / "rows.py").write_text("def rows(source): ...\n")
    (branch / "scripts" / "big.jsonl.dvc").write_text("outs: [{md5: 1}]\n")
    base = commit(branch, "script")
    (branch / "scripts" / "rows.py").write_text("def rows(source): return []\n")
    (branch / "scripts" / "big.jsonl.dvc").write_text("outs: [{md5: 2}]\n")

    assert [key for key, _, _ in found(branch, base)] == ["content of scripts/big.jsonl", "content of scripts/rows.py"]


def test_rows_in_a_submodule_and_in_a_folder_are_found(branch: Path) -> None:
    edit(branch, f"{OWN}.data.source", "path:set/rows.jsonl")
    edit(branch, f"{OWN}.evaluate.harness", {"tasks": ["x"], "folder": "harness"})
    (branch / "harness").mkdir()
    (branch / "harness" / "x.yaml").write_text("1\n")
    first, second = git(branch, "rev-parse", "main"), commit(branch, "any commit")
    git(branch, "update-index", "--add", "--cacheinfo", f"160000,{first},set")
    base = commit_index(branch)
    git(branch, "update-index", "--add", "--cacheinfo", f"160000,{second},set")
    (branch / "harness" / "x.yaml").write_text("2\n")
    git(branch, "add", "harness")
    head = commit_index(branch)

    keys = [each.key for each in find_settings(branch, base, head)]

    assert keys == ["content of harness", "content of set/rows.jsonl"]


def commit_index(folder: Path) -> str:
    git(folder, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-q", "-m", "index")
    return git(folder, "rev-parse", "HEAD")


def test_a_key_file_that_is_not_utf_8_is_a_difference_too(branch: Path) -> None:
    (branch / "keys.yaml").unlink()
    base = commit(branch, "no keys")
    (branch / "keys.yaml").write_bytes(b"keys: [\xe9]\n")

    ((key, old, new),) = found(branch, base)

    assert (key, old) == ("keys.yaml.all of it", None)
    assert new is not None
    assert "cannot be read" in new


def test_keys_behind_a_link_are_compared(branch: Path, tmp_path: Path) -> None:
    text = People(tmp_path).text
    (branch / "people.yaml").write_text(text, encoding="utf-8")
    (branch / "keys.yaml").unlink()
    (branch / "keys.yaml").symlink_to("people.yaml")
    base = commit(branch, "link")
    (branch / "people.yaml").write_text(
        text.replace("name: eve\n  roles: [reviewer]", "name: eve\n  roles: [maintainer]")
    )

    assert found(branch, base) == [("keys.yaml.eve.roles", '["reviewer"]', '["maintainer"]')]


def test_a_pipelines_yaml_that_is_not_utf_8_or_is_missing_names_the_commit(branch: Path) -> None:
    path = branch / "pipelines.yaml"
    path.write_bytes(path.read_bytes() + b"# \xe9\n")
    head = commit(branch, "latin 1")
    with pytest.raises(GraftlineError, match=f"pipelines.yaml of {head[:12]}.*UTF-8"):
        find_settings(branch, "main", head)

    path.unlink()
    head = commit(branch, "missing")
    with pytest.raises(GraftlineError, match=f"pipelines.yaml of {head[:12]}.*missing"):
        find_settings(branch, "main", head)


@pytest.mark.parametrize(
    "path",
    [
        "dvc.yaml",
        "graftline/evaluate/x.py",
        "graftline/data/split.py",
        "graftline/merge/parity.py",
        "graftline/registry/policy.py",
        "graftline/workflow/changes.py",
        "graftline/workflow/judging.py",
        "graftline/workflow/scored.py",
        "tasks/gate.py",
        "tasks/merge.py",
        ".github/workflows/evaluate-pr.yaml",
        ".gitlab-ci.yml",
    ],
)
def test_code_that_judges_is_found(branch: Path, path: str) -> None:
    (branch / path).parent.mkdir(parents=True, exist_ok=True)
    (branch / path).write_text("stages: {}\n")

    ((key, _, new),) = found(branch)

    assert path.startswith(key.removeprefix("code."))
    assert new is not None


def test_all_code_that_is_said_to_judge_exists() -> None:
    """A file that moves away would be watched no longer, and nobody would notice."""
    root = Path(__file__).parents[2]

    assert [path for path in JUDGES if not (root / path).exists() and path != ".gitlab-ci.yml"] == []


@pytest.mark.parametrize("task", [path for path in JUDGES if path.startswith("tasks/")])
def test_the_work_behind_a_task_that_judges_is_said_to_judge_too(task: str) -> None:
    frame = {"graftline/workflow/pinned_base.py", "graftline/workflow/stage.py", "graftline/workflow/workspace.py"}
    tree = ast.parse((Path(__file__).parents[2] / task).read_text(encoding="utf-8"))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    called = {f"{module.replace('.', '/')}.py" for module in modules if module.count(".") == 2} - frame

    assert called
    assert [path for path in called if not path.startswith(JUDGES)] == []


def test_secrets_are_masked_before_anything_is_cut(branch: Path) -> None:
    edit(branch, f"{OWN}.data.source", "https://user:hunter2@h.example/rows.jsonl?token=t0ps3cret")
    edit(branch, f"{OWN}.data.sha256", "0" * 64)

    assert found(branch)[0] == ("data.source", "path:rows.jsonl", "https://***@h.example/rows.jsonl?token=***")


def test_a_pipelines_yaml_that_is_wrong_names_the_commit(branch: Path) -> None:
    edit(branch, f"{OWN}.gates.accuracy.margin", -1)
    head = commit(branch, "wrong")

    with pytest.raises(GraftlineError, match=f"pipelines.yaml of {head[:12]}:.*margin"):
        find_settings(branch, "main", head)


def test_rows_and_template_that_were_really_scored_are_compared() -> None:
    def scores(rows: int, template: bytes = b"") -> Scores:
        items = tuple(ItemScore(f"{i}", (-1.0, -2.0), 0, 0, True, 1.0, 1) for i in range(rows))
        return Scores(template=of_bytes(template), labels=("a", "b"), items=items)

    assert measured_settings(PIPELINE, scores(3), scores(3)) == []
    template, items = measured_settings(PIPELINE, scores(3), scores(4, b"chatml"))
    assert template.key == "template, as it was used"
    assert items.key == "what was scored: items"
    assert items.new is not None
    assert items.new.startswith("4 items ")
