import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.errors import LockedError
from graftline.workflow.leases import hold_folder

HOLDER = """
import sys, time
from pathlib import Path
from graftline.workflow.leases import hold_folder
with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_told_who_holds_the_folder_and_since_when(tmp_path: Path, other: subprocess.Popen) -> None:
    with (
        pytest.raises(LockedError, match=rf"held by process {other.pid} on .+ since \d{{4}}-\d\d-\d\dT") as caught,
        hold_folder(tmp_path),
    ):
        pass
    assert "use another checkout" in str(caught.value)


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path, other: subprocess.Popen) -> None:
    other.kill()
    other.wait()
    with hold_folder(tmp_path, wait_seconds=5):
        assert (tmp_path / ".holder.json").is_file()


def test_the_folder_can_be_held_again_after_it_was_let_go(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        pass
    with hold_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".holder.json").read_text()
    assert not (tmp_path / ".holder.json").exists()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": 1}', "null"])
def test_a_holder_that_does_not_say_who_it_is_still_holds(tmp_path: Path, text: str) -> None:
    with hold_folder(tmp_path):
        (tmp_path / ".holder.json").write_text(text)
        with (
            pytest.raises(LockedError, match="is held by another run, which does not say who it is"),
            hold_folder(tmp_path),
        ):
            pass
