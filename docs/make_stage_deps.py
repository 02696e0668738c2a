"""Write into dvc.yaml which code each stage uses: the import closure of its module.

Run ``python docs/make_stage_deps.py`` after an import changed. DVC does not follow imports, and a stage that leaves out
a file it uses would not run again when that file changes; a test compares dvc.yaml with what this writes.
"""

from pathlib import Path

import grimp

from graftline.digest import write_text
from graftline.workflow.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]


def place(module: str) -> str:
    """The file or folder that DVC should watch for a module: library packages as a whole.

    Not so `graftline.workflow`: most of it runs stages and is in none of them.
    """
    parts = module.split(".")
    if len(parts) > 1 and parts[1] != "workflow" and (ROOT / parts[0] / parts[1]).is_dir():
        return "/".join(parts[:2])
    return "/".join(parts) + ".py"


def used_places(stage: str, imports: grimp.ImportGraph) -> set[str]:
    """Every place whose code ``tasks.<stage>`` imports, itself included."""
    modules = imports.find_upstream_modules(f"tasks.{stage}") | {f"tasks.{stage}"}
    return {place(module) for module in modules if "." in module}


def render(text: str) -> str:
    """``text``, a dvc.yaml, with the code deps of every stage replaced; what it says of runs/ stays."""
    imports = grimp.build_graph("graftline", "tasks", "flows", cache_dir=None)
    for stage in STAGES:
        start = text.index("      deps:\n", text.index(f"\n  {stage}:\n")) + len("      deps:\n")
        end = text.index("      outs:\n", start)
        artefacts = [line for line in text[start:end].splitlines() if line.strip().startswith("- runs/")]
        code = [f"        - {name}" for name in sorted(used_places(stage, imports))]
        text = text[:start] + "\n".join([*artefacts, *code, ""]) + text[end:]
    return text


if __name__ == "__main__":
    write_text(ROOT / "dvc.yaml", render((ROOT / "dvc.yaml").read_text(encoding="utf-8")))
