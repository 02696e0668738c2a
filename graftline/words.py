"""Numbers with their nouns, for pages and messages."""


def count(number: int, noun: str) -> str:
    """``1 pipeline``, ``2 pipelines``, ``0 entries``: the noun is given for one."""
    if number == 1:
        return f"1 {noun}"
    ending_in_y = noun.endswith("y") and noun[-2:-1] not in "aeiou"
    return f"{number} {noun[:-1]}ies" if ending_in_y else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two, rounded: ``45 seconds``, ``90 minutes``, ``3 hours``."""
    rounded = round(seconds)
    if rounded < 120:
        return count(rounded, "second")
    return count(round(seconds / 60), "minute") if rounded < 7200 else count(round(seconds / 3600), "hour")
