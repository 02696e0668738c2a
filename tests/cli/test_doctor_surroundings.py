"""What the doctor says about a user's own settings and a machine that is set up otherwise."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from graftline import limits
from graftline.doctor import Finding, machine, prefect_server, surroundings

DEAD = "http://127.0.0.1:9/api"


@pytest.fixture(autouse=True)
def _nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who has set nothing."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "DVC_", "PYTHONO", "GIT_"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / ".config"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def found(folder: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in surroundings.look(folder)}


def test_a_dead_server_of_the_user_s_profile_is_named_with_its_file(tmp_path: Path) -> None:
    profiles = write(
        tmp_path / "home" / ".prefect" / "profiles.toml",
        f'active = "work"\n[profiles.work]\nPREFECT_API_URL = "{DEAD}"\n[profiles.ephemeral]\n',
    )
    finding = prefect_server.look()
    assert finding.status == "missing"
    assert f"{DEAD} (profile 'work' in {profiles}) does not answer" in finding.found
    assert finding.advice.endswith("prefect profile use ephemeral")


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({}, "profile 'work'"),
        ({"PREFECT_PROFILE": "ephemeral"}, None),
        ({"PREFECT_PROFILE": "absent"}, None),
        ({"PREFECT_API_URL": DEAD}, "PREFECT_API_URL"),
        ({"PREFECT_HOME": "/nowhere"}, None),
    ],
)
def test_the_server_is_that_which_prefect_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], source: str | None
) -> None:
    text = f'active = "work"\n[profiles.work]\nPREFECT_API_URL = "{DEAD}"\n[profiles.ephemeral]\n'
    write(tmp_path / "home" / ".prefect" / "profiles.toml", text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = prefect_server.configured()
    assert (server and server.source.partition(" in ")[0]) == source
    code = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value())"
    if source is not None:
        real = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert real.stdout.strip() == DEAD, real.stderr


@pytest.mark.parametrize("text", ["active = ", 'active = "work"', "active = 3\nprofiles = 4", ""])
def test_profiles_that_cannot_be_read_name_no_server(tmp_path: Path, text: str) -> None:
    write(tmp_path / "home" / ".prefect" / "profiles.toml", text)
    assert prefect_server.configured() is None
    finding = prefect_server.look()
    assert (finding.status == "missing" and "profiles.toml is not valid TOML" in finding.found) == (text == "active = ")


@pytest.mark.parametrize("home", ["/proc/nobody", "/proc", None])
def test_prefect_s_files_lie_in_the_project_where_the_home_folder_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("GRAFTLINE_CACHE", raising=False)
    monkeypatch.setenv("LOGNAME", "ada")
    assert prefect_server.stand_ins(tmp_path) == {}
    if home is None:  # and a user without an entry in the passwd file
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith("/proc"))
    cache = tmp_path / ".cache"
    needed = {"HOME": str(cache)} if home is None else {}  # Prefect cannot be imported without one
    assert prefect_server.stand_ins(tmp_path) == {"PREFECT_HOME": str(cache / "prefect")} | needed
    assert (cache / "prefect").is_dir()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert prefect_server.stand_ins(tmp_path)["LOGNAME"] == f"uid-{os.getuid()}"
    monkeypatch.setenv("PREFECT_HOME", "/elsewhere")
    assert ("HOME" in prefect_server.stand_ins(tmp_path)) == (home is None)


def test_the_user_s_own_dvc_settings_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "home" / ".config" / "dvc" / "config", "[core]\n    remote = mine\n    analytics = false\n")
    assert found(tmp_path)["dvc configuration"].found == f"{path} sets core.remote"
    write(path, "nonsense")
    assert found(tmp_path)["dvc configuration"].status == "missing"


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def test_git_settings_that_change_bytes_are_told(tmp_path: Path) -> None:
    git(tmp_path, "init")
    assert not [name for name in found(tmp_path) if name.startswith("git")]
    git(tmp_path, "config", "core.autocrlf", "true")
    assert found(tmp_path)["git core.autocrlf"].advice.endswith("git config core.autocrlf false")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a folder to another user")
def test_a_repository_of_another_user_is_told_with_git_s_own_remedy(tmp_path: Path) -> None:
    git(tmp_path, "init")
    os.chown(tmp_path, 12345, 12345)
    finding = found(tmp_path)["git repository"]
    assert (finding.status, finding.advice) == ("missing", f"git config --global --add safe.directory {tmp_path}")
    assert "dubious ownership" in finding.found


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "home" not in found(tmp_path)
    monkeypatch.setenv("HOME", "/proc/nobody")
    assert "/proc/nobody cannot be written" in found(tmp_path)["home"].found


def test_folders_for_temporary_files_that_are_not_there_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert found(tmp_path)["temporary files"].status == "missing"


def test_a_locale_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    variables = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "graftline", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, capture_output=True, encoding="utf-8")
    assert "Traceback" not in done.stderr
    assert "note    locale " in done.stdout


def test_python_s_option_that_leaves_out_assertions_is_told() -> None:
    # No more than the look itself: with -O Python compiles all that is imported anew.
    code = (
        "from pathlib import Path; from graftline.doctor import surroundings; "
        "print([finding.status for finding in surroundings.look(Path('/')) if finding.name == 'python -O'])"
    )
    variables = os.environ | {"PYTHONOPTIMIZE": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.stdout == "['note']\n", done.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become a user without a name")
def test_a_user_without_a_name_is_told(tmp_path: Path) -> None:
    # Imported before it becomes another: that user may not be allowed to read this checkout.
    code = (
        "import os; from pathlib import Path; from graftline.doctor import surroundings; os.setuid(54321); "
        "print([finding.found for finding in surroundings.look(Path('/')) if finding.name == 'user'])"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "['user 54321 has no name here']\n", done.stderr


def test_a_limit_on_memory_and_on_processor_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_limits", lambda: [limits.MemoryLimit(2 << 30, 1 << 30, "ulimit -v")])
    monkeypatch.setattr(limits, "cpu_quota", lambda: 0.5)
    assert machine._memory().status == "note"
    assert machine._memory().found.endswith("GiB free, but ulimit -v allows 2.0 GiB: 1.0 GiB left")
    assert "1 cores usable" in machine._threads().found
    assert "processor time of 0.5 cores allowed" in machine._threads().found


@pytest.mark.parametrize("address", ["socks5://127.0.0.1:9", "SOCKS5H://127.0.0.1:9"])
def test_a_socks_proxy_that_no_client_can_speak_to_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("ALL_PROXY", address)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [finding.status for finding in machine.proxy()] == ["missing"]
