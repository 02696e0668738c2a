import json
import threading
from dataclasses import asdict
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from graftline.doctor import Finding, examine, render
from graftline.doctor.machine import keys, remote
from graftline.doctor.project import look_at_project
from graftline.release.signing import create_key
from tests.settings.documents import changed


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    (tmp_path / "constraints.txt").write_text("pydantic==0.0.1\nno-such-package-here==1\n# a comment\n")
    for name in ("GRAFTLINE_CACHE", "PREFECT_API_URL", "GRAFTLINE_SIGNING_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def findings(project: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(project)}


def test_everything_that_the_line_needs_is_looked_at(project: Path) -> None:
    found = findings(project)

    machine = {"python", "packages", "torch and transformers", "disk", "memory", "threads", "cuda", "git", "npm", "dvc"}
    services = {"dvc remote", "prefect", "keys", "signing key"}
    assert set(found) == machine | services | {"pipelines", "store store", "gate demo/better"}
    assert found["pipelines"].found == "demo"
    json.dumps([asdict(finding) for finding in found.values()])


def test_packages_of_another_version_are_named_with_what_to_run(project: Path) -> None:
    packages = findings(project)["packages"]

    assert packages.status == "note"
    assert packages.found.startswith("1 of 2 pinned packages installed, 1 of another version: pydantic 2.")
    assert packages.advice == "install the pinned set: make setup"


def test_a_wrong_pipelines_yaml_is_missing_not_a_crash(project: Path) -> None:
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.adapter.rank": 0}))

    assert findings(project)["pipelines"].status == "missing"


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [
        (None, "note", "GRAFTLINE_WEBHOOK_OPS is not set: a promotion from here tells it nothing"),
        (" ", "note", "GRAFTLINE_WEBHOOK_OPS is not set: a promotion from here tells it nothing"),
        ("hunter2", "missing", "the variable GRAFTLINE_WEBHOOK_OPS holds something else"),
        ("whsec_" + "QUFB" * 10, "ok", "1 secret in GRAFTLINE_WEBHOOK_OPS"),
        ("whsec_" + "QUFB" * 10 + " whsec_" + "QkJC" * 10, "ok", "2 secrets in GRAFTLINE_WEBHOOK_OPS"),
    ],
)
def test_a_webhook_whose_secret_is_not_there_is_named_and_a_secret_is_never_shown(
    project: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, status: str, said: str
) -> None:
    monkeypatch.delenv("GRAFTLINE_WEBHOOK_OPS", raising=False)
    if value is not None:
        monkeypatch.setenv("GRAFTLINE_WEBHOOK_OPS", value)
    webhook = {"url": "https://hooks.example.org/ops?token=t0ps3cret", "secret": "GRAFTLINE_WEBHOOK_OPS"}
    (project / "pipelines.yaml").write_bytes(changed(**{"channels.production.webhooks": [webhook]}))

    (found,) = [each for each in look_at_project(project) if each.name.startswith("webhook")]

    assert found.name == "webhook https://hooks.example.org/ops of channel production"
    assert (found.status, found.found.startswith(said)) == (status, True)
    assert "t0ps3cret" not in str(found)
    assert "hunter2" not in str(found)


def test_a_store_that_cannot_be_written_is_missing(project: Path) -> None:
    (project / "store").touch()
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": "store/below-a-file"}))

    store = findings(project)["store store/below-a-file"]

    assert store.status == "missing"
    assert store.advice == "make the folder writable, or change release.store"


def test_an_s3_store_that_does_not_answer_is_missing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    (project / "pipelines.yaml").write_bytes(changed(**{"demo.release.store": "s3://models/x"}))

    assert findings(project)["store s3://models/x"].status == "missing"


def test_a_machine_without_git_is_told_to_install_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    found = findings(project)

    assert (found["git"].status, found["npm"].status) == ("missing", "note")
    assert found["git"].advice.startswith("install git")


def test_advice_stands_below_what_was_found() -> None:
    text = render([Finding("disk", "ok", "9 GiB free"), Finding("git", "missing", "not on the PATH", "install git")])

    assert text.splitlines() == [
        "ok      disk  9 GiB free",
        "missing git   not on the PATH",
        "              -> install git",
    ]


def test_a_prefect_server_of_another_version_is_noted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/admin/version" else 404)
            self.end_headers()
            self.wfile.write(b'"2.0.0"')

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Server) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{listening.server_port}/api")
        found = findings(project)["prefect"]
        listening.shutdown()

    assert found.status == "note"
    assert "here, 2.0.0 at http://127.0.0.1" in found.found


def test_a_prefect_server_that_does_not_answer_is_missing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")

    assert findings(project)["prefect"].status == "missing"


def test_the_key_ring_needs_a_builder_whose_key_counts(project: Path) -> None:
    public = create_key(project / "builder.pem").read_text()
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for expires, status in (("2025-12-31", "missing"), ("2026-01-15", "note"), ("2027-01-01", "ok")):
        ring = {"name": "ada", "roles": ["builder"], "public_key": public, "expires": f"{expires}T00:00:00Z"}
        (project / "keys.yaml").write_text(json.dumps({"keys": [ring]}))
        assert keys(project, now).status == status, expires


def test_a_signing_key_that_others_may_read_is_noted(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_key(project / "builder.pem")
    monkeypatch.setenv("GRAFTLINE_SIGNING_KEY", str(project / "builder.pem"))
    assert findings(project)["signing key"].status == "ok"
    (project / "builder.pem").chmod(0o644)
    assert findings(project)["signing key"].advice.startswith("chmod 600")
    monkeypatch.setenv("GRAFTLINE_SIGNING_KEY", str(project / "absent.pem"))
    assert findings(project)["signing key"].status == "missing"


def test_a_remote_without_an_address_is_missing(project: Path) -> None:
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    remote = there\n")
    assert remote(project).status == "missing"
    (project / ".dvc" / "config.local").write_text("['remote \"there\"']\n    url = s3://bucket/dvc\n")
    assert remote(project) == Finding("dvc remote", "ok", "there")


def test_a_key_file_that_lists_nobody_yet_is_a_note(project: Path) -> None:
    (project / "keys.yaml").write_text("keys: []\n")
    found = keys(project)
    assert (found.status, found.found) == (
        "note",
        "keys.yaml lists no key: nothing can be promoted on a signature",
    )
    assert "graftline new-key" in found.advice


def test_keys_without_a_person_are_noted_where_two_may_be_one_person_s(project: Path) -> None:
    def ring(*people: str | None) -> str:
        found = []
        for number, person in enumerate(people):
            name = f"key-{number}"
            path = project / name
            public = path.with_suffix(".pub").read_text() if path.exists() else create_key(path).read_text()
            found.append({"name": name, "roles": ["builder"], "public_key": public})
            found[-1] |= {"person": person} if person else {}
        return json.dumps({"keys": found})

    for people, status in (((None,), "ok"), ((None, None), "note"), (("ada", None), "note"), (("ada", "eve"), "ok")):
        (project / "keys.yaml").write_text(ring(*people))
        found = keys(project)
        assert found.status == status, people
    (project / "keys.yaml").write_text(ring(None, None))
    assert keys(project).found.startswith("key-0, key-1: no `person`")
