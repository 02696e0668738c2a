"""The evaluate stage: candidate, base, production and further references scored on every held-out item.

Writes ``scores/{candidate,base,production,...}.jsonl`` (one line per item; ``production`` if there is one, and one file
for each of ``evaluate.references``) and a summary of each in ``metrics.json``, with confusion and calibration. With
``evaluate.engine``, the candidate's file holds what that server answers, and ``own_engine.jsonl`` what our own code
does.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from graftline import settings
from graftline.address import store_address
from graftline.data.preparation import EVALUATION, GENERAL
from graftline.data.rows import read_rows
from graftline.digest import Digest, of_json, write_json
from graftline.errors import ReleaseError
from graftline.evaluate.candidate import Candidate, candidate_numbers
from graftline.evaluate.engine_difference import engine_numbers, refuse_other_model
from graftline.evaluate.evaluation import EvaluationPlan, Prepared, prepare, score_prepared
from graftline.evaluate.kept import Ingredients, KeptScores, machine, of_release
from graftline.evaluate.metrics import summarize
from graftline.evaluate.models import Model, ModelInMemory, check_adapter
from graftline.evaluate.own import OwnMetrics
from graftline.evaluate.parts import Processes, Runner, in_this_process
from graftline.evaluate.scores import CANDIDATE, OWN_ENGINE, Scores, write_scores
from graftline.evaluate.verdict import ScoredInputs, ScoredRelease
from graftline.limits import usable_cores
from graftline.logs import Reporter
from graftline.plan.stage_memory import check_stage
from graftline.registry import releases
from graftline.registry.store import open_store
from graftline.settings.gate_metrics import ANCHOR, PRODUCTION, UNQUANTIZED
from graftline.train.devices import resolve_device, scoring_dtype
from graftline.weights.identity import read_identity
from graftline.weights.model_folder import load_tokenizer, read_config
from graftline.workflow import code, resolve
from graftline.workflow.engine_scoring import Judged, engine_scoring
from graftline.workflow.pinned_base import original_base, trained_base
from graftline.workflow.scored import read_base, read_digests
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")


_CODE = ("graftline.evaluate.evaluation", "graftline.evaluate.models")
"""Modules that, with all that they import, compute a model's scores."""


@dataclass(frozen=True)
class Source:
    """A model to score: the folder of a base or a merged model, and an adapter if there is one."""

    base: Path
    """Folder with a base or a merged model."""
    adapter: Path | None = None
    owns_base: bool = True
    """Whether the adapter must have been trained on exactly this base."""
    release: ScoredRelease | None = None
    """The release that it is."""
    package: Path | None = None
    """That release's files, which were compared with its manifest."""


def score_models(pipeline: settings.Pipeline, at: Workspace, *, rows: Path, out: Path) -> None:
    """Score candidate, base, production and further references on the same items.

    Args:
        pipeline: the settings.
        at: the pipeline's places.
        rows: the fetch stage's folder, with evaluation rows and general text.
        out: folder for scores/ and metrics.json.

    Raises:
        ReleaseError: a reference was never released, or production's manifest was changed.
    """
    check_stage("evaluate", pipeline, read_config(original_base(pipeline.base, at)))
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    summary: dict[str, Any] = {}
    digests = resolve.own_digests(pipeline.evaluate, at.root)
    own = OwnMetrics(section=pipeline.evaluate, root=at.root, cache=at.cache, digests=digests)
    held_out, sources, found = read_rows(rows / EVALUATION), _sources(pipeline, at), dict[str, Scores]()
    with (
        contextlib.closing(_Evaluation(pipeline, at, rows)) as evaluation,
        # First, because a server that cannot decide the gates need not wait for models to be scored.
        engine_scoring(pipeline, at, lambda: evaluation.judged(sources[CANDIDATE])) as engine,
    ):
        for name, source in sources.items():
            found[name] = own.add(evaluation.scores(name, source), held_out)
            if name == CANDIDATE and engine:
                found |= {CANDIDATE: own.add(engine.scores(found[name]), held_out), OWN_ENGINE: found[name]}
            if name == CANDIDATE:
                numbers = evaluation.numbers(source, found[name]) | own.judge_numbers()
                found |= _with_numbers(found, numbers)
    if engine:
        others = {name: scores for name, scores in found.items() if name not in (CANDIDATE, OWN_ENGINE)}
        refuse_other_model(found[CANDIDATE], found[OWN_ENGINE], others)
    for name, scores in found.items():
        write_scores(out / "scores" / f"{name}.jsonl", scores)
        summary[name] = summarize(scores)
        logger.info("%s: %s", name, _line(summary[name]))
    write_json(out / "metrics.json", summary)


def _with_numbers(found: Mapping[str, Scores], numbers: dict[str, float]) -> dict[str, Scores]:
    """The candidate's scores with what was measured of it; on both engines if it was scored on two."""
    if OWN_ENGINE in found:
        numbers = numbers | engine_numbers(found[OWN_ENGINE], found[CANDIDATE])
    return {name: replace(found[name], numbers=numbers) for name in (CANDIDATE, OWN_ENGINE) if name in found}


def score_folder(pipeline: settings.Pipeline, at: Workspace, *, name: str, folder: Path) -> Scores:
    """A whole model's scores on the run's items; ``name`` is for progress."""
    return score_sources(pipeline, at, {name: Source(folder)}, rows=at.folder("fetch"))[name]


def score_sources(
    pipeline: settings.Pipeline, at: Workspace, sources: Mapping[str, Source], *, rows: Path
) -> dict[str, Scores]:
    """Scores of models on the items of a folder such as the fetch stage's."""
    torch.set_num_threads(pipeline.train.threads or usable_cores())
    digests, held_out = resolve.own_digests(pipeline.evaluate, at.root), read_rows(rows / EVALUATION)
    own = OwnMetrics(section=pipeline.evaluate, root=at.root, cache=at.cache, digests=digests)
    with contextlib.closing(_Evaluation(pipeline, at, rows)) as evaluation:
        return {name: own.add(evaluation.scores(name, source), held_out) for name, source in sources.items()}


class _Evaluation:
    """What all models of a run are scored on, who scores them, and where scores are kept."""

    def __init__(self, pipeline: settings.Pipeline, at: Workspace, rows: Path) -> None:
        self._pipeline, self._at, self._rows = pipeline, at, rows
        section, device = pipeline.evaluate, resolve_device(pipeline.train.device)
        dtype = scoring_dtype(section.precision, device)
        self._plan = _plan(pipeline, rows, harness=resolve.harness_folder(section.harness, at.root))
        self._processes = section.processes or (torch.cuda.device_count() if device == "cuda" else 1)
        self._threads = pipeline.train.threads or max(1, usable_cores() // self._processes)
        self._code = Digest.parse(code.of_modules(_CODE, cache(code.in_folder(at.root))).digest)
        self._memory = ModelInMemory(template=pipeline.base.template, device=device, dtype=dtype)
        self._pool: Processes | None = None
        # Bases are large: each is hashed once, and its tokenizer encodes the items once.
        self._read_base, self._prepared = cache(read_base), cache(self._prepare)

    def scores(self, name: str, source: Source) -> Scores:
        """A model's scores: those that are kept, those that its release brings along, else new ones."""
        scored = self._scored(source)
        prepared = self._prepared(source.base)
        ingredients = Ingredients(
            scored=scored,
            prepared=prepared.digest(),
            code=self._code,
            machine=machine(self._memory.device, threads=self._threads, dtype=self._memory.dtype),
        )
        kept = KeptScores(self._at.cache / "scores", ingredients)
        with kept.hold():
            scores = kept.read()
            if scores:
                self._say_kept(name, source, f"its scores are kept in {kept.folder}")
            else:
                scores = of_release(source.package, kept.key, scored) if source.package else None
                if scores:
                    self._say_kept(name, source, "its release brings its scores along")
                else:
                    scores = self._score(name, source, prepared, kept)
                kept.write(scores)
        return replace(scores, scored=scored, key=kept.key)

    def _say_kept(self, name: str, source: Source, why: str) -> None:
        check_adapter(self._model(source), self._memory.template)
        logger.info("%s is not scored again: %s", name, why)

    def numbers(self, source: Source, scores: Scores) -> dict[str, float]:
        """What is measured of the candidate alone."""
        candidate = Candidate(
            model=lambda: self._memory.get(self._model(source))[0],
            tokenizer=load_tokenizer(source.base),
            answers=scores.answers,
            trained=self._at.folder("train"),
            original=original_base(self._pipeline.base, self._at),
        )
        template = self._pipeline.base.template
        return candidate_numbers(candidate, self._pipeline.evaluate, template=template, rows=self._rows)

    def judged(self, source: Source) -> Judged:
        """What a server needs to score the candidate."""
        return Judged(
            scored=self._scored(source),
            prepared=self._prepared(source.base),
            tokenizer=load_tokenizer(source.base),
            config=read_config(source.base),
        )

    def close(self) -> None:
        """End the processes that score."""
        if self._pool:
            self._pool.close()

    def _score(self, name: str, source: Source, prepared: Prepared, kept: KeptScores) -> Scores:
        tokenizer, config = load_tokenizer(source.base), read_config(source.base)
        run, progress = self._runner(self._model(source)), _reporters(name)
        return score_prepared(prepared, tokenizer, config, run, parts=kept, progress=progress)

    def _runner(self, model: Model) -> Runner:
        if self._processes > 1:
            self._pool = self._pool or Processes(self._processes, self._memory, threads=self._threads)
            return self._pool.runner(model)
        # Loaded once a batch is missing.
        return lambda work, indices, on_part: in_this_process(*self._memory.get(model))(work, indices, on_part)

    def _model(self, source: Source) -> Model:
        of_base = self._read_base(source.base)
        return Model(source.base, of_json([str(of_base.weights), str(of_base.files)]), source.adapter, source.owns_base)

    def _scored(self, source: Source) -> ScoredInputs:
        of_base = self._read_base(source.base)
        return read_digests(of_base, source.adapter, fetched=self._rows, release=source.release)

    def _prepare(self, base: Path) -> Prepared:
        return prepare(load_tokenizer(base), self._plan)


def _reporters(name: str) -> Callable[[str, str], Reporter]:
    return lambda what, unit: Reporter(f"{what} {name}", unit)


def _plan(pipeline: settings.Pipeline, rows: Path, *, harness: Path | None) -> EvaluationPlan:
    general = (rows / GENERAL).read_text(encoding="utf-8").splitlines()
    return EvaluationPlan(
        rows=read_rows(rows / EVALUATION),
        template=pipeline.base.template,
        labels=pipeline.data.options,
        texts=[json.loads(line)["text"] for line in general],
        evaluate=pipeline.evaluate,
        task_folder=harness,
    )


def _sources(pipeline: settings.Pipeline, at: Workspace) -> dict[str, Source]:
    original, trained = original_base(pipeline.base, at), trained_base(pipeline.base, at)
    adapter, store = at.folder("train") / "adapter", store_address(pipeline.release.store, at.root)

    def released(version: str, digest: Digest | None = None) -> Source:
        folder = at.cache / "releases" / at.name / version
        return release_source(store, at.name, version, folder, digest=digest, bases=(trained, original))

    sources = {"base": Source(original), CANDIDATE: Source(trained, adapter)}
    champion = resolve.load(at)["champion"]
    if champion["version"]:
        sources[PRODUCTION] = released(champion["version"], Digest.parse(champion["release"]))
    anchor = champion.get("anchor") or champion
    if ANCHOR in champion and anchor["version"]:
        is_same = anchor["version"] == champion["version"]
        sources[ANCHOR] = (
            sources[PRODUCTION] if is_same else released(anchor["version"], Digest.parse(anchor["release"]))
        )
    for name in pipeline.evaluate.references:
        sources[name] = Source(original, adapter, owns_base=False) if name == UNQUANTIZED else released(name)
    return sources


def release_source(
    store: str, pipeline: str, version: str, folder: Path, *, digest: Digest | None, bases: tuple[Path, ...]
) -> Source:
    """A released version: its adapter if its base is among ``bases``, else its merged model.

    Raises:
        ReleaseError: there is no such release, or its manifest's digest differs from the channel's entry.
    """
    progress = Reporter(f"fetch {version}", "bytes")
    manifest = releases.fetch(open_store(store), pipeline, version, folder, on_progress=progress)
    if digest not in (None, manifest.digest):
        raise ReleaseError(
            f"the channel names {version} with the digest {digest}, the store's manifest of it has {manifest.digest}: "
            "it was changed after it was promoted; promote another release, or restore that one"
        )
    release = ScoredRelease(version, manifest.digest)
    for base in bases:
        if read_identity(base).is_called(manifest.lineage.base_digest):
            return Source(base, folder / "adapter", release=release, package=folder)
    return Source(folder / "merged", release=release, package=folder)


def _line(summary: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in summary.items() if isinstance(value, float))
