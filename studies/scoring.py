"""Scoring of options against lm-evaluation-harness, items a second: same tokens, one process, CPU.

Both are given token ids, so tokenization is in neither time. Sides take turns; the peer gets the best of its batch
sizes. Beside the times stand the matrix products that each side does, padding included, and the share of our time
that they take alone: how near the scorer is to its limit. Kinds of item: the demo's (10 labels), the same behind five
worked examples, and four definitions to choose from (options of many tokens), with a short question and behind a
passage.

The peer is the harness where it is installed (`pip install -e '.[harness]'` in an environment of its own), and
otherwise its procedure by transformers: every option behind its prompt, sorted by length, in padded batches.
"""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from graftline.data.rows import Row, read_rows
from graftline.evaluate.items import option_items
from graftline.evaluate.option_tree import OptionItem
from graftline.evaluate.scoring import score_options
from studies.harness import Json, Setting, cpu_seconds, rate, ratio, turns, wall_seconds

NUM_SHOTS, NUM_DEFINITIONS = 5, 4
Score = Callable[[Sequence[OptionItem]], list[list[float]]]


def options(setting: Setting) -> Json:
    """Every kind of item."""
    base = setting.base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    peers = {size: _peer(model, tokenizer, size) for size in setting.size((8, 32), (8,))}
    found = {kind: _compare(setting, items, model, peers) for kind, items in _items(setting, tokenizer).items()}
    return {"peer": "lm-eval" if find_spec("lm_eval") else "its procedure by transformers", "shapes": found}


def _items(setting: Setting, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[OptionItem]]:
    rows = read_rows(setting.row_file())
    shots, rows = rows[:NUM_SHOTS], rows[NUM_SHOTS : NUM_SHOTS + setting.size(64, 8)]
    labels = sorted({row.answer.strip() for row in rows})
    plain = option_items(rows, tokenizer, template="none", labels=labels)
    head = tuple(tokenizer("\n\n".join(f"{row.prompt}{row.answer}" for row in shots) + "\n\n").input_ids)
    return {
        "10 labels": option_items(rows, tokenizer, template="tokenizer", labels=labels),
        "10 labels, 5 examples": [
            OptionItem(item.item_id, head + item.prompt_ids, item.option_ids, item.gold) for item in plain
        ],
        "4 definitions": _definitions(rows, tokenizer, ()),
        "4 definitions, passage": _definitions(rows, tokenizer, rows[::-1]),
    }


def _definitions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, passages: Sequence[Row]) -> list[OptionItem]:
    """Which of four definitions belongs to the category of the first? The passage differs from item to item."""
    items = []
    for start in range(0, len(rows) - NUM_DEFINITIONS + 1, NUM_DEFINITIONS):
        group = rows[start : start + NUM_DEFINITIONS]
        texts = [" " + row.prompt.removeprefix("Definition: ").removesuffix("\nCategory:") for row in group]
        passage = " ".join(row.prompt for row in passages[start : start + NUM_DEFINITIONS])
        question = f"{passage}\nA definition of something of the category{group[0].answer}:"
        ids = [tuple(tokenizer(text).input_ids) for text in (question, *texts)]
        items.append(OptionItem(f"d{start}", ids[0], tuple(ids[1:]), 0))
    return items


def _peer(model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Score:
    if not find_spec("lm_eval"):
        return partial(_by_transformers, model, batch_size)
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")

    def score(items: Sequence[OptionItem]) -> list[list[float]]:
        requests = [
            ((item.item_id, str(index)), list(item.prompt_ids), list(option))
            for item in items
            for index, option in enumerate(item.option_ids)
        ]
        found = iter(harness._loglikelihood_tokens(requests, disable_tqdm=True))
        return [[next(found)[0] for _ in item.option_ids] for item in items]

    return score


@torch.inference_mode()
def _by_transformers(model: Any, batch_size: int, items: Sequence[OptionItem]) -> list[list[float]]:
    asked = [(item.prompt_ids, option) for item in items for option in item.option_ids]
    order = sorted(range(len(asked)), key=lambda at: -len(asked[at][0] + asked[at][1]))
    scores = [0.0] * len(asked)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        rows = [torch.tensor(asked[at][0] + asked[at][1]) for at in batch]
        logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits.log_softmax(-1)
        for at, row, row_logits in zip(batch, rows, logits, strict=True):
            first = len(asked[at][0])
            positions = torch.arange(first - 1, len(row) - 1)
            scores[at] = float(row_logits[positions, row[first:]].sum())
    found = iter(scores)
    return [[next(found) for _ in item.option_ids] for item in items]


def _compare(setting: Setting, items: list[OptionItem], model: Any, peers: dict[int, Score]) -> Json:
    ours, theirs = score_options(model, items), next(iter(peers.values()))(items)
    pairs = [
        (a, b) for score, row in zip(ours, theirs, strict=True) for a, b in zip(score.log_likelihoods, row, strict=True)
    ]
    sides = {"graftline": partial(wall_seconds, partial(score_options, model, items))}
    sides |= {f"peer, batch {size}": partial(wall_seconds, partial(peer, items)) for size, peer in peers.items()}
    seconds = turns(sides, setting.rounds or setting.size(5, 2), seed=setting.seed)
    own, *others = seconds.values()
    chosen = [max(range(len(row)), key=row.__getitem__) for row in theirs]
    return {
        "items": len(items),
        "limits": _limits(items, model, next(iter(peers.values()))),
        "items_per_second": {name: rate(len(items), times) for name, times in seconds.items()},
        "ratio": ratio([min(times) for times in zip(*others, strict=True)], own),
        "max_error_nats": max(abs(a - b) for a, b in pairs),
        "same_choice": sum(score.chosen == choice for score, choice in zip(ours, chosen, strict=True)),
    }


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
                linear(inputs[: self.positions[name] - start], layer.weight)


@torch.inference_mode()
def _limits(items: list[OptionItem], model: Any, peer: Score) -> dict[str, float]:
    """What both sides compute, and the share of our time that the bare products take (CPU time)."""
    score = partial(score_options, model, items)
    ours, theirs = Products(model, score), Products(model, partial(peer, items))
    shares = [cpu_seconds(ours.repeat) / cpu_seconds(score) for _ in range(3)]
    return {
        "gflop": ours.gflop,
        "peer_gflop": theirs.gflop,
        "ratio_of_operations": theirs.gflop / ours.gflop,
        "share_of_products_in_our_time": statistics.median(shares),
    }


PARTS = {"options": options}
