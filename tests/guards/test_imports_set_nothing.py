"""Importing a part changes nothing of the process that imports it: what has to be set is set by a call."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import csv, faulthandler, importlib, json, logging, os, pkgutil, signal, sys, warnings

OURS = ("graftline", "flows", "tasks")
by_us = []

def watch(owner, name):
    real = getattr(owner, name)
    def watched(*given, **options):
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").split(".")[0] in OURS:
            by_us.append(f"{caller.f_code.co_filename}:{caller.f_lineno} calls {name}")
        return real(*given, **options)
    setattr(owner, name, watched)

for owner, names in (
    (logging.Logger, ("addHandler", "addFilter", "setLevel")),
    (logging.Handler, ("addFilter", "setLevel")),
    (logging, ("basicConfig", "disable", "captureWarnings")),
    (warnings, ("simplefilter", "filterwarnings")),
    (os, ("putenv", "chdir", "umask")),
):
    for name in names:
        watch(owner, name)

def state():
    root = logging.getLogger()
    # Prefect's own console handler comes with Prefect.
    handlers = [repr(each) for each in root.handlers if type(each).__module__.split(".")[0] != "prefect"]
    return {
        # torch names a cache folder of its own when it is imported
        "environ": {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"},
        "root logger": [handlers, repr(root.filters), root.level],
        "csv": csv.field_size_limit(),
        "signals": {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "hook": repr(sys.excepthook),
        "faults": faulthandler.is_enabled(),
        "folder": os.getcwd(),
        "recursion": sys.getrecursionlimit(),
    }

before, changed, count = state(), [], 0
for top in OURS:
    package = importlib.import_module(top)
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{top}.")]
    for name in [top, *(name for name in names if not name.endswith("__main__"))]:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != "triton":  # It comes with torch's CUDA wheels only.
                raise
        count += 1
        now = state()
        changed += [f"{name} changes {key}: {before[key]} -> {now[key]}" for key in now if now[key] != before[key]]
        before = now
print(json.dumps({"changed": changed, "by us": by_us, "count": count}))
"""


def test_importing_every_module_changes_neither_environment_nor_logging_nor_csv_nor_signals(tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "HTTP_PROXY": "http://proxy.invalid:3128",
        "GRAFTLINE_LOG": "json",
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changed"] == []
    assert found["by us"] == []
    assert found["count"] > 200
