"""The candidate scored through the server that will serve (``evaluate.engine``), and kept as our own scores are."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from graftline import settings
from graftline.digest import Digest
from graftline.errors import EvaluationError
from graftline.evaluate.engine import Connection, connect, name_of
from graftline.evaluate.engine_difference import require_log_probabilities
from graftline.evaluate.evaluation import Prepared, score_prepared
from graftline.evaluate.kept import Ingredients, KeptScores
from graftline.evaluate.scores import Scores
from graftline.evaluate.verdict import ScoredInputs
from graftline.logs import Reporter
from graftline.workflow import code
from graftline.workflow.workspace import Workspace

logger = logging.getLogger("graftline")

_CODE = ("graftline.evaluate.engine",)
"""Modules that, with all that they import, compute scores through a server."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The candidate: what is scored of it, with which files, tokenizer and configuration."""

    scored: ScoredInputs
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig


class EngineScoring:
    """Scores the candidate through a server that was asked what it offers."""

    def __init__(self, connection: Connection, judged: Judged, *, kept_in: Path, root: Path) -> None:
        """Nothing is asked yet.

        Args:
            connection: the server.
            judged: the candidate.
            kept_in: the cache of all scores.
            root: the project, whose code scores.
        """
        self._connection, self._judged = connection, judged
        ingredients = Ingredients(
            scored=judged.scored,
            prepared=judged.prepared.digest(),
            code=Digest.parse(code.of_modules(_CODE, cache(code.in_folder(root))).digest),
            machine={"engine": connection.record.as_json()},
        )
        self._kept = KeptScores(kept_in, ingredients)

    def scores(self, own: Scores) -> Scores:
        """Our own scores of the candidate, with the server's in place of all that it can give."""
        judged, record, kept = self._judged, self._connection.record, self._kept
        with kept.hold():
            found = kept.read()
            if found and not self._connection.still_answers(judged.prepared, found):
                logger.warning("%s answers otherwise than when its scores were kept: it is scored again", record.model)
                found = None
            if found:
                logger.info(
                    "%s is not scored again on the engine: its scores are kept in %s", record.model, kept.folder
                )
            else:
                found = score_prepared(
                    judged.prepared,
                    judged.tokenizer,
                    judged.config,
                    self._connection.runner,
                    parts=kept,
                    progress=lambda what, unit: Reporter(f"{what} on the engine", unit),
                    only=record.sections,
                )
                if not self._connection.still_answers(judged.prepared, found):
                    kept.discard()
                    raise EvaluationError(
                        f"{record.model} at {record.as_json()['url']} answers otherwise than when its scoring began, "
                        "as if another model had been loaded under that name; what was scored is dropped: load the "
                        "candidate there, best under a name with {adapter} in it, and run again"
                    )
                kept.write(found)
        sections: dict[str, Any] = {section: getattr(found, section) for section in record.sections}
        return replace(own, **sections, served_by=record.as_json(), key=kept.key)


@contextlib.contextmanager
def engine_scoring(
    pipeline: settings.Pipeline, at: Workspace, judged: Callable[[], Judged]
) -> Iterator[EngineScoring | None]:
    """The server that scores the candidate; None where the pipeline names none.

    Raises:
        EvaluationError: it cannot be used, or cannot decide the pipeline's gates.
    """
    section = pipeline.evaluate.engine
    if section is None:
        yield None
        return
    candidate = judged()
    assert candidate.scored.adapter is not None  # a candidate is an adapter on a base
    name = name_of(section, candidate.scored.adapter)
    with connect(section, name, candidate.tokenizer, candidate.prepared) as connection:
        require_log_probabilities(pipeline.evaluate, pipeline.gates, connection.record.offers)
        yield EngineScoring(connection, candidate, kept_in=at.cache / "scores", root=at.root)
