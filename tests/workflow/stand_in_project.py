"""A scratch repository whose stages take no time: same names, same files, numbers that follow from the settings.

The flow around them is the real one: git, DVC's graph, status and run cache, worktrees, comparison, comment.
"""

from pathlib import Path

from tests.line.project import ROOT, write_yaml
from tests.workflow.tiny_project import PIPELINE, commit, git, tiny_settings

WORK = '''\
"""Stand-in for a stage: python -m tasks.work STAGE PIPELINE.

STAND_IN_LOG names a file that gets a line for each start; while the file that STAND_IN_HOLD names is there, no
training ends.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

stage, name = sys.argv[1:]
runs = Path("runs") / name
out = runs / stage
out.mkdir(parents=True, exist_ok=True)
if log := os.environ.get("STAND_IN_LOG"):
    with open(log, "a") as stream:
        stream.write(f"{stage}@{name} {os.getpid()}\\n")


def pipeline():
    from graftline import settings

    return settings.load().pipeline(name)


# What guards ask about.
SOUND = {"leaked_rows": 0.0, "template_mismatches": 0.0, "training_steps": 4.0, "training_losses_not_finite": 0.0}
SOUND |= {"training_loss_start": 3.0, "training_loss_end": 2.0}


def scores(accuracy, numbers):
    from graftline.data.rows import read_rows
    from graftline.digest import of_bytes
    from graftline.evaluate.scores import ItemScore, Scores, item_id

    draw = random.Random(0)
    items = []
    for row in read_rows(runs / "fetch" / "evaluation.jsonl"):
        right = draw.random() <= accuracy
        items.append(ItemScore(item_id(row), (-1.0, -2.0), int(not right), 0, right, 1.0, 1, stop=True))
    return Scores(template=of_bytes(b""), labels=("cat", "dog"), items=tuple(items), numbers=numbers)


if stage == "fetch":
    rows = Path("rows.jsonl").read_text()
    made = [{"prompt": f"{rows}{i}", "completion": " cat"} for i in range(pipeline().data.evaluation_rows)]
    (out / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in made))
elif stage == "train":
    while Path(os.environ.get("STAND_IN_HOLD", "nothing")).exists():
        time.sleep(0.1)
    train = pipeline().train
    if train.learning_rate > 5:
        sys.exit("error: the loss is not finite")
    learned = min(0.45, train.steps / 100) if train.learning_rate > 1e-6 else 0.0
    (out / "adapter").mkdir(exist_ok=True)
    (out / "adapter" / "accuracy").write_text(str(0.5 + learned))
    (out / "stage.json").write_text(json.dumps({"seconds": 1.5, "peak_rss_mb": 90}))
    figures = {"steps": train.steps, "loss_last": 3.0 - learned * 4, "trained_parameters": 1}
    figures["tokens_per_second"] = 321.0
    (out / "metrics.json").write_text(json.dumps(figures))
    losses = [{"step": i, "loss": 3.0 - learned * i} for i in range(1, 5)]
    (out / "history.json").write_text(json.dumps(losses))
elif stage == "evaluate":
    from graftline.evaluate.scores import write_scores

    accuracy = float((runs / "train" / "adapter" / "accuracy").read_text())
    write_scores(out / "scores" / "candidate.jsonl", scores(accuracy, SOUND))
    write_scores(out / "scores" / "base.jsonl", scores(0.5, {}))
    (out / "stage.json").write_text("{}")
    (out / "metrics.json").write_text(json.dumps({"candidate": {"accuracy": accuracy}}))
elif stage == "gate":
    from graftline.evaluate.gates import judge
    from graftline.evaluate.scores import read_scores
    from graftline.evaluate.verdict import verdict_markdown, verdict_to_dict

    found = {path.stem: read_scores(path) for path in (runs / "evaluate" / "scores").glob("*.jsonl")}
    verdict = judge(pipeline().gates, found["candidate"], {"production": found["base"]})
    (out / "verdict.json").write_text(json.dumps(verdict_to_dict(verdict)))
    (out / "verdict.md").write_text(verdict_markdown(verdict))
elif stage == "release":
    (out / "release.json").write_text(json.dumps({"version": "1", "location": f"s3://bucket/releases/{name}/1"}))
else:
    (out / "done").write_text(stage)
'''
RESOLVE = """\
import json
import sys
from pathlib import Path

folder = Path("runs") / sys.argv[1]
folder.mkdir(parents=True, exist_ok=True)
(folder / "resolved.json").write_text(json.dumps({"sources": {}, "champion": None}))
"""
NEEDS = {
    "fetch": ["rows.jsonl"],
    "validate": ["runs/${key}/fetch"],
    "init": ["runs/${key}/fetch"],
    "train": ["runs/${key}/validate", "runs/${key}/init"],
    "evaluate": ["runs/${key}/train/adapter", "runs/${key}/fetch"],
    "gate": ["runs/${key}/evaluate/scores"],
    "merge": ["runs/${key}/train/adapter"],
    "package": ["runs/${key}/gate", "runs/${key}/merge"],
    "release": ["runs/${key}/package"],
}
OUTS = {
    "train": ["runs/${key}/train/adapter", "runs/${key}/train/stage.json"],
    "evaluate": ["runs/${key}/evaluate/scores", "runs/${key}/evaluate/stage.json"],
}
METRICS = {
    "train": ["runs/${key}/train/metrics.json", "runs/${key}/train/history.json"],
    "evaluate": ["runs/${key}/evaluate/metrics.json"],
}
SECTIONS = {"fetch": "data", "gate": "gates"}


def make_repository(folder: Path) -> Path:
    """The project at its first commit, on the branch ``main``."""
    (folder / "tasks").mkdir(parents=True)
    for name, text in (("__init__", ""), ("work", WORK), ("resolve", RESOLVE)):
        (folder / "tasks" / f"{name}.py").write_text(text)
    (folder / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    (folder / "rows.jsonl").write_text('{"prompt": "barks:", "completion": " dog"}\n')
    (folder / "README.md").write_text("a project\n")
    (folder / "keys.yaml").write_text("keys: []\nunsigned: true\n", encoding="utf-8")
    pipeline = tiny_settings()
    pipeline["base"]["source"] = "path:rows.jsonl"
    write_yaml(folder, {"pipelines": {PIPELINE: pipeline}, "channels": {"production": {}}})
    (folder / "dvc.yaml").write_text(_graph())
    git(folder, "init", "-q", "-b", "main")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    # As `dvc init` commits it; DVC would write it into the checkout otherwise.
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    commit(folder, "project")
    return folder


def _graph() -> str:
    lines = ["vars:", "- pipelines.yaml", "stages:"]
    for stage, needs in NEEDS.items():
        section = SECTIONS.get(stage, stage if stage in tiny_settings() else "data")
        lines += [
            f"  {stage}:",
            "    foreach: ${pipelines}",
            "    do:",
            f"      cmd: python -m tasks.work {stage} ${{key}}",
        ]
        lines += ["      params:", "      - pipelines.yaml:", f"        - pipelines.${{key}}.{section}"]
        lines += ["      deps:", *(f"      - {need}" for need in [*needs, "tasks/work.py"])]
        lines += ["      outs:", *(f"      - {out}" for out in OUTS.get(stage, [f"runs/${{key}}/{stage}"]))]
        if stage in METRICS:
            lines += ["      metrics:", *(f"      - {metric}:\n          cache: false" for metric in METRICS[stage])]
    return "\n".join(lines) + "\n"
