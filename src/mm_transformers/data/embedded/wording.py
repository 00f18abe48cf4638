"""The messages of the embedded data set: how word, remark and intent become an English text.

A message has a *core* (the word and the intent) and a *remark* (the polarity), in either order. An optional opener and
an optional closing carry no information. A wording depends on the text factors alone, so it tells nothing about the
picture.

The held-out wordings of the test split use remarks and arrangements that never appear in training. All of their words
do appear in training. A held-out remark pairs a frame with a filling that training shows only apart, or uses a frame of
its own.
"""

from __future__ import annotations

import random
import re
from functools import cache


OPENERS = ("", "Hello,", "By the way,", "Just so you know,", "Well,", "Quick note:", "Dear all,", "Me again.")
CLOSINGS = ("", "More later.", "See you soon.", "Bye for now.", "That is all.", "Talk to you soon.")

# {word} is always a singular noun after "the", which reads well in each of its senses.
CORES: dict[str, tuple[str, ...]] = {
    "statement": (
        "This is about the {word}.",
        "I told you about the {word}.",
        "Here is the {word} again.",
        "We came for the {word}.",
        "I have a picture of the {word}.",
        "You can see the {word} from here.",
    ),
    "question": (
        "Have you heard about the {word}?",
        "Is this the {word} you told me about?",
        "What do you think of the {word}?",
        "Do you know the {word}?",
        "Did you come for the {word}?",
        "Can we see the {word} from here?",
    ),
    "request": (
        "Please have a look at the {word}.",
        "Tell me about the {word}, please.",
        "Please think of the {word} for me.",
        "Send me a picture of the {word}, please.",
        "Please ask about the {word} soon.",
        "Look for the {word} again, please.",
    ),
}
HELD_OUT_CORES: dict[str, tuple[str, ...]] = {
    "statement": ("We heard about the {word}.", "Here you have the {word}."),
    "question": ("What do you know about the {word}?", "Can you see the {word} again?"),
    "request": ("Please tell me about the {word} soon.", "Please send the picture of the {word} again."),
}

ADJECTIVES = {
    "cheerful": ("wonderful", "lovely", "perfect", "delightful", "glorious", "splendid", "charming", "marvellous"),
    "gloomy": ("dreadful", "miserable", "horrible", "terrible", "dismal", "ghastly", "wretched", "depressing"),
    "factual": ("normal", "regular", "typical", "standard", "common", "routine", "familiar", "customary"),
}
NOUNS = ("day", "morning", "afternoon", "scene", "place")
FRAMES = (
    "What a {adjective} {noun} this is!",
    "Such a {adjective} {noun} here.",
    "It is a {adjective} {noun}.",
    "We call it a {adjective} {noun}.",
    "The {noun} is {adjective}.",
    "It all looks {adjective} to me.",
)
HELD_OUT_FRAMES = ("Here is a {adjective} {noun}.", "I call this {noun} {adjective}.")
# Plain facts: only the factual remark uses them, beside the frames that all polarities share.
FACT_FRAMES = ("We came here {time}.", "I am here {time}.", "The picture is from {time}.")
HELD_OUT_FACT_FRAMES = ("This picture is from {time}.",)
TIMES = ("Monday", "Friday", "noon", "nine", "May", "October")
TIME_PREPOSITIONS = {"Monday": "on", "Friday": "on", "noon": "at", "nine": "at", "May": "in", "October": "in"}

ORDERS = (
    "{opener} {core} {remark}",
    "{opener} {remark} {core}",
    "{core} {remark} {closing}",
    "{remark} {core} {closing}",
)
HELD_OUT_ORDERS = ("{opener} {core} {remark} {closing}", "{opener} {remark} {core} {closing}")
# Every fourth pair of a frame and a filling is held out.
_HELD_OUT_EVERY = 4


def _fact(frame: str, time: str) -> str:
    return frame.format(time=time if " from " in frame else f"{TIME_PREPOSITIONS[time]} {time}")


@cache
def remark_pool(remark: str, held_out: bool) -> tuple[str, ...]:
    """All remarks of one polarity ("cheerful", "gloomy" or "factual"): those of training, or the held-out ones."""
    pool = [
        frame.format(adjective=adjective, noun=noun)
        for frame_id, frame in enumerate(FRAMES)
        for adjective_id, adjective in enumerate(ADJECTIVES[remark])
        for noun in NOUNS
        if ((frame_id + adjective_id) % _HELD_OUT_EVERY == 0) == held_out
    ]
    if held_out:
        pool += [f.format(adjective=a, noun=n) for f in HELD_OUT_FRAMES for a in ADJECTIVES[remark] for n in NOUNS]
    if remark == "factual":
        pool += [
            _fact(frame, time)
            for frame_id, frame in enumerate(FACT_FRAMES)
            for time_id, time in enumerate(TIMES)
            if ((frame_id + time_id) % _HELD_OUT_EVERY == 0) == held_out
        ] * 3  # so few remarks would otherwise be drawn too rarely
        if held_out:
            pool += [_fact(frame, time) for frame in HELD_OUT_FACT_FRAMES for time in TIMES]
    return tuple(pool)


def write_message(word: str, remark: str, intent: str, rng: random.Random, held_out: bool = False) -> str:
    """Draws one wording of the message with these text factors.

    Args:
        word: the ambiguous word, a singular noun.
        remark: "cheerful", "gloomy" or "factual".
        intent: "statement", "question" or "request".
        rng: the only source of chance.
        held_out: use the wordings kept from training.
    """
    cores = CORES[intent]
    if held_out and rng.random() < 0.5:
        cores = HELD_OUT_CORES[intent]
    message = rng.choice(HELD_OUT_ORDERS if held_out else ORDERS).format(
        opener=rng.choice(OPENERS),
        core=rng.choice(cores).format(word=word),
        remark=rng.choice(remark_pool(remark, held_out)),
        closing=rng.choice(CLOSINGS),
    )
    # "Hello, Is this ..." -> "Hello, is this ...", but "Hello, I ..."
    message = re.sub(r", ([A-Z][a-z])", lambda match: match[0].lower(), message)
    return " ".join(message.split())
