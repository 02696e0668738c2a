"""A generated answer against reference texts: exact match, token F1 and ROUGE-L.

Sources: Rajpurkar et al. 2016 (SQuAD v1.1), Lin 2004 (ROUGE-L, F with beta = 1, no stemming). What is left out of a
text before it is compared, and what is not: `graftline.evaluate.words`. In scripts that put no blanks between words,
every letter counts as a word for F1 and ROUGE-L, as in the evaluations of MLQA and CMRC. With several references the
best one counts, for each measure by itself.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from graftline.errors import EvaluationError
from graftline.evaluate.words import characters, words


def normalize(text: str) -> str:
    """The text's words with single blanks between them: what `exact_match` compares."""
    return " ".join(words(text))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the answer's normal form is that of a reference, else 0.0."""
    return _best(answer, references, lambda a, b: float(normalize(a) == normalize(b)))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the bags of words; 1.0 if both are empty."""
    return _best(answer, references, _token_f1)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L F: precision and recall of the longest common subsequence of words, articles included."""
    return _best(answer, references, _rouge_l)


def _best(answer: str, references: Sequence[str], measure: Callable[[str, str], float]) -> float:
    if not references:
        raise EvaluationError("an answer has no reference to be compared with; give at least one")
    return max(measure(answer, reference) for reference in references)


def _token_f1(answer: str, reference: str) -> float:
    ours, theirs = ([one for word in words(text) for one in characters(word)] for text in (answer, reference))
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1((Counter(ours) & Counter(theirs)).total(), len(ours), len(theirs))


def _rouge_l(answer: str, reference: str) -> float:
    ours, theirs = (
        [one for word in words(text, articles=True, joined=False) for one in characters(word)]
        for text in (answer, reference)
    )
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
