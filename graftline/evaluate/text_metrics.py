"""A generated answer against reference texts: exact match, token F1 (both as SQuAD normalizes) and ROUGE-L.

Sources: Rajpurkar et al. 2016 (SQuAD v1.1 evaluation: lower case, no punctuation, no English articles, single spaces);
Lin 2004 (ROUGE-L, F with beta = 1, tokens are runs of letters and digits, no stemming). With several references the
best one counts, for each measure by itself.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from graftline.errors import EvaluationError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(r"[^\W_]+")


def normalize(text: str) -> str:
    """SQuAD's normal form."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer's normal form is that of a reference, else 0.0."""
    return _best(answer, references, lambda a, b: float(normalize(a) == normalize(b)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the bags of normalized words; 1.0 if both are empty."""
    return _best(answer, references, _token_f1)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F: precision and recall of the longest common subsequence of words."""
    return _best(answer, references, _rouge_l)


def _best(answer: str, references: Sequence[str], measure: Callable[[str, str], float]) -> float:
    if not references:
        raise EvaluationError("an answer has no reference to be compared with; give at least one")
    return max(measure(answer, reference) for reference in references)


def _token_f1(answer: str, reference: str) -> float:
    ours, theirs = normalize(answer).split(), normalize(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def _rouge_l(answer: str, reference: str) -> float:
    ours, theirs = _WORDS.findall(answer.lower()), _WORDS.findall(reference.lower())
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(_common_subsequence(ours, theirs), len(ours), len(theirs))


def _f1(shared: int, num_ours: int, num_theirs: int) -> float:
    return 2 * shared / (num_ours + num_theirs)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, one row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[place]))
    return row[-1]
