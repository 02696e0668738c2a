"""Items a second: our option scoring against lm-evaluation-harness's HF backend, same tokens, one process, CPU.

    python -m venv VENV && VENV/bin/pip install -c constraints.txt lm-eval==0.4.13 torch transformers
    PYTHONPATH=. VENV/bin/python -m studies.scoring BASE_FOLDER rows.jsonl --out result.json

Both are given token ids, so tokenization is in neither time. Runs alternate; the harness gets the best of its batch
sizes. Beside the times stand the matrix products that each side does, padding included, and the share of our time that
they take alone: how near the scorer is to its limit. Shapes of item: the demo task (10 labels), the same behind five
worked examples, and four definitions to choose from (options of many tokens), with a short question and behind a
passage.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.rows import Row, read_rows
from graftline.digest import write_json
from graftline.evaluate.items import option_items
from graftline.evaluate.option_tree import OptionItem
from graftline.evaluate.scoring import score_options

NUM_SHOTS = 5
NUM_DEFINITIONS = 4
SHAPES = ("10 labels", "10 labels, 5 examples", "4 definitions", "4 definitions, passage")


def labels_of(rows: Sequence[Row]) -> list[str]:
    return sorted({row.answer.strip() for row in rows})


def label_items(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[OptionItem]:
    return option_items(rows, tokenizer, template="tokenizer", labels=labels_of(rows))


def few_shot_items(rows: Sequence[Row], shots: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[OptionItem]:
    text = "\n\n".join(f"{row.prompt}{row.answer}" for row in shots) + "\n\n"
    head = tuple(tokenizer(text).input_ids)
    plain = option_items(rows, tokenizer, template="none", labels=labels_of(rows))
    return [OptionItem(item.item_id, head + item.prompt_ids, item.option_ids, item.gold) for item in plain]


def definition_items(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, passage_of: Sequence[Row] = ()
) -> list[OptionItem]:
    """Which of four definitions belongs to the category of the first? The passage differs from item to item."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text).input_ids)

    items = []
    for start in range(0, len(rows) - NUM_DEFINITIONS + 1, NUM_DEFINITIONS):
        group = rows[start : start + NUM_DEFINITIONS]
        options = [" " + row.prompt.removeprefix("Definition: ").removesuffix("\nCategory:") for row in group]
        passage = " ".join(row.prompt for row in passage_of[start : start + NUM_DEFINITIONS])
        question = f"{passage}\nA definition of something of the category{group[0].answer}:"
        items.append(OptionItem(f"d{start}", ids(question), tuple(map(ids, options)), 0))
    return items


def harness_scores(harness: HFLM, items: Sequence[OptionItem]) -> list[list[float]]:
    requests = [
        ((f"{item.item_id}", f"{index}"), list(item.prompt_ids), list(option))
        for item in items
        for index, option in enumerate(item.option_ids)
    ]
    found = iter(harness._loglikelihood_tokens(requests, disable_tqdm=True))
    return [[next(found)[0] for _ in item.option_ids] for item in items]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Products:
    """Counts the positions that pass through every linear layer of a model, to price and to repeat its products."""

    def __init__(self, model: torch.nn.Module, run: Callable[[], object]) -> None:
        self._layers = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        self._inputs = {layer.in_features: torch.randn(2048, layer.in_features) for layer in self._layers.values()}
        self.positions = dict.fromkeys(self._layers, 0)
        handles = [layer.register_forward_hook(self._count(name)) for name, layer in self._layers.items()]
        run()
        for handle in handles:
            handle.remove()

    def _count(self, name: str) -> Callable[..., None]:
        def add(_: torch.nn.Module, args: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            self.positions[name] += args[0].numel() // args[0].shape[-1]

        return add

    @property
    def gflop(self) -> float:
        """Floating point operations in units of 10^9, two for each multiplication with its sum."""
        return sum(2e-9 * self.positions[name] * layer.weight.numel() for name, layer in self._layers.items())

    def repeat(self) -> None:
        """The products alone, on any numbers, as many positions at once as in the scorer's batches."""
        for name, layer in self._layers.items():
            inputs = self._inputs[layer.in_features]
            for start in range(0, self.positions[name], len(inputs)):
                torch.nn.functional.linear(inputs[: self.positions[name] - start], layer.weight)


@torch.inference_mode()
def limits(items: Sequence[OptionItem], model: torch.nn.Module, harness: HFLM) -> dict[str, float]:
    """What both sides compute, and the share of our time that the bare products take (CPU time)."""
    ours = Products(model, lambda: score_options(model, items))
    theirs = Products(model, lambda: harness_scores(harness, items))
    pairs = [(cpu_seconds(ours.repeat), cpu_seconds(lambda: score_options(model, items))) for _ in range(3)]
    return {
        "gflop": ours.gflop,
        "lm_eval_gflop": theirs.gflop,
        "ratio_of_operations": theirs.gflop / ours.gflop,
        "share_of_products_in_our_time": statistics.median(alone / all_of_it for alone, all_of_it in pairs),
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def compare(
    items: Sequence[OptionItem], model: torch.nn.Module, harnesses: dict[int, HFLM], repeats: int
) -> dict[str, Any]:
    ours, theirs = score_options(model, items), harness_scores(next(iter(harnesses.values())), items)
    pairs = [
        (a, b) for score, row in zip(ours, theirs, strict=True) for a, b in zip(score.log_likelihoods, row, strict=True)
    ]
    times: dict[str, list[float]] = {"graftline": []} | {f"lm-eval batch {size}": [] for size in harnesses}
    for _ in range(repeats):
        times["graftline"].append(seconds(lambda: score_options(model, items)))
        for size, harness in harnesses.items():
            times[f"lm-eval batch {size}"].append(seconds(lambda harness=harness: harness_scores(harness, items)))
    # Each repetition is a pair: graftline against the harness's best batch size in the same minute.
    ratios = [min(theirs) / ours for ours, *theirs in zip(*times.values(), strict=True)]
    return {
        "items": len(items),
        "limits": limits(items, model, next(iter(harnesses.values()))),
        "items_per_second": {key: len(items) / statistics.median(found) for key, found in times.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "max_error_nats": max(abs(a - b) for a, b in pairs),
        "max_relative_error": max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs),
        "same_choice": sum(
            score.chosen == max(range(len(row)), key=row.__getitem__) for score, row in zip(ours, theirs, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--items", type=int, default=64, help="rows; four of them make an item with definitions")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True, help="shapes that are not measured now stay in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    rows = read_rows(options.rows)
    shots, rows = rows[:NUM_SHOTS], rows[NUM_SHOTS : NUM_SHOTS + options.items]
    harnesses = {
        size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu") for size in options.batch_sizes
    }
    make: dict[str, Callable[[], list[OptionItem]]] = {
        "10 labels": lambda: label_items(rows, tokenizer),
        "10 labels, 5 examples": lambda: few_shot_items(rows, shots, tokenizer),
        "4 definitions": lambda: definition_items(rows, tokenizer),
        "4 definitions, passage": lambda: definition_items(rows, tokenizer, passage_of=rows[::-1]),
    }
    setting = {"threads": options.threads, "torch": torch.__version__, "lm_eval": version("lm_eval")}
    recorded = json.loads(options.out.read_text()) if options.out.is_file() else {}
    shapes = recorded.get("shapes", {}) if recorded.get("setting") == setting else {}
    for name in options.shapes:
        shapes[name] = compare(make[name](), model, harnesses, options.repeats)
        print(name, json.dumps(shapes[name], indent=2), flush=True)
        write_json(options.out, {"setting": setting, "shapes": shapes})


if __name__ == "__main__":
    main()
