"""Terraform: formatted, parsed, and its roles name the folders that the registry uses."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "infra" / "terraform"


@pytest.fixture(scope="module")
def roles() -> dict[str, dict[str, list[str]]]:
    hcl2 = pytest.importorskip("hcl2")
    with (FOLDER / "roles.tf").open() as stream:
        parsed: dict[str, Any] = hcl2.load(stream)
    found = parsed["locals"][0]["roles"]
    return {
        clean(name): {
            clean(key): [clean(folder) for folder in folders]
            for key, folders in role.items()
            if isinstance(folders, list)
        }
        for name, role in found.items()
        if isinstance(role, dict)
    }


def clean(text: str) -> str:
    return text.strip('"')


def used_folders() -> set[str]:
    """First parts of the keys that the registry writes."""
    code = "".join(path.read_text() for path in (ROOT / "graftline" / "registry").glob("*.py"))
    return set(re.findall(r'f?"(releases|channels|checkpoints|heads|approvals|leases|latest|looks|told)/', code)) | set(
        re.findall(r"}(probe)/", code)
    )


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
def test_the_files_are_formatted_and_parse() -> None:
    done = subprocess.run(["terraform", "fmt", "-check", "-recursive", str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_parses() -> None:
    hcl2 = pytest.importorskip("hcl2")
    files = sorted(FOLDER.glob("*.tf"))
    assert [path.name for path in files] == [
        "bucket.tf",
        "keys.tf",
        "outputs.tf",
        "roles.tf",
        "variables.tf",
        "versions.tf",
    ]
    for path in files:
        with path.open() as stream:
            assert hcl2.load(stream)


def test_the_roles_name_every_folder_of_the_store_and_no_other(roles: dict[str, dict[str, list[str]]]) -> None:
    named = {folder for role in roles.values() for folders in role.values() for folder in folders}
    folders = {
        "releases",
        "channels",
        "checkpoints",
        "heads",
        "approvals",
        "leases",
        "latest",
        "looks",
        "probe",
        "told",
    }
    assert named == used_folders() == folders


def test_who_trains_cannot_promote_and_who_promotes_cannot_change_a_release(
    roles: dict[str, dict[str, list[str]]],
) -> None:
    assert "channels" not in roles["trainer"]["writes"]
    assert "approvals" not in roles["trainer"]["writes"]
    assert "releases" not in roles["promoter"]["writes"]
    assert "approvals" not in roles["promoter"]["writes"]
    assert roles["server"]["writes"] == ["leases"]
    assert not any("channels" in role["deletes"] for role in roles.values())


def test_whoever_needs_or_removes_a_release_can_say_so(roles: dict[str, dict[str, list[str]]]) -> None:
    for role in ("trainer", "promoter", "cleaner"):
        assert all("leases" in roles[role][right] for right in ("reads", "writes", "deletes")), role


def parse(name: str) -> dict[str, Any]:
    with (FOLDER / name).open() as stream:
        return pytest.importorskip("hcl2").load(stream)


def test_only_the_trainer_may_read_the_signing_key_and_it_may_do_nothing_else_with_it() -> None:
    parsed = parse("keys.tf")
    grants = [block for kind in parsed["resource"] for name, block in kind.items() if "aws_iam_role_policy" in name]
    assert len(grants) == 1
    assert 'aws_iam_role.store["trainer"]' in str(grants[0]).replace("'", '"')
    (document,) = parsed["data"]
    assert "secretsmanager:GetSecretValue" in str(document)
    assert str(document).count("secretsmanager:") == 1


def test_every_name_that_is_used_is_declared() -> None:
    text = "".join(path.read_text() for path in sorted(FOLDER.glob("*.tf")))
    declared = {(kind, name) for kind, name in re.findall(r'^(?:resource|data) "(\w+)" "(\w+)"', text, re.M)}
    used = set(re.findall(r"(?<![\w.])(?:data\.)?(aws_\w+)\.(\w+)", re.sub(r"#.*", "", text)))
    assert used <= declared
    assert set(re.findall(r"var\.(\w+)", text)) == set(re.findall(r'^variable "(\w+)"', text, re.M))


def test_no_right_is_granted_on_everything() -> None:
    text = (FOLDER / "roles.tf").read_text()
    assert not re.search(r'actions\s*=\s*\["(s3|kms|iam):\*"\]', text)
    assert 'resources = ["*"]' not in text
    assert "DeleteObjectVersion" not in text
    assert "BypassGovernanceRetention" not in text


def test_the_bucket_keeps_versions_locks_and_encrypts_them_and_is_not_public() -> None:
    text = (FOLDER / "bucket.tf").read_text()
    for resource in (
        "aws_s3_bucket_versioning",
        "aws_s3_bucket_object_lock_configuration",
        "aws_s3_bucket_server_side_encryption_configuration",
        "aws_s3_bucket_public_access_block",
        "aws_s3_bucket_lifecycle_configuration",
        "aws_s3_bucket_policy",
    ):
        assert f'resource "{resource}" "store"' in text
    assert '"s3:if-none-match"' in text
