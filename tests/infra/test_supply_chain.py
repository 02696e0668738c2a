"""What graftline is built from and ships as: licences, bill of materials, known vulnerabilities, secrets, the wheel."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
DETECT_SECRETS = shutil.which("detect-secrets-hook", path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def chain() -> ModuleType:
    """infra/supply_chain.py, which is a program and belongs to no package."""
    spec = importlib.util.spec_from_file_location("supply_chain", ROOT / "infra" / "supply_chain.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rules(chain: ModuleType) -> Any:
    return chain.Rules.read(ROOT / "infra" / "supply-chain.yaml")


@pytest.mark.parametrize(
    ("licence", "may"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("GPL-2.0-only OR MIT", True),
        ("MIT AND GPL-2.0-only", False),
        ("MIT AND (GPL-2.0-only OR BSD-3-Clause)", True),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("A licence of nobody", False),
        ("", False),
    ],
)
def test_a_licence_is_allowed_where_one_side_of_an_or_and_both_of_an_and_are(
    licence: str, may: bool, chain: ModuleType, rules: Any
) -> None:
    assert chain.is_allowed(licence, rules.allowed) is may


def test_every_locked_package_has_a_licence_that_is_allowed(chain: ModuleType, rules: Any) -> None:
    assert chain.refused_licences(chain.locked(), rules) == []


def test_a_package_without_a_licence_or_with_another_one_is_named(chain: ModuleType, rules: Any) -> None:
    here = [chain.Package("no-such-package", "1"), chain.Package("numpy", "2")]
    assert chain.refused_licences(here, rules) == ["no-such-package 1: no licence that its metadata names"]
    strict = chain.Rules(frozenset({"MIT"}), {}, {}, {})
    assert [line.partition(":")[0] for line in chain.refused_licences(here, strict)] == ["no-such-package 1", "numpy 2"]


def test_what_is_allowed_for_one_package_needs_a_reason(chain: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(
        "allowed: [MIT]\nspelled: {}\npackages: {a: {licence: X}}\naccepted: {}\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit, match=r"rules\.yaml: a has no `why`"):
        chain.Rules.read(tmp_path / "rules.yaml")


def test_packages_that_stand_in_the_list_are_in_the_lock(chain: ModuleType, rules: Any) -> None:
    assert rules.packages.keys() - {package.name for package in chain.locked()} == set()


def test_the_bill_lists_every_locked_package_with_its_hashes_and_has_the_same_bytes_each_time(
    chain: ModuleType, rules: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    packages = [package for package in chain.locked() if package.name in ("numpy", "torch", "pydantic-core")]
    text = chain.bill_of_materials(packages, rules, version="1.2.3")
    assert text == chain.bill_of_materials(packages, rules, version="1.2.3")
    bill = json.loads(text)
    assert bill["metadata"]["component"]["version"] == "1.2.3"
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20+00:00"
    parts = {part["name"]: part for part in bill["components"]}
    assert parts.keys() == {"numpy", "pydantic-core", "torch"}
    assert parts["numpy"]["purl"].startswith("pkg:pypi/numpy@2")
    assert len(parts["numpy"]["hashes"]) > 5
    assert parts["pydantic-core"]["licenses"] == [{"license": {"id": "MIT"}}]


def advisory(versions: list[str], *events: dict[str, str], **more: object) -> dict[str, object]:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    affected = {"package": {"ecosystem": "PyPI", "name": "Some_Package"}, "versions": versions, "ranges": ranges}
    return {"id": "PYSEC-1", "summary": "bad", "affected": [affected], **more}


@pytest.mark.parametrize(
    ("record", "concerns"),
    [
        (advisory(["1.9", "1.10.0"]), True),
        (advisory(["1.9"]), False),
        (advisory([], {"introduced": "0"}, {"fixed": "1.10"}), False),
        (advisory([], {"introduced": "0"}, {"fixed": "1.11"}), True),
        (advisory([], {"introduced": "1.10.1"}), False),
        (advisory([], {"introduced": "0"}, {"last_affected": "1.10"}), True),
        (advisory([], {"introduced": "0"}, {"last_affected": "1.9"}), False),
        (advisory([], {"fixed": "1.2"}, {"introduced": "0"}, {"introduced": "1.10rc1"}), True),
        (advisory(["1.10"], withdrawn="2026-01-01T00:00:00Z"), False),
        (advisory(["1.10"], id="ACCEPTED"), False),
        (advisory(["1.10"], id="OVERDUE"), True),
    ],
)
def test_an_advisory_concerns_the_versions_that_it_lists_and_those_in_its_ranges(
    record: dict[str, object], concerns: bool, chain: ModuleType, tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("PYSEC-1.json", json.dumps(record))
        archive.writestr(
            "npm.json", json.dumps({"id": "N", "affected": [{"package": {"ecosystem": "npm", "name": "x"}}]})
        )
    accepted = {name: {"why": "not called", "until": until} for name, until in UNTIL.items()}
    here = [chain.Package("some-package", "1.10")]
    found = chain.known_vulnerabilities(here, tmp_path / "all.zip", accepted, date(2026, 11, 27))
    assert found == ([f"some-package 1.10: {record['id']} bad"] if concerns else [])


UNTIL = {"ACCEPTED": date(2026, 11, 27), "OVERDUE": date(2026, 11, 26)}


@pytest.mark.skipif(DETECT_SECRETS is None, reason="detect-secrets is not installed: make setup")
def test_a_key_in_a_file_is_found_by_the_options_that_make_passes(tmp_path: Path) -> None:
    options = subprocess.run(
        ["make", "--dry-run", "supply-chain"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    line = next(line for line in options.splitlines() if "detect-secrets-hook" in line)
    (tmp_path / "a.env").write_text("AWS_ACCESS_KEY_ID=AKIA" + "IOSFODNN7EXAMPLF" + "\n", encoding="utf-8")
    (tmp_path / "b.env").write_text("URL=https://user:hunter2@host/\n", encoding="utf-8")
    command = line.partition("xargs -0 ")[2].replace(line.partition("xargs -0 ")[2].split()[0], str(DETECT_SECRETS), 1)
    for name, code in (("a.env", 1), ("b.env", 0)):
        done = subprocess.run(f"{command} {name}", shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr


def test_the_release_workflow_names_commits_and_only_the_job_that_publishes_may_write() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yaml").read_text(encoding="utf-8")
    assert [use for use in re.findall(r"uses: (\S+)", text) if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", use)] == []
    workflow = YAML(typ="safe").load(text)
    assert workflow["permissions"] == {}
    assert workflow["jobs"]["build"]["permissions"] == {"contents": "read"}
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"attestations": "write", "contents": "write", "id-token": "write"}
    assert not [step for step in publish["steps"] if "make " in step.get("run", "")]


def test_two_builds_in_other_folders_with_other_masks_and_dates_are_the_same_bytes(
    chain: ModuleType, tmp_path: Path
) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    made = []
    for name, mode, umask, clock in (("a", 0o644, 0o022, 1_500_000_000), ("b ü", 0o600, 0o077, 1_700_000_000)):
        source, out = tmp_path / name / "source", tmp_path / name / "wheel"
        out.mkdir(parents=True)
        for file in filter(None, listed.stdout.split("\0")):
            if not file.startswith(("docs/", "studies/", "tests/golden")) and (ROOT / file).is_file():
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                (source / file).write_bytes((ROOT / file).read_bytes())
                (source / file).chmod(mode)
                os.utime(source / file, (clock, clock))
        made.append(chain.build_wheel(source, out, epoch=1_600_000_000, umask=umask).read_bytes())
    assert len(made[0]) > 100_000
    assert made[0] == made[1]
