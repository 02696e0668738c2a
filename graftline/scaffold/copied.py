"""Which files of graftline's own repository every project has, too. They are kept once, there: setup.py runs this file.

It imports nothing but the standard library, because nothing else is installed while a wheel is built.
"""

from pathlib import Path

PATTERNS = (
    ".dvc/config",
    ".dvcignore",
    ".github/workflows/evaluate-pr.yaml",
    "flows/*.py",
    "infra/.gitignore",
    "infra/ci/gitlab.yaml",
    "infra/compose.yaml",
    "infra/env.example",
    "prefect.yaml",
    "tasks/*.py",
    "tests/test_project.py",
)


def paths(root: Path) -> list[str]:
    """Paths of the files below ``root``, with forward slashes, sorted.

    Raises:
        FileNotFoundError: a pattern leads to nothing.
    """
    found = {pattern: [path for path in root.glob(pattern) if path.is_file()] for pattern in PATTERNS}
    if missing := [pattern for pattern, files in found.items() if not files]:
        raise FileNotFoundError(f"{', '.join(missing)} missing in {root}: files that every project has")
    return sorted(path.relative_to(root).as_posix() for files in found.values() for path in files)
