"""What a process may use under the limits of containers, schedulers and shells: files as the kernel writes them."""

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from graftline import limits
from graftline.errors import ConfigError
from graftline.train.devices import free_bytes, what_limits

UNLIMITED_OLD = {
    "memory.limit_in_bytes": "9223372036854771712",
    "memory.usage_in_bytes": "1",
    "memory.stat": "total_inactive_file 0",
}
OLD = {
    "memory.limit_in_bytes": "5000",
    "memory.usage_in_bytes": "4000",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 700",
}
NEW = {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 3000\ninactive_file 700"}


def put(folder: Path, files: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups lie in this test; nothing else limits the process."""
    monkeypatch.setattr(limits, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return tmp_path / "cgroup"


def be_in(root: Path, *lines: str) -> None:
    root.with_name("own").write_text("".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize(
    ("own", "folder", "files"),
    [
        ("0::/", ".", NEW),
        ("0::/system.slice/job_7/step_0", "system.slice/job_7/step_0", NEW),
        ("0::/system.slice/job_7/step_0", "system.slice/job_7", NEW),  # SLURM: the job's limit, not the step's
        ("0::/docker/0123", ".", NEW),  # a container that sees its own group as the root
        ("0::/../../other", ".", NEW),  # a process that was moved out of the namespace's root
        ("0::/a", "unified/a", NEW),
        ("4:memory:/docker/0123", "memory/docker/0123", OLD),
        ("4:memory:/docker/0123", "memory", OLD),
        ("4:memory:/kubepods/burstable/pod1/0123", "memory/kubepods/burstable", OLD),
        ("9:cpu,memory:/a", "cpu,memory/a", OLD),
        ("9:cpu,memory:/a", "memory/a", OLD),
    ],
)
def test_the_limit_of_the_process_s_own_group_and_of_those_above_counts(
    root: Path, own: str, folder: str, files: dict[str, str]
) -> None:
    be_in(root, "1:name=systemd:/somewhere", own)
    put(root / folder, files)
    (limit,) = limits.memory_limits()
    assert (limit.limit, limit.left) == (5000, 1700), "what was read and can go is free"
    assert free_bytes("cpu") == 1700
    assert what_limits("cpu") == f" within the 0.00 GB that control group {(root / folder).resolve()} allows"


@pytest.mark.parametrize(
    ("own", "folder", "files"),
    [
        ("0::/", ".", NEW | {"memory.max": "max"}),
        ("0::/a", "b", NEW),
        ("4:memory:/", "memory", UNLIMITED_OLD),
        ("4:cpu:/a", "memory/a", OLD),
        ("0::/", ".", {}),
        ("nonsense", ".", {}),
    ],
)
def test_where_nothing_limits_memory_what_the_machine_has_free_counts(
    root: Path, own: str, folder: str, files: dict[str, str]
) -> None:
    be_in(root, own)
    put(root / folder, files)
    assert limits.memory_limits() == []
    assert free_bytes("cpu") > 10**6
    assert what_limits("cpu") == ""


def test_the_tightest_of_nested_limits_comes_first(root: Path) -> None:
    be_in(root, "0::/a/b")
    put(root / "a", NEW)
    put(root / "a" / "b", NEW | {"memory.max": "9000"})
    assert [limit.left for limit in limits.memory_limits()] == [1700, 5700]


@pytest.mark.parametrize(
    ("own", "folder", "files", "quota"),
    [
        (
            "0::/a",
            "a",
            {
                "cpu.max": "150000 100000",
            },
            1.5,
        ),
        ("0::/a/b", "a", {"cpu.max": "50000 100000", "memory.max": "max"}, 0.5),
        ("0::/a", "a", {"cpu.max": "max 100000"}, None),
        ("3:cpu,cpuacct:/a", "cpu,cpuacct/a", {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}, 1.0),
        ("3:cpu,cpuacct:/a", "cpu", {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}, 1.0),
        ("3:cpu,cpuacct:/a", "cpu/a", {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_a_quota_of_processor_time_limits_the_threads(
    root: Path, monkeypatch: pytest.MonkeyPatch, own: str, folder: str, files: dict[str, str], quota: float | None
) -> None:
    be_in(root, own)
    put(root / folder, files)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert limits.cpu_quota() == quota
    assert limits.usable_cores() == {None: 64, 0.5: 1, 1.0: 1, 1.5: 2}[quota]


def test_the_shell_s_limit_on_address_space_counts() -> None:
    code = "from graftline import limits; print(limits.memory_limits()[0])"
    done = subprocess.run(
        ["sh", "-c", f"ulimit -v 2000000; exec {sys.executable} -c '{code}'"], capture_output=True, text=True
    )
    assert "MemoryLimit(limit=2048000000, left=" in done.stdout, done.stderr
    assert "source='ulimit -v'" in done.stdout


def test_a_kill_for_lack_of_memory_is_told_from_another(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MACHINE", root / "vmstat")
    be_in(root, "0::/a")
    put(root / "a", NEW | {"memory.events": "low 0\noom 3\noom_kill 2"})
    before = limits.memory_kills()
    assert limits.why_killed(before).startswith("what sent SIGKILL is not known")
    put(root / "a", {"memory.events": "low 0\noom 4\noom_kill 3"})
    assert limits.why_killed(before).startswith(
        f"the kernel ended it because memory ran out: control group {root}/a allows"
    )


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of this machine's own, of version 1, that allows 300 MB."""
    mine = [line.split(":") for line in limits._OWN_GROUP.read_text().splitlines() if line.split(":")[1] == "memory"]
    group = Path("/sys/fs/cgroup/memory", *(path.strip("/") for *_, path in mine), f"test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("300000000")
    except OSError as error:
        pytest.skip(f"a control group of version 1 cannot be made here: {error}")
    yield group
    with contextlib.suppress(OSError):
        group.rmdir()


def test_a_real_group_s_limit_and_its_kill_are_seen(real_group: Path) -> None:
    code = (
        "import subprocess, sys; from graftline import limits\n"
        "before = limits.memory_kills(); print(limits.memory_limits()[0].limit)\n"
        "print(subprocess.run([sys.executable, '-c', 'bytearray(600_000_000)']).returncode)\n"
        "print(limits.why_killed(before))\n"
    )
    join = f'echo $$ > {real_group}/cgroup.procs && exec {sys.executable} -c "$0"'
    done = subprocess.run(["sh", "-c", join, code], capture_output=True, text=True)
    limit, ended, why = done.stdout.splitlines()
    assert 299_000_000 < int(limit) <= 300_000_000
    assert ended == "-9"
    assert why.startswith("the kernel ended it because memory ran out: control group")


def test_cores_that_were_set_aside_are_a_limit_and_a_wrong_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(limits.CORES_VARIABLE, "1")
    assert limits.usable_cores() == 1
    monkeypatch.setenv(limits.CORES_VARIABLE, "100000")
    beside = limits.usable_cores()
    monkeypatch.delenv(limits.CORES_VARIABLE)
    assert limits.usable_cores() == beside
    for wrong in ("", "0", "-1", "two", "1.5", "²"):
        monkeypatch.setenv(limits.CORES_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=r"GRAFTLINE_CORES=.*; expected a number of cores"):
            limits.usable_cores()


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]),
        ("0,-1,1", ["0"]),
    ],
)
def test_gpus_are_those_that_cuda_would_see(given: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert limits.visible_gpus() == seen
