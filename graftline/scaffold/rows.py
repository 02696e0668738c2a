"""The rows that a new project starts with: short reviews, positive or negative, the same ones each time."""

import json
import random

NUM_ROWS = 1300

_THINGS = (
    *("desk lamp", "kettle", "rucksack", "bicycle pump", "keyboard", "tent", "coffee grinder", "raincoat", "radio"),
    *("pair of boots", "frying pan", "garden hose", "notebook", "wall clock", "hand mixer", "torch", "hat stand"),
    *("swivel chair", "water bottle", "paint set", "sleeping bag", "guitar stand", "toaster", "bread knife"),
)
_OPINIONS = {
    "positive": (
        *("It works better than anything I had before.", "It was worth every penny.", "It still looks as good as new."),
        *("It has made my mornings easier.", "It is a pleasure to use.", "It is even better than I had hoped."),
        *(
            "It has never let me down.",
            "It feels solid and well made.",
            "I would buy it again without a second thought.",
        ),
        *("What a lovely surprise!", "It does exactly what it should.", "I recommend it to everyone who asks."),
        *("The whole family is impressed.", "The best present I got this year.", "It turned out to be a bargain."),
        "I am delighted with it.",
    ),
    "negative": (
        *("It broke after two days.", "It was a waste of money.", "It arrived scratched and incomplete."),
        *("I regret buying it.", "It stopped working within a week.", "It is a disappointment."),
        *("It smells of cheap plastic.", "It fell apart in my hands.", "It went straight back to the shop."),
        *("It was nothing like the pictures.", "It has given me nothing but trouble.", "It is badly made."),
        *(
            "I would not wish it on anybody.",
            "It failed when I needed it most.",
            "It cost far too much for what it is.",
        ),
        "I have complained about it twice.",
    ),
}
_PLACES = (
    *("at the market in Leeds", "from a shop near the station", "online, late one evening", "for my sister's birthday"),
    *("in the spring sale", "before a trip to Norway", "on a neighbour's advice", "to replace an old one"),
    *("for the new flat", "after reading a test of twelve", "on my way to work", "with a voucher from Christmas"),
    *("second hand, in its box", "during a rainy week in Wales", "for the school play", "when ours was stolen"),
    *("at the airport", "for our allotment", "by telephone", "through a colleague's discount"),
)
_REMARKS = (
    *(
        "Delivery took four days.",
        "The box was blue.",
        "My brother has the same one.",
        "It came with a printed manual.",
    ),
    *(
        "I use it about twice a week.",
        "There is also a smaller size.",
        "The colour is called slate.",
        "I had it sent to work.",
    ),
    *("The label says it was made in Porto.", "We keep it in the hall cupboard.", "It weighs about a kilo."),
    *("The courier left it with Mrs Okafor.", "I paid by card.", "It takes up half a shelf.", "The handle is wooden."),
    *("Our cat sleeps next to it.", "The receipt was in the bag.", "It fits through the kitchen door."),
    *(
        "I measured it twice.",
        "The model number ends in seven.",
        "It stands by the window now.",
        "Two screws were spare.",
    ),
)


def rows() -> list[dict[str, str]]:
    """Rows with the keys ``prompt`` and ``completion``: as many of each label, no prompt twice, in a mixed order."""
    draw = random.Random(2)
    found: dict[str, str] = {}
    while len(found) < NUM_ROWS:
        label = ("positive", "negative")[len(found) % 2]
        thing, place, opinion = draw.choice(_THINGS), draw.choice(_PLACES), draw.choice(_OPINIONS[label])
        before, after = draw.sample(_REMARKS, 2)
        review = f"A {thing}, bought {place}. {before} {opinion} {after}"
        found.setdefault(f"Review: {review}\nSentiment:", f" {label}")
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found.items()]


def as_json_lines() -> str:
    """The rows as the text of a .jsonl file."""
    return "".join(json.dumps(row) + "\n" for row in rows())
