"""A head for classes against labels that are written: accuracy, time and memory of the same adapter on the same rows.

compare  one LoRA adapter, trained to write its label (`train.objective: supervised`, judged by the likelihood of each
         label) and with a head (`classify`): at several learning rates, the best of which is kept by the first seed,
         and then with further seeds. Measured: accuracy, macro-F1, NLL and calibration error over the classes, CPU
         seconds of training and of scoring the held-out rows, peak memory, and the adapter's size
beyond   both with the first seed at twice the largest rate: whether the best one was sought far enough
serve    the kept adapters on the serving graph, one prompt at a time, in turns: a class read from the head, against a
         label written greedily with the token that ends it
"""

import statistics
import time
from pathlib import Path

import torch

import graftline
from graftline.data.rows import Row, read_rows
from graftline.data.template import encode_answers
from graftline.evaluate.guards import folder_bytes
from graftline.evaluate.metrics import summarize
from graftline.serve.catalog import Catalog, ServedModel
from graftline.serve.pooled import read_prompts
from graftline.serve.served_base import Base, Runtime
from graftline.serve.smoke import greedy
from graftline.settings.objective import Objective
from studies.harness import Json, Setting, ratio

KINDS = ("supervised", "classify")
RATES = (5e-4, 1e-3, 2e-3)
SHAPE = graftline.Adapter(method="lora", rank=8, alpha=16)
STEPS, BATCH, HELD_OUT = 84, 16, 300
"""The demo's."""
_MEASURES = ("accuracy", "macro_f1", "class_nll", "calibration_error")


def compare(setting: Setting) -> Json:
    """Both kinds at their best rates, as means over seeds, and the first seed at every rate."""
    rates, seeds = setting.size(RATES, RATES[:1]), range(setting.turns(3))
    found: Json = {}
    for kind in KINDS:
        by_rate = {rate: setting.apart(_train, setting, kind, rate, 0) for rate in rates}
        best = min(rates, key=lambda rate: by_rate[rate]["class_nll"])
        runs = [by_rate[best], *(setting.apart(_train, setting, kind, best, seed) for seed in seeds[1:])]
        found[kind] = {
            "learning_rate": best,
            "seeds": len(runs),
            **{name: round(statistics.mean(run[name] for run in runs), 4) for name in runs[0]},
            "accuracy_of_seeds": [round(run["accuracy"], 4) for run in runs],
            "by_rate": {str(rate): {name: round(run[name], 4) for name in _MEASURES} for rate, run in by_rate.items()},
        }
        setting.keep(found)
    return found


def beyond(setting: Setting) -> Json:
    """What `compare` has by rate, at the next rate of its grid."""
    found: Json = {"learning_rate": 2 * RATES[-1]}
    for kind in KINDS:
        run = setting.apart(_train, setting, kind, found["learning_rate"], 0)
        found[kind] = {name: round(run[name], 4) for name in _MEASURES}
        setting.keep(found)
    return found


def serve(setting: Setting) -> Json:
    """CPU seconds of a prompt on the graph: of both, and the ratio of a label's to a class's."""
    base, (_, held_out) = setting.base(), _rows(setting)
    catalog = Catalog()
    catalog.add_base("base", Base(base, Runtime(graphs=setting.folder("graphs"), num_threads=setting.threads)))
    served = {kind: catalog.load_adapter(kind, _adapter(setting, kind)) for kind in KINDS}
    tokenizer = served["classify"].base.tokenizer
    asked = [encode_answers(row, tokenizer, template="none") for row in held_out[: setting.size(40, 4)]]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(setting.turns(5)):
        for kind in KINDS:
            started = time.process_time()
            for prompt, (answer,) in asked:
                _answer(served[kind], prompt, len(answer))
            seconds[kind].append((time.process_time() - started) / len(asked))
    return {
        "cpu_seconds_a_prompt": {kind: round(statistics.median(times), 5) for kind, times in seconds.items()},
        "label_over_class": ratio(seconds["supervised"], seconds["classify"]),
        "prompts": len(asked),
    }


def _answer(model: ServedModel, prompt: list[int], num_tokens: int) -> None:
    if model.labels:
        read_prompts(model, [prompt])
    else:
        greedy(model, prompt, num_tokens)


def _rows(setting: Setting) -> tuple[list[Row], list[Row]]:
    rows = list(read_rows(setting.row_file()))
    held_out = setting.size(HELD_OUT, 20)
    return rows[:-held_out], rows[-held_out:]


def _labels(rows: list[Row]) -> list[str]:
    return sorted({row.answer.strip() for row in rows})


def _adapter(setting: Setting, kind: str) -> Path:
    """The adapter of the first seed at the first rate; trained if there is none."""
    folder = _kept(setting, kind, RATES[0], 0)
    if not folder.is_dir():
        setting.apart(_train, setting, kind, RATES[0], 0)
    return folder


def _kept(setting: Setting, kind: str, rate: float, seed: int) -> Path:
    """An adapter's folder, which all parts share."""
    return setting.work.parent / "adapters" / f"{kind}-{rate:g}-{seed}"


def _train(setting: Setting, kind: str, rate: float, seed: int) -> Json:
    """Train an adapter, score it, and keep it."""
    torch.set_num_threads(setting.threads)
    training, held_out = _rows(setting)
    labels = _labels([*training, *held_out])
    model = graftline.open_model(setting.base(), template="none", device="cpu")
    graftline.attach_adapter(model, SHAPE, seed=seed, labels=labels if kind == "classify" else ())
    train = graftline.Train(
        objective=Objective.model_validate({"kind": kind}),
        steps=setting.size(STEPS, 4),
        batch_size=BATCH,
        learning_rate=rate,
        seed=seed,
        threads=setting.threads,
    )
    started = time.process_time()
    result = graftline.train_adapter(model, training, train)
    trained = time.process_time()
    scores = graftline.evaluate_model(model, held_out, labels=labels)
    scored = time.process_time()
    folder = _kept(setting, kind, rate, seed)
    graftline.save_adapter(model, folder)
    found = summarize(scores)
    return {
        **{name: float(found[name]) for name in _MEASURES},
        "training_cpu_seconds": trained - started,
        "scoring_cpu_seconds": scored - trained,
        "peak_mb": result.peak_bytes / 1e6,
        "adapter_mb": folder_bytes(folder) / 1e6,
    }


PARTS = {"compare": compare, "beyond": beyond, "serve": serve}
