"""A flow's process is made ready by calls: what Prefect is told, what the user has said already, and the log."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.errors import ConfigError
from graftline.workflow.process import WithoutTraceback, begin
from tests.line.project import ROOT
from tests.settings.documents import changed

ASK = """
import os
from prefect.settings import get_current_settings
from graftline.workflow.process import flow_command
with flow_command():
    server = get_current_settings().server
    print(server.analytics_enabled, server.ephemeral.startup_timeout_seconds, os.environ["DO_NOT_TRACK"])
"""
LOG = """
import logging
from graftline.workflow.process import flow_command
with flow_command():
    logging.getLogger("prefect").warning("said")
"""


def run(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    environment |= {"PREFECT_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=True
    )


@pytest.mark.slow
def test_prefect_has_our_defaults_although_it_read_the_environment_before(tmp_path: Path) -> None:
    assert run(ASK, tmp_path).stdout == "False 180 1\n"


@pytest.mark.slow
def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    said = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "33", "PREFECT_SERVER_ANALYTICS_ENABLED": "true"}
    assert run(ASK, tmp_path, DO_NOT_TRACK="0", **said).stdout == "True 33 0\n"


@pytest.mark.slow
def test_prefect_s_own_lines_are_json_where_ours_are(tmp_path: Path) -> None:
    (line,) = run(LOG, tmp_path, GRAFTLINE_LOG="json").stderr.splitlines()
    assert json.loads(line)["msg"] == "said"
    assert "said" in run(LOG, tmp_path).stderr


def test_an_error_that_explains_itself_has_no_traceback_in_the_run_s_log_however_often_a_flow_begins() -> None:
    begin()
    begin()
    filters = [each for each in logging.getLogger("prefect.flow_runs").filters if isinstance(each, WithoutTraceback)]
    assert len(filters) == 1
    for error, is_kept in ((ConfigError("given 3"), False), (KeyError("a bug"), True)):
        record = logging.LogRecord("prefect.flow_runs", logging.ERROR, "", 0, "", None, (type(error), error, None))
        assert filters[0].filter(record)
        assert bool(record.exc_info) is is_kept


def test_the_command_hands_prefect_its_settings_before_a_flow_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipelines.yaml").write_bytes(changed())
    (tmp_path / "flows").mkdir()
    for name, text in (("__init__", ""), ("retrain", "import os; print(os.environ['DO_NOT_TRACK'])")):
        (tmp_path / "flows" / f"{name}.py").write_text(text)
    for given, expected in ((None, "1\n"), ("0", "0\n")):
        monkeypatch.delenv("DO_NOT_TRACK", raising=False)
        if given:
            monkeypatch.setenv("DO_NOT_TRACK", given)
        command = [sys.executable, "-m", "graftline.cli", "retrain", "demo"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
            capture_output=True,
            text=True,
        )
        assert done.stdout == expected, done.stderr
