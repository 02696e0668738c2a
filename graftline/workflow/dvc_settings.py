"""DVC's settings of a checkout, for a worktree of it: caches and remotes mean the same folders in both.

DVC reads a relative path from the folder of the file that names it, so what a team commits in .dvc/config or keeps in
.dvc/config.local would lie inside the worktree, and go with it.
"""

import configparser
from pathlib import Path
from typing import Any

_CONFIG, _LOCAL = Path(".dvc", "config"), Path(".dvc", "config.local")


def cache_dir(root: Path) -> Path:
    """The DVC cache that a checkout uses, by all of DVC's configuration: the machine's, the user's, the project's."""
    from dvc.config import Config  # half a second to import

    named = Config(str(root / ".dvc"), validate=False).get("cache", {}).get("dir")
    return Path(named) if named else root / ".dvc" / "cache"


def copy(root: Path, tree: Path) -> None:
    """Write a worktree's .dvc/config.local: the checkout's own, with every path as it is meant in the checkout."""
    from dvc.config import Config, merge

    settings: dict[str, Any] = _read(tree / _CONFIG, meant_in=root / _CONFIG)
    merge(settings, _read(root / _LOCAL, meant_in=root / _LOCAL))
    merge(settings, {"cache": {"dir": str(cache_dir(root))}})
    (tree / ".dvc").mkdir(exist_ok=True)
    (tree / _LOCAL).unlink(missing_ok=True)
    with Config(str(tree / ".dvc"), validate=False).edit("local", validate=False) as local:
        merge(local, settings)


def _read(path: Path, *, meant_in: Path) -> dict[str, Any]:
    from dvc.config import Config

    if not path.is_file():
        return {}
    settings = Config._load_paths(Config.load_file(str(path)), str(meant_in))
    # Plain texts: DVC would write the paths that it resolved relative to the file again.
    absolute: dict[str, Any] = Config._map_dirs(settings, lambda path: str(path))
    return absolute


def write_cache_dir(root: Path, folder: Path) -> None:
    """Make a checkout use a DVC cache; written here because asking DVC to write it costs a second."""
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(root / _LOCAL, encoding="utf-8")
    if not settings.has_section("cache"):
        settings.add_section("cache")
    settings.set("cache", "dir", str(folder))
    (root / _LOCAL).parent.mkdir(exist_ok=True)
    with (root / _LOCAL).open("w", encoding="utf-8") as stream:
        settings.write(stream)
