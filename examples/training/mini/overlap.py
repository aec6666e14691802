"""How much a question and a sentence have in common, and whether the sentence can answer it."""

import re

STOP_WORDS = (
    "a an the of in on at to for by with from as is are was were be been being do does did has have had what which "
    "who whom whose when where why how many much it its this that these those and or not can could should would "
    "will may might there their they he she his her him i you your my we our one s t than then also into about "
    "after before over under between during"
)
STOP = frozenset(STOP_WORDS.split())
TIME = re.compile(
    r"\d|century|January|February|March|April|May|June|July|August|September|October|November|December"
    r"|during|after|before"
)
NUMBER = re.compile(
    r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|million|billion|half"
    r"|third|quarter)\b",
    re.I,
)
ASKS = re.compile(r"^\W*(who|when|where|how many|how much|what year|which year|in what year|in which year)\b", re.I)


def shared_words(question: str, text: str) -> float:
    """Return the share of a question's words, by their first five letters, that a text has."""
    stems = [
        {word[:5] for word in re.findall(r"[a-z0-9]+", part.lower()) if word not in STOP and len(word) > 1}
        for part in (question, text)
    ]
    return len(stems[0] & stems[1]) / max(1, len(stems[0]))


def may_answer(question: str, sentence: str) -> bool:
    """Say whether a sentence has the kind of answer that a question asks for: a time, a number or a name."""
    match = ASKS.match(question)
    if not match:
        return True
    word = match[1].lower()
    if "year" in word or word == "when":
        return bool(TIME.search(sentence))
    return bool(NUMBER.search(sentence) if word.startswith("how") else re.search(r"\s[A-Z]", sentence))
