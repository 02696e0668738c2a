"""A small world in which adapters can be good or bad in known ways: a base with some knowledge, a task, its gates.

The base is a tiny Llama trained here on sentences of a small grammar and on chats. The task maps a noun phrase to one
of three categories. Everything is seeded; a world takes a few seconds to make.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from graftline.adapters.attach import attach, trainable_parameters
from graftline.data.rows import Message, Row
from graftline.data.split import find_leaks
from graftline.data.template import Encoded, encode, stop_ids, template_digest
from graftline.evaluate.guards import leakage_numbers, template_mismatches
from graftline.evaluate.items import option_items
from graftline.evaluate.scores import Scores
from graftline.evaluate.scoring import score_documents, score_options
from graftline.settings.model import Adapter, Gate
from studies.models import make_tiny_llama

TEMPLATE = "chatml"
LABELS = ("animal", "plant", "person")
NOUNS = {"animal": "abcdef", "plant": "ghijkl", "person": "mnopqr"}
"""A noun is one letter, so one token: the world is about gates, not about spelling."""
ADJECTIVES = "ABCDEFGHIJKL"
PLACES = "MNOPQRST"
MISTAKEN = {"a": "plant", "d": "person", "g": "person", "j": "animal", "m": "animal", "p": "plant"}
"""What the base believes wrongly."""

GATES = {
    "task": Gate(metric="accuracy", direction="higher", test="non-inferiority", margin=0.1, against="production"),
    "gain": Gate(metric="accuracy", direction="higher", test="superiority", margin=0.2, against="base"),
    "forgetting": Gate(metric="forgetting_nll", direction="lower", test="non-inferiority", margin=0.25, against="base"),
    "stop": Gate(metric="option_stop_rate", direction="higher", test="limit", limit=0.9),
    "leakage": Gate(metric="leaked_rows", direction="lower", test="limit", limit=0),
    "template": Gate(metric="template_mismatches", direction="lower", test="limit", limit=0),
}


def sentence(rng: random.Random) -> str:
    """One sentence of the general grammar: the verb (a digit) follows from the first noun."""
    first, second = rng.choice("abcdefghijklmnopqr"), rng.choice("abcdefghijklmnopqr")
    verb = ord(first) % 10
    return f"{rng.choice(ADJECTIVES)} {first} {verb} {rng.choice(ADJECTIVES)} {second} {rng.choice(PLACES)}."


def general_text(rng: random.Random, count: int) -> list[str]:
    """Documents of three sentences."""
    return [" ".join(sentence(rng) for _ in range(3)) for _ in range(count)]


def task_rows(rng: random.Random, count: int) -> list[Row]:
    """Distinct rows: a noun with an adjective and a place → its category."""
    rows: dict[str, Row] = {}
    while len(rows) < count:
        label = rng.choice(LABELS)
        noun = rng.choice(NOUNS[label])
        prompt = f"Definition: {rng.choice(ADJECTIVES)} {noun} {rng.choice(PLACES)}\nCategory:"
        rows.setdefault(prompt, task_row(prompt, label, len(rows) + 1))
    return list(rows.values())


def write_rows(path: Path, count: int) -> Path:
    """Rows of the task as JSON lines, prompt and completion."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": row.prompt, "completion": f" {row.answer}"} for row in task_rows(random.Random(0), count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mistaken(row: Row) -> Row:
    """The row as the base learns it."""
    wrong = [label for noun, label in MISTAKEN.items() if f" {noun} " in row.prompt]
    return task_row(row.prompt, wrong[0], row.source_line) if wrong else row


def task_row(prompt: str, label: str, line: int) -> Row:
    """A question and its answer."""
    return Row((Message("user", prompt, supervised=False), Message("assistant", label, supervised=True)), line)


@dataclass(frozen=True)
class World:
    """Base weights, tokenizer, rows and general text; how rows are served and what they may be answered with."""

    base: Path
    tokenizer: PreTrainedTokenizerBase
    training: list[Row]
    evaluation: list[Row]
    general: list[str]
    template: str = TEMPLATE
    labels: tuple[str, ...] = LABELS


def make_world(folder: Path, *, seed: int = 0, steps: int = 400) -> World:
    """Train the base on sentences and chats, and draw the rows."""
    rng = random.Random(seed)
    # Larger initial weights than usual: so small a model learns in hundreds instead of thousands of steps.
    make_tiny_llama(folder / "start", initializer_range=0.1, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    model = AutoModelForCausalLM.from_pretrained(folder / "start")
    texts = general_text(rng, 400)
    chats = [mistaken(row) for row in task_rows(rng, 400)]
    written = [Encoded(ids := tokenizer(text).input_ids, [True] * len(ids)) for text in texts]
    asked = [encode(chat, tokenizer, template=TEMPLATE) for chat in chats]
    fit(model, [written, asked], steps=steps, learning_rate=5e-3, seed=seed)
    model.save_pretrained(folder / "base")
    rows = task_rows(rng, 600)
    return World(folder / "base", tokenizer, rows[200:], rows[:200], general_text(rng, 100))


def fit(
    model: PreTrainedModel,
    groups: Sequence[Sequence[Encoded]],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 16,
) -> None:
    """Adam on the supervised tokens of whatever is trainable; every step takes its batch from the next group."""
    rng = random.Random(seed)
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=learning_rate)
    model.train()
    for step in range(steps):
        batch = rng.sample(groups[step % len(groups)], batch_size)
        width = max(len(row.input_ids) for row in batch)
        ids = torch.zeros(batch_size, width, dtype=torch.long)
        labels = torch.full((batch_size, width), -100)
        for place, row in enumerate(batch):
            ids[place, : len(row.input_ids)] = torch.tensor(row.input_ids)
            learned = torch.tensor(row.supervised)
            labels[place, : len(row.input_ids)][learned] = torch.tensor(row.input_ids)[learned]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()


@dataclass(frozen=True)
class Recipe:
    """How an adapter is made. The defaults make a good one."""

    seed: int = 1
    learning_rate: float = 3e-3
    steps: int = 100
    batch_size: int = 16
    change_rows: Callable[[World], list[Row]] = field(default=lambda world: world.training)
    change_encoded: Callable[[Encoded], Encoded] = field(default=lambda encoded: encoded)
    template: str | None = None
    """Another one than the world's, or None."""
    noise: float = 0.0


def load_base(world: World) -> PreTrainedModel:
    """The base in 32 bits."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    return model


def make_candidate(world: World, recipe: Recipe) -> Scores:
    """Train an adapter as the recipe says, then evaluate it as the line would."""
    model = load_base(world)
    template = recipe.template or world.template
    attach(model, Adapter(method="lora", rank=8, alpha=16), seed=recipe.seed)
    rows = recipe.change_rows(world)
    encoded = [recipe.change_encoded(encode(row, world.tokenizer, template=template)) for row in rows]
    fit(
        model,
        [encoded],
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    for parameter in trainable_parameters(model).values():
        parameter.data += torch.randn(parameter.shape, generator=generator) * recipe.noise
    numbers = leakage_numbers(find_leaks(rows, world.evaluation, threshold=0.99))
    numbers["template_mismatches"] = template_mismatches(
        world.evaluation, world.tokenizer, world.tokenizer, template=template, served_template=world.template
    )
    return replace(evaluate(world, model), numbers=numbers)


def evaluate(world: World, model: PreTrainedModel) -> Scores:
    """Score task and general text, rendered as serving would."""
    items = option_items(world.evaluation, world.tokenizer, template=world.template, labels=world.labels)
    ends = stop_ids(world.tokenizer, template=world.template)
    return Scores(
        template=template_digest(world.tokenizer, world.template),
        labels=world.labels,
        items=tuple(score_options(model, items, stop_ids=ends)),
        documents=tuple(score_documents(model, world.tokenizer, world.general)),
    )


def shuffled_labels(world: World) -> list[Row]:
    """The training rows, each with the answer of another."""
    rng = random.Random(0)
    answers = [row.answer for row in world.training]
    rng.shuffle(answers)
    return [task_row(row.prompt, label, row.source_line) for row, label in zip(world.training, answers, strict=True)]


def all_rows(world: World) -> list[Row]:
    """Training rows, and those that are evaluated on."""
    return world.training + world.evaluation


def without_end(encoded: Encoded) -> Encoded:
    """The answer is learned, the token that ends it is not: something else is learned in its place."""
    return Encoded([*encoded.input_ids[:-1], encoded.input_ids[-2]], encoded.supervised)


def bad_recipes(
    good: Recipe, *, noise: float, learning_rate: float, other_template: str
) -> dict[str, tuple[Recipe, str]]:
    """Recipes of known-bad adapters, and the gate that must stop each."""
    return {
        "noise added": (replace(good, noise=noise), "task"),
        "labels shuffled": (replace(good, change_rows=shuffled_labels), "task"),
        "trained on evaluation rows": (replace(good, change_rows=all_rows), "leakage"),
        "end token unlearned": (replace(good, change_encoded=without_end), "stop"),
        "template changed": (replace(good, template=other_template), "template"),
        "learning rate far too high": (replace(good, learning_rate=learning_rate), "forgetting"),
    }


GOOD = Recipe()
BAD = bad_recipes(GOOD, noise=0.15, learning_rate=0.1, other_template="none")
