"""Synonyms of English words from the files of WordNet 3.0, which Debian has as `wordnet-base`.

The format is described in its manual page wndb(5).
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
PARTS = "verb", "noun", "adj"
"""Parts of speech, those that a word is tried as first."""
ENDINGS = {
    "verb": ("ied y", "ies y", "ed e", "ed ", "ing e", "ing ", "es ", "s ", " "),
    "noun": ("ies y", "es ", "s ", " "),
    "adj": (" ",),
}
"""Regular endings, each with the one of the base form."""
SENSES = 2
"""Of a word, the most frequent ones."""
MOST_CHARACTERS = 18


@cache
def synonyms(word: str) -> tuple[str, ...]:
    """Return words of the same meaning, or of a wider one, in the form of a lower-case word; often none."""
    for part in PARTS:
        base, ending = _base_form(word, part)
        if base and (found := [_inflected(other, part, ending) for other in _related(base, part)]):
            return tuple(dict.fromkeys(found))
    return ()


def _base_form(word: str, part: str) -> tuple[str, str]:
    """Return the base form of a word and its regular ending: "", "s", "ed" or "ing"; two empty strings if unknown."""
    index = _index(part)
    if (base := _irregular(part).get(word)) in index:
        return base, "ed" if part == "verb" else "s"
    for ending, _, of_base in (rule.partition(" ") for rule in ENDINGS[part]):
        base = word.removesuffix(ending) + of_base
        if word.endswith(ending) and len(base) > 2 and base in index:
            return base, {"ied": "ed", "ies": "s", "es": "s"}.get(ending, ending)
    return "", ""


def _related(base: str, part: str) -> Iterator[str]:
    """Give the other words of the first senses; where there are none, the first word of the wider sense."""
    for offset in _index(part)[base][:SENSES]:
        words, wider = _sense(offset, part)
        if len(words) < 2 and wider:
            words = _sense(wider, part)[0][:1]
        for word in words:
            text = word.replace("_", " ")
            is_other = text[:4] != base[:4] and re.fullmatch(r"[a-z]+( [a-z]+)?", text)
            if is_other and len(text) <= MOST_CHARACTERS:
                yield text


def _inflected(text: str, part: str, ending: str) -> str:
    head, space, tail = text.partition(" ")
    if part == "noun" and ending:
        head, space, tail = text, "", ""
    soft = re.sub(r"(?<=[^aeiou])y$", "i", head)
    if ending == "ed":
        head = soft + ("d" if head.endswith("e") else "ed")
    elif ending == "ing":
        head = re.sub(r"(?<!e)e$", "", head) + "ing"
    elif ending == "s":
        head = soft + ("es" if soft != head or re.search(r"(s|x|ch|sh)$", head) else "s")
    return head + space + tail


@cache
def _index(part: str) -> dict[str, list[str]]:
    """Read the offsets of the senses of every base form, the most frequent first."""
    offsets = {}
    with (WORDNET / f"index.{part}").open(encoding="ascii") as lines:
        for line in lines:
            if not line.startswith(" "):  # the licence
                fields = line.split()
                offsets[fields[0]] = fields[-int(fields[2]) :]
    return offsets


@cache
def _irregular(part: str) -> dict[str, str]:
    lines = (WORDNET / f"{part}.exc").read_text("ascii").splitlines()
    return {fields[0]: fields[1] for line in lines if len(fields := line.split()) > 1}


@cache
def _senses(part: str) -> bytes:
    return (WORDNET / f"data.{part}").read_bytes()


def _sense(offset: str, part: str) -> tuple[list[str], str | None]:
    """Return the words of a sense and the offset of the wider one."""
    content, start = _senses(part), int(offset)
    fields = content[start : content.index(b"\n", start)].decode("ascii").split()
    count = int(fields[3], 16)
    words = [field.partition("(")[0] for field in fields[4 : 4 + 2 * count : 2]]
    pointers = fields[5 + 2 * count :]
    wider = (pointers[at + 1] for at in range(0, 4 * int(fields[4 + 2 * count]), 4) if pointers[at] == "@")
    return words, next(wider, None)
