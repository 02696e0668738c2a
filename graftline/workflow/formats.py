"""A run's merged model in a layout that engines load, and evidence that it still answers and still passes.

What is compared and scored are the very weights that the layout holds, in fp32 arithmetic:

    parity    against the judged model, base and adapter, within the limits of a merged model that is quantized again
    gates     the pipeline's own, on the same items, with the layout's scores in the candidate's place. Numbers that are
              measured of the candidate alone (training loss, forgetting, latency) stay the candidate's
"""

import argparse
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import torch

from graftline import settings
from graftline.adapters.peft_format import load_exact
from graftline.data.preparation import EVALUATION
from graftline.digest import of_files, of_folder, write_json
from graftline.errors import MergeError
from graftline.evaluate.scores import CANDIDATE
from graftline.evaluate.verdict import TOKENIZER_FILES, Verdict, verdict_to_dict
from graftline.export.compressed import FORMATS, compress_folder
from graftline.export.gguf_model import GGUF_KINDS, GgufKind, export_model
from graftline.logs import Reporter
from graftline.merge.parity import REQUANTIZED_LIMITS, ParityReport, compare_with_recorded, record
from graftline.program import guarded
from graftline.train.devices import resolve_device
from graftline.weights.importing import convert_gguf
from graftline.workflow import scored
from graftline.workflow.calibrating import calibration_ids
from graftline.workflow.judging import judge_scores
from graftline.workflow.merging import comparison_rows
from graftline.workflow.pinned_base import trained_base
from graftline.workflow.scoring import score_folder
from graftline.workflow.workspace import Workspace

GGUF: Mapping[str, GgufKind] = MappingProxyType({f"gguf-{kind}": kind for kind in GGUF_KINDS})
Kind = Literal["fp8", "w4a16", "gguf-f16", "gguf-q8_0", "gguf-q4_k_m"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODEL_FILE = "model.gguf"
RECORD = "graftline-format.json"
"""Written into the folder: what it was made of, and the evidence."""


@dataclass(frozen=True)
class Evidence:
    """What a layout's model was measured to be."""

    parity: ParityReport
    verdict: Verdict
    merged_bytes: int
    """Size of the merged model's files."""
    num_bytes: int
    """Size of the layout's."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it may not be deployed; empty if it may."""
        gates = () if self.verdict.outcome == "pass" else (f"the gates say {self.verdict.outcome}",)
        return (*(f"parity: {failure}" for failure in self.parity.failures), *gates)


def compress_merged(pipeline: settings.Pipeline, at: Workspace, kind: Kind, out: Path) -> Evidence:
    """Quantize the merged model of the last run; ``out`` appears only if parity and gates allow it.

    Raises:
        MergeError: the run has no merged model, its files are not those that were compared, or ``out`` exists.
        ExportError: the layout cannot hold this model.
        EvaluationError: the files in ``runs/`` are not those that were scored.
    """
    if out.exists():
        raise MergeError(f"{out} exists; nothing is overwritten: remove it or choose another folder")
    merged = _merged(at)
    scores = scored.read_all(pipeline.base, at)
    with _beside(out) as place:
        made, dense = place / "made", place / "dense"
        rows = calibration_ids(pipeline, at, merged) if kind == "w4a16" else []
        _write(merged, made, kind, dense=dense, rows=rows)
        parity = _compare(pipeline, at, dense)
        candidate = scores[CANDIDATE]
        own = replace(
            score_folder(pipeline, at, name=kind, folder=dense),
            numbers=candidate.numbers,
            scored=candidate.scored,
            key=candidate.key,
        )
        verdict = judge_scores(pipeline, at, scores | {CANDIDATE: own})
        found = Evidence(parity, verdict, _size(merged), _size(made))
        if not found.problems:
            write_json(made / RECORD, _record(at, kind, merged, found, len(rows)))
            made.rename(out)
    return found


def _merged(at: Workspace) -> Path:
    folder, file = at.folder("merge") / "model", at.folder("merge") / "parity.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not known.get("merged"):
        reason = known.get("reason") or "write `package.merged: true`, and retrain"
        raise MergeError(f"the last run of {at.name} has no merged model, which is what is quantized: {reason}")
    if known["model"] != str(of_files(of_folder(folder))):
        raise MergeError(
            f"{folder} is not the model that was compared with the judged one; merge again: dvc repro --force "
            f"--single-item merge@{at.name}"
        )
    return folder


def _write(merged: Path, made: Path, kind: Kind, *, dense: Path, rows: Sequence[Sequence[int]]) -> None:
    """The layout's folder, and what it holds as a folder that graftline loads."""
    report = Reporter(kind, "tensors")
    if kind in FORMATS:
        compress_folder(merged, made, kind, dense=dense, rows=rows, on_progress=report)
        return
    made.mkdir()
    export_model(merged, made / MODEL_FILE, GGUF[kind], on_progress=report)
    # Weights and settings are read from the file itself. Its tokenizer is not: transformers ignores how the file says
    # that words are split.
    convert_gguf(made / MODEL_FILE, dense, dtype=torch.float32)
    for name in TOKENIZER_FILES:
        (dense / name).unlink(missing_ok=True)
        if (merged / name).is_file():
            shutil.copyfile(merged / name, dense / name)


def _compare(pipeline: settings.Pipeline, at: Workspace, dense: Path) -> ParityReport:
    base, device = trained_base(pipeline.base, at), resolve_device(pipeline.train.device)
    rows = comparison_rows(at.folder("fetch") / EVALUATION, base, pipeline.base.template)
    ids = [row.input_ids for row in rows]
    judged = record(load_exact(base, at.folder("train") / "adapter", device=device), ids)
    answers = [row.supervised for row in rows]
    model = load_exact(dense, device=device)
    return compare_with_recorded(judged, model, ids, limits=REQUANTIZED_LIMITS, answers=answers)


def _record(at: Workspace, kind: Kind, merged: Path, found: Evidence, num_rows: int) -> dict[str, object]:
    made_of = json.loads((at.folder("merge") / "parity.json").read_text(encoding="utf-8"))
    return {
        "format": kind,
        "pipeline": at.name,
        "made_of": {"base": made_of["base"], "adapter": made_of["adapter"], "merged": made_of["model"]},
        "calibration_rows": num_rows,
        "parity": found.parity.as_json(),
        "verdict": verdict_to_dict(found.verdict),
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out``, on the same disk; gone at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Command line: exit code 0 written, 1 the evidence forbids it, 2 an error that its message explains."""
    parser = argparse.ArgumentParser(prog="python -m graftline.workflow.formats", description=main.__doc__)
    parser.add_argument("pipeline", help="a name from pipelines.yaml")
    parser.add_argument("format", choices=KINDS)
    parser.add_argument("out", type=Path, help="a new folder")
    given = parser.parse_args()
    with guarded():
        pipeline = settings.load().pipeline(given.pipeline)
        done = compress_merged(pipeline, Workspace(Path.cwd(), given.pipeline), given.format, given.out)
        print(f"parity: mean KL {done.parity.mean_kl:.3g}, the same token at {done.parity.argmax_agreement:.1%}")
        print(f"gates: {done.verdict.outcome}: {done.verdict.summary}")
        if done.problems:
            print(*(f"not written: {problem}" for problem in done.problems), sep="\n", file=sys.stderr)
            sys.exit(1)
        sizes = f"{done.num_bytes / 1e6:.1f} MB, the merged model has {done.merged_bytes / 1e6:.1f} MB"
        place = given.out / MODEL_FILE if given.format in GGUF else given.out
        command = "llama-server --model" if given.format in GGUF else "vllm serve"
        print(f"{given.out}: {sizes}; {command} {shlex.quote(str(place))}")


if __name__ == "__main__":
    main()
