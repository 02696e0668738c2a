"""Normalization of answers before comparison with a reference: meaningless differences are dropped, others stay.

The form is SQuAD's (Rajpurkar et al. 2016: lower case, no punctuation, no English articles, single spaces) without its
flaws: there "A" equals the empty answer, "+" equals "-", -1 equals 1 and C equals C++. Dropped: case, marks that end or
quote a phrase, and articles before a word. Kept: signs and symbols (+ - < = % $ # / ...), everything inside a number,
accents, and any text that would otherwise become empty. Canonically equivalent Unicode and wide or narrow letters are
unified; compatibility forms are not (2² is not 22).
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping

_INVISIBLE = dict.fromkeys(
    [
        *(0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x2065)),
        *(*range(0x2066, 0x206A), 0xFE0E, 0xFE0F, 0xFEFF),
    ]
)
"""Soft hyphens, marks of the writing direction, and what asks for a coloured or a plain emoji."""
_DASHES = dict.fromkeys([0x2010, 0x2011, 0x2012, 0x2013, 0x2212], "-")
_LONG_DASHES = "\N{EM DASH}\N{HORIZONTAL BAR}"
_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}\N{HEBREW PUNCTUATION GERESH}\N{HEBREW PUNCTUATION GERSHAYIM}"
_SIGNS = frozenset(
    "%&*@#/\\_-\N{SECTION SIGN}\N{PILCROW SIGN}\N{PER MILLE SIGN}\N{PER TEN THOUSAND SIGN}"
    "\N{ARABIC PERCENT SIGN}\N{ARABIC-INDIC PER MILLE SIGN}\N{ARABIC-INDIC PER TEN THOUSAND SIGN}"
    "\N{PRIME}\N{DOUBLE PRIME}\N{TRIPLE PRIME}\N{QUADRUPLE PRIME}"
)
"""Unicode punctuation that carries meaning; Unicode symbols always do."""
_FEET = {"'": "\N{PRIME}", '"': "\N{DOUBLE PRIME}"}
"""Unpaired after a number they are units (feet, inches, minutes of arc), not quotation marks."""
_NAME_DOT = re.compile(r"(?<=[^\W\d_]{3})\.(?=[^\W\d_])|(?<=[^\W\d_])\.(?=[^\W\d_]{3})")
"""The point in a name ("file.txt", "example.org"); that of an abbreviation ("U.S.", "Ph.D.") is dropped."""
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3}|`+)(?=[^\s*`])(.{0,1000}?[^\s*`])\1(?![\w*])")
"""The bound keeps many marks that nothing closes from being quadratic: a paragraph is emphasized at most."""
_ARTICLE = re.compile(r"(?<![\w'+-])(?:(?:an|the|An|The)\s+(?=\w)|a\s+(?=\w\w))|^\W*(?:A|AN|THE)\s+(?=\w\w)")
"""An article precedes a word: in "vitamin A" and "A, B" the letter is a name."""
_UNIT = re.compile(r"(?<=\d)\s+(?=[%‰‱٪°])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HENTAIGANA", "BOPOMOFO", "YI SYLLABLE", "TANGUT"),
    *("THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI", "NEW TAI"),
)
"""Prefixes of the Unicode names of letters whose scripts put no spaces between words."""
_JOINER = "\N{ZERO WIDTH JOINER}"
_SKIN = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_FLAG_LETTERS = frozenset(map(chr, range(0x1F1E6, 0x1F200)))
"""Two of them are a flag."""


def words(text: str, *, articles: bool = False, joined: bool = True) -> list[str]:
    """The words of the normalized text.

    Args:
        text: any text.
        articles: keep "a", "an" and "the".
        joined: join the parts of a word ("twenty-one" → twentyone, "U.S." → us, as in SQuAD) instead of splitting it.
    """
    text = _unified(text)
    if not articles:
        text = _ARTICLE.sub("", text)
    text = _EMPHASIS.sub(r"\2", text)
    text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), _UNIT.sub("", text.lower()))
    found = [part for chunk in text.split() for part in _parts(chunk, "" if joined else " ").split()]
    return found or text.split()


def characters(word: str) -> Iterator[str]:
    """A word of a script without spaces, or of emoji, split into letters with their marks; other words whole."""
    piece, is_open = "", False
    for char in word:
        if not _continues(piece, char):
            if piece and (_is_unspaced(char) or not is_open):
                yield piece
                piece = ""
            is_open = not _is_unspaced(char)
        piece += char
    if piece:
        yield piece


def _continues(piece: str, char: str) -> bool:
    """Whether a character belongs to the letter or emoji before it: marks, skin colours, joined emoji, flags."""
    if unicodedata.category(char)[0] == "M" or char in _SKIN or char == _JOINER:
        return True
    return piece.endswith(_JOINER) or (char in _FLAG_LETTERS and piece in _FLAG_LETTERS)


def _unified(text: str) -> str:
    """Canonical composition; letter widths and dashes unified, invisible characters removed."""
    text = text.translate(_INVISIBLE).translate(_DASHES)
    for mark, unit in _FEET.items():
        if text.count(mark) == 1:
            text = re.sub(rf"(?<=\d){mark}(?![^\W\d_])", unit, text)
    return unicodedata.normalize("NFC", "".join(map(_usual_width, text)))


@functools.lru_cache(maxsize=4096)
def _usual_width(char: str) -> str:
    kind = unicodedata.decomposition(char).partition(" ")[0]
    return unicodedata.normalize("NFKC", char) if kind in ("<wide>", "<narrow>", "<small>") else char


def _parts(chunk: str, joint: str) -> str:
    """The words of a chunk without spaces, separated by spaces; empty if it has only marks."""
    if not any(_is_word(char) or _is_number(char) for char in chunk):
        return "" if all(map(_is_mark, chunk)) else chunk
    chunk = _without_edges(chunk)
    kept = {found.start() for found in _NAME_DOT.finditer(chunk)} if not joint else set()
    around = enumerate(zip(" " + chunk, chunk, chunk[1:] + " ", strict=False))
    return "".join(char if at in kept else _part(char, before, after, joint) for at, (before, char, after) in around)


def _part(char: str, before: str, after: str, joint: str) -> str:
    """The replacement of a character between two others."""
    if (char != "-" and not _is_mark(char)) or char in "()[]{}" or _is_number(before) or _is_number(after):
        return char
    if before == " ":  # `_without_edges` has left it
        return char
    if char == "-":
        return joint if _is_word(before) and _is_word(after) else char
    if char in _APOSTROPHES:
        return ""
    return joint if char == "." else " "


def _without_edges(chunk: str) -> str:
    """The chunk without the marks around it, except a point before a digit and brackets paired inside."""
    start, stop = 0, len(chunk)
    surplus = {kind: chunk.count(kind[0]) - chunk.count(kind[1]) for kind in ("()", "[]", "{}")}

    def drop(char: str) -> None:
        for kind in surplus:
            surplus[kind] -= (char == kind[0]) - (char == kind[1])

    # No recursion and no slices of the rest: a broken model writes thousands of brackets.
    while True:
        while start < stop and _is_outer(chunk[start], chunk[start + 1 : min(start + 2, stop)], surplus, first=True):
            drop(chunk[start])
            start += 1
        while start < stop and _is_outer(chunk[stop - 1], chunk[max(start, stop - 2) : stop - 1], surplus, first=False):
            stop -= 1
            drop(chunk[stop])
        if not (chunk[start : start + 1] == "(" and chunk[stop - 1] == ")" and stop - start > 2):
            return chunk[start:stop]
        start, stop = start + 1, stop - 1


def _is_outer(char: str, beside: str, surplus: Mapping[str, int], *, first: bool) -> bool:
    """Whether the outer character of a chunk is a mark around it. ``surplus``: opening minus closing brackets."""
    if not _is_mark(char):
        return False
    if char in "([{" or char in ")]}":
        return any(surplus.values()) and (char in "()" or not _is_number(beside or " "))
    # ".5", and "!" of code: a phrase ends with it.
    return not (first and ((char == "." and _is_number(beside or " ")) or (char == "!" and _is_word(beside or " "))))


@functools.lru_cache(maxsize=4096)
def _is_mark(char: str) -> bool:
    """Punctuation that ends, quotes or encloses, and carries no meaning."""
    return char in _LONG_DASHES or (unicodedata.category(char)[0] == "P" and char not in _SIGNS)


def _is_word(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"


def _is_number(char: str) -> bool:
    return unicodedata.category(char)[0] == "N"


@functools.lru_cache(maxsize=4096)
def _is_unspaced(char: str) -> bool:
    """Whether its script, or emoji, puts no spaces between words."""
    if unicodedata.category(char) == "So":
        return "\u2600" <= char < "\u2800" or char >= "\U0001f000"
    # Among the numbers is \N{IDEOGRAPHIC NUMBER ZERO}, which years are written with.
    return unicodedata.category(char)[0] in "LN" and unicodedata.name(char, "").startswith(_UNSPACED)
