"""Full and broken disks, read-only mounts, kills and power losses: what a stage leaves, and what the next run makes.

disks  each kind of error, kills and power losses at drawn writes of every stage; then whole lines killed several times

A tiny line without DVC and Prefect: its stages run in forked processes, on a real file system. faults.c, which is
preloaded, counts the C library's calls that change something below the project and makes the n-th one fail. Before a
stage runs again its outputs are removed, as DVC does. What must hold after an error: exit code 2 and one line that says
why, no traceback. After anything: no file that others read is torn, and the next run's files have the bytes of a run
that was not disturbed. In a power loss, files that were written and not synced lose their second half, or all of it;
names are kept, as if renames were on the disk before the bytes.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from studies.harness import Json, Setting, own_process

PIPELINE = "pets"
STAGES = ("resolve", "fetch", "validate", "init", "train", "evaluate", "merge", "gate", "package", "release")
KINDS = {"full disk": errno.ENOSPC, "broken disk": errno.EIO, "read-only mount": errno.EROFS}
KILL = 1000 + signal.SIGKILL
"""faults.c kills the process."""
NOTHING = 0
_JOURNALS = re.compile(r"/steps\.jsonl$|^cache/scores/.*/items-\d+\.jsonl$")
"""What the next run goes on with: a journal up to its last whole line (checkpoints have a copy), batches of scores."""
_MEASURED = re.compile(r"/(stage|memory)\.json$|^cache/scores/.*/items-\d+\.jsonl$|^store/leases/")
"""What a disturbed run may leave differently: measured numbers, batches of scores, leases of those who died."""
_TIMES = re.compile(r"\d{8}T\d{6}(\.\d+)?Z(-[0-9a-f]{12})?")
"""In names of releases and of Great Expectations' pages."""
_WORDS = {"cat": ["purrs", "meows", "climbs"], "dog": ["barks", "fetches", "digs"]}
_SETTINGS: dict[str, Any] = {
    "base": {"source": "path:base", "dtype": "float32", "template": "none"},
    "data": {"source": "path:rows.jsonl", "evaluation_rows": 24, "max_tokens": 64, "labels": ["cat", "dog"]},
    "quantize": {"method": "none"},
    "adapter": {"method": "lora", "rank": 2, "alpha": 4},
    "train": {"steps": 4, "batch_size": 8, "learning_rate": 0.01, "threads": 1, "checkpoint_every": 2},
    "evaluate": {"metric": "accuracy"},
    "gates": {
        "accuracy": {
            "metric": "accuracy",
            "direction": "higher",
            "test": "non-inferiority",
            "margin": 0.9,
            "min_items": 24,
            "against": "base",
        }
    },
    "guards": {"stops": "off"},
    "package": {"merged": True, "dtype": "float32"},
    "release": {"store": "store", "channel": "production"},
}


@dataclass
class Line:
    """A tiny project, its stages, and what an undisturbed run leaves."""

    work: Path
    counts: dict[str, int] = field(default_factory=dict)
    """Calls that change something, a stage."""
    after: dict[str, dict[str, str]] = field(default_factory=dict)
    """Digests of the files after each stage."""
    varies: set[str] = field(default_factory=set)
    """Files that two undisturbed lines write differently, because they hold times."""

    unsynced: dict[str, list[str]] = field(default_factory=dict)
    """Files that a stage wrote, that are not partial, and that a power loss after its end would cut."""

    @property
    def root(self) -> Path:
        """The project; always the same path, which records may hold."""
        return self.work / "project"

    def before(self, stage: str) -> Path:
        """A copy of the project as it is before a stage."""
        return self.work / "before" / stage

    def restore(self, stage: str) -> None:
        """Put the project back to what it was before a stage."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.before(stage), self.root, symlinks=True)


@dataclass(frozen=True)
class Ended:
    """How a stage's process ended."""

    code: int
    """Exit code; minus the signal."""
    calls: int
    said: str
    """What it printed on stderr."""
    log: Path
    """faults.c's log."""


# --- one stage in one process --------------------------------------------------------------------------------------


def run_stage(line: Line, stages: Iterable[str], fault: int = NOTHING, at: int = 0) -> Ended:
    """Run stages one after another in a forked process, with a fault at its call number ``at``."""
    log, said, counted = (line.work / name for name in ("calls.log", "stderr.txt", "count.txt"))
    for file in (log, said, counted):
        file.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _take_over(line.root, said)
            library = ctypes.CDLL(None)
            library.faults_arm(os.fsencode(line.root), os.fsencode(log), fault, ctypes.c_long(at))
            code = _guarded(stages)
            library.faults_count.restype = ctypes.c_long
            counted.write_text(str(library.faults_count()), encoding="utf-8")
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    calls = int(counted.read_text(encoding="utf-8")) if counted.exists() else at
    return Ended(code, calls, said.read_text(encoding="utf-8", errors="replace"), log)


def _take_over(root: Path, said: Path) -> None:
    os.chdir(root)
    for number, file in ((1, os.devnull), (2, str(said))):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)


def _guarded(stages: Iterable[str]) -> int:
    """Exit code of the stages, as Python's own end of a program gives it."""
    try:
        for name in stages:
            sys.argv = [name, PIPELINE]
            import_module("graftline.workflow.resolve" if name == "resolve" else f"tasks.{name}").main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # as Python itself ends
        traceback.print_exc()
        return 1
    return 0


def forget_outputs(root: Path, stage: str) -> None:
    """Remove a stage's outputs, as DVC does before it runs the stage."""
    if stage != "resolve":
        shutil.rmtree(root / "runs" / PIPELINE / stage, ignore_errors=True)


# --- files ---------------------------------------------------------------------------------------------------------


def digests(root: Path) -> dict[str, str]:
    """Digest of every file by its path, without those that are hidden or partial by their name; times are cut out."""
    found: dict[str, str] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not is_partial(name):
            name = _TIMES.sub("TIME", name)
            while name in found:
                name += " (another)"
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def is_partial(name: str) -> bool:
    """Whether a path says of itself that it is not complete: no reader opens it."""
    parts = [part for part in Path(name).parts if part not in (".cache", ".work", ".dvc")]
    return any(
        part.startswith(".") or part in ("partial", "lock", "locks") or part.endswith((".part", ".lock"))
        for part in parts
    )


def torn(line: Line, stage: str, *, outputs: bool) -> list[str]:
    """Files whose bytes are neither those before a stage nor those after it: among its ``outputs``, or elsewhere."""
    before, after = digests(line.before(stage)), line.after[stage]
    own = f"runs/{PIPELINE}/{stage}/"
    found = []
    for name, digest in digests(line.root).items():
        known = (
            name in line.varies
            or _JOURNALS.search(name)
            or _MEASURED.search(name)
            or digest in (before.get(name), after.get(name))
        )
        if name.startswith(own) == outputs and not known:
            found.append(name)
    lost = before.keys() & after.keys() - digests(line.root).keys()
    return found + ([] if outputs else [f"lost: {name}" for name in sorted(lost) if not name.startswith(own)])


def lose_power(log: Path, draw: random.Random) -> list[str]:
    """Cut what was written and not synced, by the log of a process that ended; the files that were cut."""
    cut = unsynced(log)
    for name in cut:
        os.truncate(name, draw.choice((0, Path(name).stat().st_size // 2)))
    return cut


def unsynced(log: Path) -> list[str]:
    """The files that were written and not synced since, under the names that they have now."""
    found: set[str] = set()
    for entry in log.read_text(encoding="utf-8", errors="replace").splitlines():
        what, path, other = (*entry.split("\t"), "", "")[:3]
        if what in "WO":
            found.add(path)
        elif what == "S":
            found.discard(path)
        elif what == "R":
            moved = {name for name in found if name == path or name.startswith(f"{path}/")}
            found = (found - moved - {other}) | {other + name[len(path) :] for name in moved}
        elif what == "D":
            found.discard(path)
    return [name for name in sorted(found) if Path(name).is_file() and not Path(name).is_symlink()]


# --- the line ------------------------------------------------------------------------------------------------------


def prepare(work: Path) -> Line:
    """Make the project, and run it undisturbed: once here, which imports everything, and twice as faults will."""
    from ruamel.yaml import YAML

    from studies.models import make_tiny_llama

    line = Line(work.resolve())
    make_tiny_llama(line.root / "base", num_hidden_layers=1)
    draw = random.Random(0)
    rows = []
    for index in range(72):
        label = ("cat", "dog")[index % 2]
        noise = " ".join(draw.choice("abcdefghijklmnopqrstuvwxyz") * 2 for _ in range(6))
        rows.append({"prompt": f"{noise} {draw.choice(_WORDS[label])}:", "completion": f" {label}"})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (line.root / "rows.jsonl").write_text(text, encoding="utf-8")
    with (line.root / "pipelines.yaml").open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump({"pipelines": {PIPELINE: _SETTINGS}, "channels": {"production": {}}}, stream)
    (line.root / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    os.environ["GRAFTLINE_CACHE"] = str(line.root / "cache")
    shutil.copytree(line.root, line.before("resolve"))
    os.chdir(line.root)
    if code := _guarded(STAGES):
        raise SystemExit(f"the undisturbed line ended with {code}")
    first = digests(line.root)
    line.restore(STAGES[0])
    for stage, following in zip(STAGES, [*STAGES[1:], None], strict=True):
        _record(line, stage)
        if following:
            shutil.copytree(line.root, line.before(following), symlinks=True)
    line.varies = _unlike(first, line.after[STAGES[-1]])
    return line


def _record(line: Line, stage: str) -> None:
    """What an undisturbed stage leaves, and how many calls it takes."""
    ended = run_stage(line, [stage])
    if ended.code:
        raise SystemExit(f"stage {stage} ended with {ended.code}, undisturbed: {ended.said[-2000:]}")
    names = (Path(name).relative_to(line.root).as_posix() for name in unsynced(ended.log))
    line.unsynced[stage] = [name for name in names if not is_partial(name) and not _JOURNALS.search(name)]
    line.counts[stage], line.after[stage] = ended.calls, digests(line.root)


def _unlike(first: dict[str, str], second: dict[str, str]) -> set[str]:
    return {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}


def differs(line: Line, stage: str) -> list[str]:
    """Files that are not what an undisturbed run leaves after a stage."""
    names = _unlike(digests(line.root), line.after[stage]) - line.varies
    return sorted(name for name in names if not _MEASURED.search(name))


def shares(counts: dict[str, int], total: int) -> dict[str, int]:
    """How many faults each stage gets: at most one a call, otherwise as equal as can be."""
    given = dict.fromkeys(counts, 0)
    while sum(given.values()) < min(total, sum(counts.values())):
        stage = min((name for name in counts if given[name] < counts[name]), key=given.__getitem__)
        given[stage] += 1
    return given


def drawn(line: Line, total: int, seed: int) -> list[tuple[str, int]]:
    """Stages and numbers of calls, all different."""
    draw = random.Random(seed)
    given = shares(line.counts, total)
    return [
        (stage, at) for stage in STAGES for at in sorted(draw.sample(range(1, line.counts[stage] + 1), given[stage]))
    ]


# --- the parts -----------------------------------------------------------------------------------------------------


def disks(setting: Setting) -> Json:
    """Everything in one process, which has imported what the stages need."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler (cc) was found: install gcc, or run the other studies")
    library, source = setting.work / "faults.so", Path(__file__).with_suffix(".c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    variables = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1"}
    sizes = setting.size((90, 115, 12), (2, 2, 1))
    found = own_process(_disturbed, setting.folder("line"), sizes, setting.seed, environment=variables)
    assert not found["wrong"], found["wrong"][:5]
    return found


def _disturbed(work: Path, sizes: tuple[int, int, int], seed: int) -> Json:
    line = prepare(work)
    found: Counter[str] = Counter()
    wrong: list[Json] = []
    parts = ((_errors, sizes[0]), (_losses, sizes[1]), (_kills, sizes[2]))
    for part, total in parts:
        for problem in part(line, total, seed, found):
            wrong.append(problem)
            print(json.dumps(problem), file=sys.stderr, flush=True)
    return {
        "seed": seed,
        "calls of each stage": line.counts,
        "counted": dict(sorted(found.items())),
        "files that hold times": sorted(line.varies),
        "wrong": wrong,
    }


def _errors(line: Line, total: int, seed: int, found: Counter[str]) -> Iterator[Json]:
    """Every kind of error at so many calls."""
    for kind, number in KINDS.items():
        for stage, at in drawn(line, total, seed + number):
            line.restore(stage)
            ended = run_stage(line, [stage], number, at)
            for problem in _said_wrongly(ended) + _left_wrongly(line, stage, ended):
                yield {"fault": kind, "stage": stage, "call": at, "problem": problem}
            found.update([kind, f"errors: exit code {ended.code}"])


def _losses(line: Line, total: int, seed: int, found: Counter[str]) -> Iterator[Json]:
    """The process killed at so many calls, without and with a power loss, and a power loss after each stage's end."""
    for stage, names in line.unsynced.items():
        yield from ({"fault": "power loss after the end", "stage": stage, "problem": name} for name in names)
    for kind in ("kill", "power loss"):
        for stage, at in drawn(line, total, seed + len(kind)):
            line.restore(stage)
            ended = run_stage(line, [stage], KILL, at)
            cut = lose_power(ended.log, random.Random(seed + at)) if kind == "power loss" else []
            for problem in _left_wrongly(line, stage, ended):
                yield {"fault": kind, "stage": stage, "call": at, "problem": problem}
            found.update([kind, *(["power losses: files cut"] * len(cut))])


def _kills(line: Line, total: int, seed: int, found: Counter[str]) -> Iterator[Json]:
    """So many whole lines, each killed at four to seven drawn calls; in every second one the power goes, too."""
    draw = random.Random(seed)
    for number in range(total):
        line.restore(STAGES[0])
        done, spared = 0, draw.randrange(4, 8)
        while done < len(STAGES):
            left = sum(line.counts[stage] for stage in STAGES[done:])
            at = draw.randrange(1, max(2, left // 2)) if spared > 0 else 0
            for stage in STAGES[done:]:
                ended = run_stage(line, [stage], KILL if at else NOTHING, at)
                if ended.code:
                    break
                at, done = max(at - ended.calls, 0), done + 1
            if ended.code == -signal.SIGKILL:
                found["lines: kills"] += 1
                spared -= 1
                if number % 2:
                    lose_power(ended.log, draw)
                    found["lines: kills that were power losses"] += 1
                forget_outputs(line.root, stage)
            elif ended.code:
                yield {"fault": "kills", "line": number, "stage": stage, "problem": ended.said[-700:]}
                break
        for name in differs(line, STAGES[-1]):
            yield {"fault": "kills", "line": number, "stage": "release", "problem": f"other bytes in the end: {name}"}
        found["lines"] += 1


def _said_wrongly(ended: Ended) -> list[str]:
    """What is wrong with how an error was told."""
    lines = [text for text in ended.said.splitlines() if text.startswith(("error: ", "error (may pass): "))]
    found = ["traceback: " + ended.said[-700:]] if "Traceback (most recent call last)" in ended.said else []
    if ended.code not in (0, 2, 75):
        found.append(f"exit code {ended.code}")
    if ended.code and not found and len(lines) != 1:
        found.append(f"{len(lines)} lines of error: {ended.said[-300:]}")
    return found


def _left_wrongly(line: Line, stage: str, ended: Ended) -> list[str]:
    """What is wrong with the files, and with those of the next run."""
    found = [f"torn: {name}" for name in torn(line, stage, outputs=False)]
    if ended.code == 2:
        found += [f"half written in the outputs: {name}" for name in torn(line, stage, outputs=True)]
    if ended.code:
        forget_outputs(line.root, stage)
        again = run_stage(line, [stage])
        if again.code:
            return [*found, f"the next run ended with {again.code}: {again.said[-700:]}"]
    return found + [f"other bytes in the end: {name}" for name in differs(line, stage)]


PARTS = {"disks": disks}
