"""The line on a machine where nothing is as usual: paths, time zone, locale, home folder, network, git."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.flows.deployed import BIN, make_project
from tests.line.project import ROOT
from tests.workflow.tiny_project import PIPELINE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ODD = {
    "TZ": "Asia/Kathmandu",  # 5:45 h ahead of UTC
    "LC_ALL": "C",  # as under cron
    "HOME": "/proc/nobody",  # where not even root can write
    "XDG_CACHE_HOME": "/proc/nobody/.cache",
    "XDG_CONFIG_HOME": "/proc/nobody/.config",
}
OFFLINE = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "Prüfstand № 1"
    make_project(folder / "my project", folder / "store")
    return folder / "my project"


def retrain(project: Path, *before: str, **changes: str) -> subprocess.CompletedProcess[str]:
    own = {
        "PREFECT_HOME": str(project.parent / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
        "GRAFTLINE_CACHE": str(project.parent / "cache"),
    }
    command = [*before, sys.executable, "-m", "flows.retrain", PIPELINE]
    environment = os.environ | own | ODD | changes
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, encoding="utf-8")


def can_be_taken_offline() -> bool:
    found = shutil.which("unshare") and shutil.which("ip")
    return bool(found) and subprocess.run([*OFFLINE, "true"], capture_output=True).returncode == 0


@pytest.mark.long
def test_the_line_runs_in_an_odd_place_without_home_and_network_and_then_is_up_to_date(project: Path) -> None:
    before = OFFLINE if can_be_taken_offline() else []

    first, second = retrain(project, *before), retrain(project, *before)

    assert first.returncode == 0, first.stdout + first.stderr
    assert (project / "runs" / PIPELINE / "release" / "release.json").is_file()
    assert second.returncode == 0, second.stdout + second.stderr
    assert "none, all up to date" in second.stdout


@pytest.mark.long
def test_a_machine_without_git_is_told_what_is_missing(project: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "env"):
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))

    ended = retrain(project, PATH=os.pathsep.join([str(BIN), str(tmp_path / "bin")]))

    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "git" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose folder's name such a locale has no letters for."""
    folder = tmp_path_factory.mktemp("plain") / "größe"
    folder.mkdir()
    make_project(folder / "project", folder / "store")
    return folder / "project"


def test_a_locale_of_ascii_garbles_no_page_and_fails_no_run(plain: Path) -> None:
    ended = retrain(plain, LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert ended.returncode == 0, ended.stdout + ended.stderr

    with contextlib.closing(sqlite3.connect(plain.parent / "prefect" / "prefect.db")) as database:
        (shown,) = database.execute("select data from artifact where key like 'verdict-%'").fetchone()
    written = (plain / "runs" / PIPELINE / "gate" / "verdict.md").read_text(encoding="utf-8")
    assert not written.isascii(), "the verdict has a minus or an arrow"
    assert json.loads(shown) == written


@pytest.mark.long
def test_a_proxy_of_the_environment_is_not_asked_for_the_runs_own_server(plain: Path) -> None:
    dead = "http://127.0.0.1:9"
    ended = retrain(plain, HTTP_PROXY=dead, HTTPS_PROXY=dead, ALL_PROXY=dead, NO_PROXY="", no_proxy="")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.long
def test_a_profile_that_names_a_dead_server_is_told_without_a_traceback(plain: Path) -> None:
    profiles = plain.parent / "profiles.toml"
    profiles.write_text('active = "work"\n[profiles.work]\nPREFECT_API_URL = "http://127.0.0.1:9/api"\n')
    ended = retrain(plain, PREFECT_PROFILES_PATH=str(profiles))
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert f"which profile 'work' in {profiles} names, did not answer" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.long
def test_a_user_without_a_name_and_a_home_runs_the_line(plain: Path, tmp_path: Path) -> None:
    """As in a container that is started with a number of its own for the user."""
    nameless = (
        "import pwd\ndef nobody(uid):\n    raise KeyError(f'getpwuid(): uid not found: {uid}')\npwd.getpwuid = nobody\n"
    )
    (tmp_path / "sitecustomize.py").write_text(nameless)
    changes = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "PREFECT_HOME": ""}
    ended = retrain(plain, "env", "-u", "HOME", "-u", "LOGNAME", "-u", "USER", "-u", "XDG_CONFIG_HOME", **changes)
    assert ended.returncode == 0, ended.stdout + ended.stderr


GIT = """
[commit]
    gpgsign = true
[gpg]
    program = /bin/false
[user]
    useConfigOnly = true
[core]
    hooksPath = {hooks}
[color]
    ui = always
[diff]
    noprefix = true
    external = /bin/false
[log]
    showSignature = true
"""


@pytest.mark.long
def test_the_user_s_own_git_and_dvc_settings_stop_no_run(plain: Path, tmp_path: Path) -> None:
    for hook in ("pre-commit", "post-checkout", "post-index-change", "reference-transaction"):
        (tmp_path / "hooks").mkdir(exist_ok=True)
        (tmp_path / "hooks" / hook).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / "hooks" / hook).chmod(0o755)
    (tmp_path / "gitconfig").write_text(GIT.format(hooks=tmp_path / "hooks"))
    remote = "['remote \"mine\"']\nurl = s3://no-such-bucket/x\n[core]\nremote = mine\nautostage = true\n"
    (tmp_path / "config").write_text(remote)
    changes = {"GIT_CONFIG_GLOBAL": str(tmp_path / "gitconfig"), "DVC_GLOBAL_CONFIG_DIR": str(tmp_path)}
    ended = retrain(plain, **changes)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.long
def test_ctrl_c_ends_a_run_quietly(plain: Path) -> None:
    log = plain.parent / "interrupted"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.retrain", PIPELINE],
            cwd=plain,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(plain.parent / "prefect")},
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            # Tests that run in the background of a shell inherit that SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    end = time.monotonic() + 120
    while "Starting temporary server" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "Traceback" not in log.read_text()
