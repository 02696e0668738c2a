"""What a record is, and how what is found is compared with it.

A record is a small text file in ``records/``. Text is compared character by character. Values (JSON) are compared
exactly too, except for numbers with a fraction: those may differ within a bound, because another processor adds in
another order. ``--golden-exact`` adds a comparison without any bound, with what this machine gave before.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"
UPDATE = "python -m pytest tests/golden --update-golden"
_MAX_LINES = 60
_WIDTH = 110


@dataclass(frozen=True)
class Bound:
    """Numbers agree if they differ by at most ``relative`` × the recorded one + ``absolute``."""

    relative: float
    absolute: float


def differences(recorded: Any, found: Any, bound: Bound, where: str = "") -> Iterator[str]:
    """Each place at which two JSON values differ by more than the bound, one line each."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key in [*recorded, *(key for key in found if key not in recorded)]:
            place = f"{where}.{key}" if where else key
            if key not in found:
                yield f"{place}: recorded {_short(recorded[key])}, now missing"
            elif key not in recorded:
                yield f"{place}: not recorded, now {_short(found[key])}"
            else:
                yield from differences(recorded[key], found[key], bound, place)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, pair in enumerate(zip(recorded, found, strict=True)):
            yield from differences(*pair, bound, f"{where}[{index}]")
    elif _is_number(recorded) and _is_number(found) and float in (type(recorded), type(found)):
        allowed = bound.relative * abs(recorded) + bound.absolute
        if not abs(found - recorded) <= allowed:  # also when one is not a number
            yield f"{where}: recorded {recorded!r}, now {found!r}: {found - recorded:+.3g}, allowed ±{allowed:.3g}"
    elif type(recorded) is not type(found) or recorded != found:
        yield f"{where}: recorded {_short(recorded)}, now {_short(found)}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]}…"


def rendered(value: Any, indent: int = 0) -> str:
    """JSON with one line for whatever fits on one; numbers with seven digits, which every bound is wider than."""
    if isinstance(value, float):
        value = float(f"{value:.7g}")
    flat = json.dumps(_rounded(value), ensure_ascii=False)
    if not isinstance(value, dict | list) or len(flat) + indent <= _WIDTH:
        return flat
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        lines = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {rendered(v, indent + 2)}" for key, v in value.items()]
    else:
        lines = [pad + rendered(v, indent + 2) for v in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(lines), " " * indent + closing])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Golden:
    """Compares with the records, or rewrites them.

    ``update``: rewrite a record that differs. ``exact``: folder of digests that this machine gave before; None: not
    asked for. ``report``: told what was rewritten.
    """

    update: bool
    exact: Path | None
    report: Callable[[str], None]
    records: Path = RECORDS

    def text(self, name: str, found: str) -> None:
        """Compare a text, which must be the same on every machine."""
        found = found.rstrip("\n") + "\n"
        path = self.records / name
        recorded = path.read_text(encoding="utf-8") if path.is_file() else ""
        if recorded != found:
            change = difflib.unified_diff(recorded.splitlines(), found.splitlines(), "recorded", "now", lineterm="")
            self._settle(path, list(change), found)

    def values(self, name: str, found: Any, bound: Bound) -> None:
        """Compare JSON values; numbers with a fraction within ``bound``."""
        self.bytes_on_this_machine(name, json.dumps(found).encode())
        path = self.records / name
        if not path.is_file():
            self._settle(path, ["all of it is new"], rendered(found) + "\n")
            return
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if lines := list(differences(recorded, found, bound)):
            self._settle(path, lines, rendered(found) + "\n")

    def bytes_on_this_machine(self, name: str, found: bytes) -> None:
        """With ``--golden-exact``: compare with the bytes that this machine gave the first time; keep them then."""
        if self.exact is None:
            return
        path, digest = self.exact / f"{name}.sha256", hashlib.sha256(found).hexdigest()
        if path.is_file() and not self.update:
            recorded = path.read_text(encoding="utf-8")
            assert digest == recorded, f"{name}: other bytes than this machine gave before ({path}): {digest}"
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(digest, encoding="utf-8")

    def _settle(self, path: Path, lines: list[str], found: str) -> None:
        name = path.relative_to(self.records).as_posix()
        shown = [*lines[:_MAX_LINES], *([f"… {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else [])]
        text = "\n".join([f"{name}:", *(f"  {line}" for line in shown)])
        if not self.update:
            missing = "" if path.is_file() else "there is no record; "
            raise AssertionError(f"{text}\n{missing}if this was meant, run `{UPDATE}` and commit {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
        self.report(text)
