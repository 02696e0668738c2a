"""Search a pipeline's settings with Optuna: a sweep's cells, chosen by how those before them went.

A tree of Parzen estimators (TPE; Bergstra et al. 2011) proposes values; successive halving (ASHA; Li et al. 2020, arXiv
1810.05934) stops a training whose loss on the held-out rows is not among the best third at its 1st, 3rd, 9th …
evaluation. Each proposal depends on the seed and on the trials before it alone, and ``search.json`` keeps those: a
search that was stopped goes on as if it had not been, with its last training from its checkpoint.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy
from filelock import FileLock

from graftline import extras, settings
from graftline.digest import write_json, write_text
from graftline.errors import ConfigError, GraftlineError
from graftline.plain_text import count
from graftline.workflow import sweep_cells, worktree
from graftline.workflow.sweep_cells import SweepCell, SweepPlace, make_cells, read_results, write_summary

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

REDUCTION = 3
"""Of the trainings at an evaluation that decides, one in so many goes on."""
RANDOM_TRIALS = 5
"""Drawn at random before TPE proposes: half of Optuna's default, because a training is dear."""
_MOST_REPEATED = 50
"""Proposals in a row that were all made before: then there is nothing left to try."""
_DIGITS = 3
"""Of a proposed number, so that its name is short and the same cell is met again."""

_WIDE = 10.0

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_HELD_OUT = re.compile(r"after step (?P<step>\d+) of (?P<last>\d+) the held-out loss is (?P<loss>\S+)")
"""A log line of `graftline.train.best`."""

Space = Mapping[str, Sequence[Any]]
"""Values by key; ``["1e-4..1e-2"]`` is a range."""
State = Literal["complete", "stopped", "failed"]


class StoppedError(GraftlineError):
    """A training is stopped because others are better."""


@dataclass(frozen=True)
class SearchTrial:
    """A cell that was tried."""

    overrides: dict[str, Any]
    state: State
    held_out_loss: float | None
    """The lowest, in nats a token; None if the training failed before its first evaluation."""
    losses: dict[str, float] = field(default_factory=dict)
    """On the held-out rows, by the evaluation's number, from 1."""
    reason: str = ""


RunCell = Callable[[SweepCell, Callable[[str], None]], None]
"""Runs a cell; each line of its output goes to the function, whose `StoppedError` ends it."""


def check_space(space: Space) -> None:
    """Raise ConfigError for a range that is empty, or nothing to search."""
    if not space:
        raise ConfigError("given --search without --set; expected keys with ranges or values, as adapter.rank=4..64")
    for key, values in space.items():
        if any(map(is_range, values)) and len(values) > 1:
            raise ConfigError(f"given {key}={','.join(map(str, values))}; expected one range LOW..HIGH, or values")
        if (found := _bounds(values)) and not found[0] < found[1]:
            raise ConfigError(f"given {key}={values[0]}; expected LOW..HIGH with LOW below HIGH")


def is_range(value: object) -> bool:
    """Whether a value of ``--set`` is a range."""
    return isinstance(value, str) and RANGE.fullmatch(value) is not None


class Search:
    """A search of one pipeline, a cell at a time."""

    def __init__(self, where: SweepPlace, pipeline: str, space: Space, *, seed: int) -> None:
        """Take up the search in ``where.out``, or begin one.

        Raises:
            ConfigError: the pipeline holds no rows out, a range is empty, or the folder is another search's.
        """
        extras.require("optuna")
        check_space(space)
        train = settings.load(where.root / settings.DEFAULT_FILE).pipeline(pipeline).train
        if not train.evaluate_every or not train.held_out_rows:
            raise ConfigError(
                f"a search compares losses on held-out rows, and {pipeline} has none; set its train.held_out_rows and "
                "train.evaluate_every"
            )
        self._where, self._pipeline, self._space, self._seed = where, pipeline, space, seed
        self._every = train.evaluate_every
        space_ = {key: list(values) for key, values in space.items()}
        self._about = {"format": 1, "pipeline": pipeline, "seed": seed, "space": space_}
        self.trials = self._read()

    def run(self, run_cell: RunCell, *, deadline: float) -> None:
        """Try cells one after another until ``deadline`` (seconds since 1970), or until nothing is left to try."""
        while time.time() < deadline and (proposed := self._propose()):
            self.trials.append(self._try(*proposed, run_cell))
            document = self._about | {"trials": [asdict(one) for one in self.trials]}
            write_json(self._where.out / "search.json", document)

    def ranked(self) -> list[SearchTrial]:
        """The trials that came to their end, the lowest loss first."""
        done = [(trial.held_out_loss, number) for number, trial in enumerate(self.trials) if trial.state == "complete"]
        return [self.trials[number] for _, number in sorted(done)]

    def finish(self) -> None:
        """Remove the checkouts of stopped cells, and write the summaries."""
        with FileLock(self._where.root / ".cache" / "sweep.lock"):
            for trial in self.trials:
                place = self._where.folder_of(self._cell(trial.overrides))
                if trial.state == "stopped" and place.exists():
                    worktree.close(self._where.root, place)
        if ranked := self.ranked():
            write_summary(self._where.out, [self._cell(trial.overrides) for trial in ranked])
        write_text(self._where.out / "search.txt", self._text())

    def _propose(self) -> "tuple[Trial, dict[str, Any]] | None":
        """What to try next; None if every proposal was tried before."""
        from optuna.samplers import TPESampler

        tried = [trial.overrides for trial in self.trials]
        for attempt in range(_MOST_REPEATED):
            # By the number of trials, so that a search that goes on draws what it would have drawn.
            (seed,) = numpy.random.SeedSequence([self._seed, len(tried), attempt]).generate_state(1)
            sampler = TPESampler(seed=int(seed), n_startup_trials=RANDOM_TRIALS)
            trial = _study(self._space, self.trials, sampler).ask(_distributions(self._space))
            overrides = {key: _value(value, self._space[key]) for key, value in trial.params.items()}
            if overrides not in tried:
                return trial, overrides
        return None

    def _try(self, trial: "Trial", overrides: dict[str, Any], run_cell: RunCell) -> SearchTrial:
        """Run a cell, unless its result is there."""
        cell = self._cell(overrides)
        seen: dict[int, float] = {}

        def watch(line: str) -> None:
            if not (found := _HELD_OUT.search(line)):
                return
            number, loss = int(found["step"]) // self._every, float(found["loss"])
            seen[number] = loss
            trial.report(loss, number)
            if found["step"] != found["last"] and trial.should_prune():
                raise StoppedError(f"at step {found['step']} its held-out loss {found['loss']} was not among the best")

        try:
            if not read_results(self._where.out, [cell]):
                run_cell(cell, watch)
            return _tried(overrides, "complete", self._losses(cell))
        except StoppedError as error:
            return _tried(overrides, "stopped", seen, str(error))
        except GraftlineError as error:
            return _tried(overrides, "failed", seen, str(error))

    def _losses(self, cell: SweepCell) -> dict[int, float]:
        history = read_results(self._where.out, [cell])[cell.name]["results"]["history"]
        return {step["step"] // self._every: step["held_out_loss"] for step in history if "held_out_loss" in step}

    def _cell(self, overrides: dict[str, Any]) -> SweepCell:
        (name,) = sweep_cells.grid({key: [value] for key, value in overrides.items()})
        (cell,) = make_cells(self._where.root, self._pipeline, {name: overrides}, [self._seed])
        return cell

    def _read(self) -> list[SearchTrial]:
        file = self._where.out / "search.json"
        if not file.is_file():
            return []
        found = json.loads(file.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in self._about} != json.loads(json.dumps(self._about)):
            raise ConfigError(f"{file} is of another search (keys, values or seed); give another folder with --out")
        return [SearchTrial(**one) for one in found["trials"]]

    def _text(self) -> str:
        states = [trial.state for trial in self.trials]
        done, stopped, failed = (states.count(state) for state in get_args(State))
        lines = [f"{count(len(states), 'cell')} tried: {done} to the end, {stopped} stopped early, {failed} failed"]
        ranked = self.ranked()
        lines += ["held-out loss"] * bool(ranked)
        lines += [f"{trial.held_out_loss:13.4f}  {self._cell(trial.overrides).variant}" for trial in ranked[:10]]
        lines += [f"failed: {self._cell(t.overrides).variant}: {t.reason}" for t in self.trials if t.state == "failed"]
        lines += ["One seed tells little: compare the best ones in a sweep with several."] * bool(ranked)
        return "\n".join([*lines, f"all of them: {self._where.out / 'search.json'}", ""])


def _tried(overrides: dict[str, Any], state: State, losses: Mapping[int, float], reason: str = "") -> SearchTrial:
    by_number = {str(number): loss for number, loss in losses.items()}
    return SearchTrial(overrides, state, min(losses.values(), default=None), by_number, reason)


def _study(space: Space, trials: Sequence[SearchTrial], sampler: "TPESampler") -> "Study":
    """Optuna's study with the trials so far."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
    study = optuna.create_study(direction="minimize", pruner=pruner, sampler=sampler)
    study.add_trials([_frozen(trial, space) for trial in trials])
    return study


def _frozen(trial: SearchTrial, space: Space) -> "FrozenTrial":
    from optuna import create_trial
    from optuna.trial import TrialState

    losses = {int(number): loss for number, loss in trial.losses.items()}
    compared: list[float] = []  # at each rung, as the pruner records it
    for number, loss in losses.items():
        while number >= REDUCTION ** len(compared):
            compared.append(loss)
    is_done = trial.state == "complete"
    return create_trial(
        # TPE passes over failed trials, and ranks pruned ones without a loss last: a training that fails is a bad one.
        state=TrialState.COMPLETE if is_done else TrialState.PRUNED,
        value=trial.held_out_loss if is_done else None,
        params={key: _parameter(value, space[key]) for key, value in trial.overrides.items()},
        distributions=_distributions(space),
        intermediate_values=losses,
        system_attrs={f"completed_rung_{rung}": loss for rung, loss in enumerate(compared)},
    )


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    """A range is drawn from in logarithms if it spans a factor of ten."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    made: dict[str, BaseDistribution] = {}
    for key, values in space.items():
        bounds = _bounds(values)
        if bounds is None:
            made[key] = CategoricalDistribution([json.dumps(value) for value in values])
            continue
        low, high = bounds
        is_wide = low > 0 and high / low >= _WIDE
        if isinstance(low, int) and isinstance(high, int):
            made[key] = IntDistribution(low, high, log=is_wide)
        else:
            made[key] = FloatDistribution(low, high, log=is_wide)
    return made


def _bounds(values: Sequence[Any]) -> tuple[float, float] | None:
    """Both ends of a range, whole numbers if both are written so; None for values."""
    found = RANGE.fullmatch(values[0]) if len(values) == 1 and isinstance(values[0], str) else None
    if found is None:
        return None
    low, high = (int(text) if text.lstrip("+-").isdigit() else float(text) for text in found.groups())
    return low, high


def _value(drawn: Any, values: Sequence[Any]) -> Any:
    """What a setting gets: a number with few digits, or one of the values."""
    bounds = _bounds(values)
    if bounds is None:
        return json.loads(drawn)
    return drawn if isinstance(drawn, int) else min(max(float(f"{drawn:.{_DIGITS}g}"), bounds[0]), bounds[1])


def _parameter(value: Any, values: Sequence[Any]) -> Any:
    """`_value` reversed."""
    return json.dumps(value) if _bounds(values) is None else value
