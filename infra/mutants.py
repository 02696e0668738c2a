"""`make mutants`: change the code a little at a time, and see whether a test notices.

mutmut makes the mutants (its settings are in pyproject.toml) and runs the tests that reach each one. The modules of
`WHOLE` are tried whole. Of those of `SAMPLED`, a mutant is tried if the digest of its name and the seed says so: the
same ones each time, and an edit of one function changes no other function's. Survivors are compared with
infra/mutants.txt, where a line is a mutant that no test notices, below a comment that says why none has to: exit code 1
if there is another one, if one of them has died, or if nobody has said why.

    make mutants                                        the whole comparison
    make mutants ONLY="--only graftline.registry.policy."    that of a part, in minutes
    make mutants UPDATE=--update                        write what survives into the list, to be looked at
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "infra" / "mutants.txt"
WHOLE = ("graftline.evaluate.statistics.", "graftline.registry.policy.")
SAMPLED = ("graftline.registry.", "graftline.weights.quant.", "graftline.train.packing.")
SAMPLE = 0.02
"""Share of the mutants of `SAMPLED`."""
SEED = 0
_NOTICED = {1, 3, 24, 36, -24, 152, 255, -11, -9}
"""Exit codes of mutmut's workers: a test failed, the tests took too long, or the process died."""
_SPINNER = re.compile(r"(?m)^.*[⠀-⣿].*\n?")
"""What mutmut writes to show that it is alive, some hundred times."""
TO_DO = "# Not looked at yet: write a test that notices, or say in a comment why none has to."
_HEADING = "# Mutants that no test notices, each below the reason why none has to (`make mutants`)."


def mutmut(*words: str) -> str:
    """Run mutmut in this checkout; its output.

    Raises:
        SystemExit: it failed, for example because the tests fail without any mutation.
    """
    command = [str(Path(sys.executable).parent / "mutmut"), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        told = _SPINNER.sub("", done.stdout + done.stderr)
        raise SystemExit(f"mutmut {words[0]} failed:\n{told[-3000:]}")
    return done.stdout


def results() -> dict[str, int | None]:
    """Every mutant's exit code by its name; None where it was not tried."""
    found: dict[str, int | None] = {}
    for file in sorted((ROOT / "mutants" / "graftline").rglob("*.meta")):
        found |= json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def sample(names: Iterable[str], *, share: float = SAMPLE, seed: int = SEED) -> list[str]:
    """The mutants of `SAMPLED` that are tried."""
    chosen = [name for name in names if name.startswith(SAMPLED) and not name.startswith(WHOLE)]
    return [name for name in chosen if _fraction(f"{seed}:{name}") < share]


def _fraction(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def survivors(tried: Mapping[str, int | None]) -> list[str]:
    """A line for every mutant that no test noticed: its function, and what was changed. Sorted."""
    return sorted(described(name, mutmut("show", name)) for name, code in tried.items() if code not in _NOTICED)


def described(name: str, diff: str) -> str:
    """A mutant in a line that stays the same while its function does: the function, what was there, and what is."""
    changed = re.findall(r"^([-+])(?![-+]{2} )(.*)$", diff, flags=re.MULTILINE)
    function = re.sub(r"__mutmut_\d+$", "", name)
    return f"{function}: " + " ".join(f"{sign} {' '.join(text.split())}" for sign, text in changed)


def known(file: Path) -> list[str]:
    """The survivors that are listed; none before the first list was made."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [line for line in lines if line and not line.startswith("#")]


def unexplained(file: Path) -> list[str]:
    """The survivors of the list that stand below no reason."""
    found, is_explained = list[str](), False
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        if not line:
            is_explained = False
        elif line.startswith("#"):
            is_explained = line not in (TO_DO, _HEADING)
        elif not is_explained:
            found.append(line)
    return found


def updated(file: Path, found: Iterable[str], *, only: str = "") -> str:
    """The list with what survives now: lines that are there stay below their reasons, dead ones go, new ones come last.

    ``only``: of other modules nothing is known, so their lines stay.
    """
    survive, text = list(found), file.read_text(encoding="utf-8") if file.exists() else f"{_HEADING}\n"
    kept = [
        line
        for line in text.splitlines()
        if not line or line.startswith("#") or line in survive or line[: len(only)] != only
    ]
    new = [line for line in survive if line not in kept]
    return "\n".join([*kept, *(["", TO_DO, *new] if new else [])]) + "\n"


def compare(file: Path, found: Iterable[str], *, only: str = "") -> tuple[str, int]:
    """What differs between the survivors and the list, in words, and the exit code."""
    survive, listed = list(found), [line for line in known(file) if line.startswith(only)]
    parts = {
        "new; write a test that notices": [line for line in survive if line not in listed],
        f"dead; take out of {file.name}": [line for line in listed if line not in survive],
        "without a reason; write one above": [line for line in unexplained(file) if line.startswith(only)],
    }
    told = "\n".join(
        "\n".join([f"{heading}:", *lines]) if lines else f"{heading}: none" for heading, lines in parts.items()
    )
    return told, 1 if any(parts.values()) else 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the survivors into infra/mutants.txt")
    parser.add_argument("--children", default="2", help="processes at once")
    parser.add_argument("--only", default="", metavar="PREFIX", help="try only the mutants whose names begin so")
    given = parser.parse_args()
    whole = [prefix for prefix in WHOLE if prefix.startswith(given.only) or given.only.startswith(prefix)]
    if whole:
        mutmut("run", "--max-children", given.children, *(f"{max(prefix, given.only, key=len)}*" for prefix in whole))
    chosen = [name for name in sample(results()) if name.startswith(given.only)]
    if chosen:
        mutmut("run", "--max-children", given.children, *chosen)
    tried = {
        name: code
        for name, code in results().items()
        if name.startswith(given.only) and (name.startswith(WHOLE) or name in set(chosen))
    }
    found = survivors(tried)
    print(f"{len(tried)} mutants, {len(chosen)} of them sampled with seed {SEED}; {len(found)} survive")
    if given.update:
        LIST.write_text(updated(LIST, found, only=given.only), encoding="utf-8")
    told, code = compare(LIST, found, only=given.only)
    print(told)
    return code


if __name__ == "__main__":
    sys.exit(main())
