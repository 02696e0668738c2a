"""The build, where pyproject.toml cannot say it: the files that `graftline init` writes go into the wheel."""

import os
import runpy
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent

# Equal sources give equal wheels: an archive records the dates and modes of files, which depend on the checkout and the
# mask.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980: the first year that a zip archive knows
os.umask(0o022)


class BuildWithProject(build_py):
    """Copies this repository's own flows, tasks and what stands beside them to graftline/scaffold/project."""

    def run(self) -> None:
        """Build the packages, then copy; an editable install reads the files where they are."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "graftline" / "scaffold" / "project"
        shutil.rmtree(target, ignore_errors=True)
        for name in runpy.run_path(str(ROOT / "graftline" / "scaffold" / "copied.py"))["paths"](ROOT):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)
        for path in Path(self.build_lib).rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)


setup(cmdclass={"build_py": BuildWithProject})
