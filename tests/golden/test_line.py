"""The line from rows to a package, on the tiny base: what each stage leaves that no clock and no processor decides."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.golden import product
from tests.golden.record import Bound, Golden
from tests.golden.world import make_project, write_pipeline

BOUND = Bound(relative=1e-4, absolute=1e-4)
_PIPELINE: dict[str, Any] = {
    "train.steps": 30,
    "train.learning_rate": 0.02,
    "quantize.method": "nf4",
    "evaluate.answers": {"max_new_tokens": 4, "max_rows": 8},
}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|\b[0-9a-f]{64}\b")
_MACHINE = re.compile(r"seconds|bytes|size|energy|joule|watt|hardware|created|time|latency|revision|rss", re.IGNORECASE)


@pytest.mark.slow
def test_the_line_leaves_the_recorded_files(tmp_path: Path, golden: Golden) -> None:
    project = make_project(tmp_path)
    write_pipeline(project, "quantized", _PIPELINE)
    product.run_stages(project, "quantized", product.STAGES)
    runs = project / "runs" / "quantized"
    golden.text("line/files.txt", "\n".join(files_below(runs)))
    for path in ("resolved", "fetch/base", "fetch/data"):
        golden.text(f"line/{path}.json", (runs / f"{path}.json").read_text(encoding="utf-8"))
    for path in ("evaluate/metrics", "merge/parity", "gate/verdict", "package/smoke", "package/manifest"):
        found = json.loads((runs / f"{path}.json").read_text(encoding="utf-8"))
        golden.values(f"line/{path}.json", of_no_machine(found), BOUND)


def files_below(runs: Path) -> list[str]:
    """Files that the stages wrote; not the checkpoints, and not Data Docs, whose pages are named by the clock."""
    names = (path.relative_to(runs).as_posix() for path in runs.rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith((".", "validate/data_docs/")))


def _is_a_machine_s(key: str, value: Any) -> bool:
    # Of tokens that are nearly as likely, rounding decides the order.
    return key == "top" or bool(_MACHINE.search(key) and not isinstance(value, dict | list))


def of_no_machine(value: Any) -> Any:
    """Without digests of what the processor rounds, times and sizes; that they are there still counts."""
    if isinstance(value, dict):
        return {key: "…" if _is_a_machine_s(key, inner) else of_no_machine(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [of_no_machine(inner) for inner in value]
    return _DIGEST.sub("sha256:…", value) if isinstance(value, str) else value
