import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from graftline.cli import main
from graftline.registry.store import Store, open_store
from tests.registry.people import People
from tests.settings.documents import changed


@dataclass(frozen=True)
class Ended:
    """What a command left."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a right pipelines.yaml and the files that it names; the current folder of the test."""
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(project: Path) -> Store:
    """The store that the project's pipelines.yaml names."""
    return open_store(str(project / "store"))


@pytest.fixture
def people(project: Path, monkeypatch: pytest.MonkeyPatch) -> People:
    """People with keys, listed in the project's keys.yaml; pia's signs entries."""
    made = People(project)
    monkeypatch.setenv("GRAFTLINE_CHANNEL_KEY", str(made.private_key("pia")))
    (project / "keys.yaml").write_text(made.text)
    return made


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["graftline", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call
