"""Rows by the hundred thousand: encoding, preparing and starting to train, against the tokenizer's own batches.

Made-up instruction rows of about 480 tokens, one in a hundred with a prompt that is nearly the one before. Each size is
measured in processes of their own: time, anonymous memory (RssAnon, sampled) and what the stages leave on the disk.
The peer is what no encoding can do without: prompt and joint text through the tokenizer in batches of 1,000, in the
same run. Times are CPU seconds of all threads: the machine is shared. `sizes` takes 10,000 and 100,000 rows; a million
too with --rounds 3.
"""

import itertools
import json
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from graftline.data.columns import open_columns
from graftline.data.encoding import encode_file, fit_declared
from graftline.data.mixing import FetchedSource
from graftline.data.near import NearIndex
from graftline.data.preparation import EVALUATION, TRAINING, prepare_rows
from graftline.data.row_file import RowFile
from graftline.data.rows import each_row
from graftline.data.validation import validate
from graftline.settings.data import Data
from graftline.train.batches import MicroBatches, check_rows, plan_steps
from studies.harness import Json, Setting, cpu_seconds, ratio, turns, wall_seconds

SIZES = (10_000, 100_000, 1_000_000)
_SYLLABLES = (
    *("ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui"),
    *("ro", "su", "ta", "ve", "wi", "xo", "yu", "za", "tion", "mint", "er", "ing"),
)
_BATCH = 1000


def make_rows(path: Path, count: int) -> Path:
    """Write ``count`` rows of prompt and completion, words by Zipf's law, always the same ones."""
    if path.exists():
        return path
    chooser = random.Random(7)
    words = ["".join(chooser.choices(_SYLLABLES, k=chooser.randint(1, 4))) for _ in range(30_000)]
    weights = list(itertools.accumulate(1 / (at + 5) for at in range(len(words))))

    def some(mean: float, spread: float, least: int, most: int) -> list[str]:
        number = max(least, min(most, int(chooser.lognormvariate(mean, spread))))
        return chooser.choices(words, cum_weights=weights, k=number)

    prompt: list[str] = []
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            if prompt and chooser.random() < 0.01:
                prompt[chooser.randrange(len(prompt))] = "changed"
            else:
                prompt = some(3.6, 0.7, 8, 400)
            row = {"prompt": " ".join(prompt), "completion": " " + " ".join(some(4.6, 0.8, 4, 1200))}
            out.write(json.dumps(row) + "\n")
    return path


def encoding(setting: Setting) -> Json:
    """A file of rows into columns on the disk, against the tokenizer's own batches of the same texts."""
    count = setting.size(10_000, 200)
    file, base = make_rows(setting.work / "rows.jsonl", count), setting.base()
    tokenizer, cache = AutoTokenizer.from_pretrained(base), setting.work / "cache"

    def ours() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        return cpu_seconds(lambda: _encode(RowFile(file), tokenizer, cache))

    sides = {"ours": ours, "tokenizer": lambda: cpu_seconds(lambda: _own_batches(file, tokenizer))}
    seconds = turns(sides, setting.turns(5), seed=setting.seed)
    return {
        "rows": count,
        "cpu_over_the_tokenizers": ratio(seconds["ours"], seconds["tokenizer"]),
        "target": 1.25,
    }


def near_duplicates(setting: Setting) -> Json:
    """Prompts compared with all earlier ones, a second of one core."""
    count = setting.size(20_000, 300)
    file = make_rows(setting.work / "rows.jsonl", count)
    prompts = [row.prompt for row in each_row(file)]
    found: list[int] = []
    seconds = turns({"near": lambda: cpu_seconds(lambda: found.append(_count_near(prompts)))}, setting.turns(3))
    rates = [count / one for one in seconds["near"]]
    return {"rows": count, "found": found[0], "rows_a_cpu_second": [round(one) for one in rates], "target": 15_000}


def sizes(setting: Setting) -> Json:
    """Fetching and validating, encoding, and the start of a training, at sizes that grow tenfold."""
    counts = SIZES[: setting.rounds or 2] if not setting.quick else (200, 400)
    found: Json = {"rows": list(counts)}
    steps: dict[str, Callable[[Path, str], None]] = {"tokenizer": _tokenize, "prepare": _prepare, "start": _start}
    for count in counts:
        work = setting.folder(str(count))
        make_rows(work / "rows.jsonl", count)
        about: Json = {"source_bytes": (work / "rows.jsonl").stat().st_size}
        for name, step in steps.items():
            about[name] = setting.apart(measured, step, work, str(setting.base()))
        left = [path for folder in ("fetch", "cache") for path in (work / folder).rglob("*") if path.is_file()]
        about["disk_over_source"] = round(sum(path.stat().st_size for path in left) / about["source_bytes"], 2)
        about["prepare_over_the_tokenizers"] = round(
            about["prepare"]["cpu_seconds"] / about["tokenizer"]["cpu_seconds"], 2
        )
        found[str(count)] = about
    last, before = (found[str(count)]["prepare"]["cpu_seconds"] for count in (counts[-1], counts[-2]))
    found["growth_of_prepare"] = round(math.log(last / before) / math.log(counts[-1] / counts[-2]), 3)
    return found


def measured(step: Callable[[Path, str], None], work: Path, base: str) -> Json:
    """Seconds of a step, and the most anonymous memory while it ran."""
    stopped, most = threading.Event(), [_anonymous_bytes()]

    def look() -> None:
        while not stopped.wait(0.02):
            most[0] = max(most[0], _anonymous_bytes())

    watcher = threading.Thread(target=look)
    before = most[0]
    watcher.start()
    try:
        seconds = list[float]()
        cpu = cpu_seconds(lambda: seconds.append(wall_seconds(partial(step, work, base))))
    finally:
        stopped.set()
        watcher.join()
    memory = {"anonymous_mb": most[0] >> 20, "anonymous_mb_before": before >> 20}
    return {"seconds": round(seconds[0], 2), "cpu_seconds": round(cpu, 2), **memory}


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


def _data(**changes: Any) -> Data:
    given = {"source": "path:rows.jsonl", "evaluation_rows": 50, "max_tokens": 2048, "overlength": "drop"}
    return Data.model_validate(given | changes)


def _encode(file: RowFile, tokenizer: Any, cache: Path) -> Path:
    return encode_file(file, tokenizer, _data(), template="none", cache=cache)


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield row["prompt"], row["prompt"] + row["completion"]


def _own_batches(file: Path, tokenizer: Any) -> None:
    texts = _texts(file)
    while batch := list(itertools.islice(texts, _BATCH)):
        for side in zip(*batch, strict=True):
            tokenizer(list(side), add_special_tokens=False)


def _count_near(prompts: list[str]) -> int:
    index, found = NearIndex(prompts), 0
    for at in range(len(prompts)):
        found += any(True for _ in index.near(at))
        index.add(at)
    return found


def _tokenize(work: Path, base: str) -> None:
    _own_batches(work / "rows.jsonl", AutoTokenizer.from_pretrained(base))


def _prepare(work: Path, base: str) -> None:
    """What the stages fetch and validate do with rows."""
    data, out, tokenizer = _data(), work / "fetch", AutoTokenizer.from_pretrained(base)
    source = FetchedSource(data.all_sources[0], (("rows.jsonl", work / "rows.jsonl"),))
    prepare_rows(data, [source], root=work, out=out)
    files = {"training": RowFile(out / TRAINING), "evaluation": RowFile(out / EVALUATION)}
    validate(
        files["training"],
        files["evaluation"],
        tokenizer=tokenizer,
        data=data,
        template="none",
        out=work / "validate",
        encode=lambda side: fit_declared(open_columns(_encode(files[side], tokenizer, work / "cache")), data),
    )


def _start(work: Path, base: str) -> None:
    """From the encoded rows to the first batch of an epoch."""
    largest = max((work / "cache").glob("*/ids.npy"), key=lambda path: path.stat().st_size)
    rows = fit_declared(open_columns(largest.parent), _data()).columns
    check_rows(rows)
    steps = plan_steps(rows.lengths, num_steps=len(rows) // 8, rows_per_step=8, seed=0)
    batches = MicroBatches(rows, steps, parts=1)
    batches.digest()
    assert batches[0]["input_ids"].numel() > 0
    assert numpy.asarray(steps).shape[1] == 8


PARTS = {"encoding": encoding, "near_duplicates": near_duplicates, "sizes": sizes}
