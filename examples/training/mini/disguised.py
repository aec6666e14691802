"""Build groups against word overlap: answers in other words, among sentences that repeat a question's words.

python disguised.py DATA TEACHERS OUT --groups 90 [--seed N]

OUT is a file of JSON lines. Needs Debian's `wordnet-base`.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from embed import EmbeddingsOnDemand
from overlap import STOP
from questions import Group, Row
from sentence import Scene, keys_with_questions, read_articles, scene_of
from texts import Embeddings
from wordnet import synonyms

DISGUISED = 0.75
"""Share of the answers whose words are replaced."""
SHORTEST = 25
"""Characters; an answer of which less is left keeps its words."""
PRONOUNS = "it", "this", "the former"
ASKED = (
    "{question} is not known.",
    "Many people have asked {question}.",
    "The next chapter explains {question}.",
    "{question} was discussed for hours.",
    "The teacher asked {question}, and nobody knew.",
    "{question} is a question for another day.",
)
ABOUT = (
    "{subject} is popular with visitors.",
    "{subject} was mentioned in a newspaper in {year}.",
    "There are {count} pictures of {subject} in the archive.",
    "{title} once gave a talk about {subject}.",
    "Much has been said about {subject}, and little of it is true.",
    "{subject} is the subject of a song.",
    "A book about {subject} costs {count} dollars.",
    "The page on {subject} was last changed in {year}.",
    "People from {title} often ask about {subject}.",
    "{subject} and {other} are often mentioned together.",
    "More than {count} letters about {subject} and {other} arrived.",
    "{subject} is not the same as {title}.",
    "For {subject}, {other} is said to be important.",
    "Without {other}, {subject} would be less known.",
)
COUNTS = 3, 12, 40, 75, 120, 300, 2000
FORMS = r"who|whom|whose|what|when|where|why|which|how(?: many| much| long| far| old| often| large)?"
QUESTION_WORD = re.compile(rf"^({FORMS})\b", re.I)
NO_SUBJECTS = STOP | {"name", "called", "kind", "type"}


def disguised(question: str, sentence: str, draw: random.Random) -> str:
    """Replace the words that a sentence shares with a question: the first name by a pronoun, others by synonyms.

    Further names, and words without a synonym, are left out. Numbers stay.
    """
    words = re.findall(r"[a-z0-9]+", question.lower())
    shared = {word[:5] for word in words if word not in STOP and len(word) > 1}
    tokens = re.findall(r"\w+(?:['’]\w+)?|\s+|[^\w\s]", sentence)
    kept: list[str] = []
    at, has_name = 0, False
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token.lower() in STOP or token[:5].lower() not in shared or token.isdigit():
            kept.append(token)
        elif token[0].isupper():
            while len(kept) > 1 and kept[-1].isspace() and _is_name(kept[-2]):
                del kept[-2:]
            while at + 1 < len(tokens) and tokens[at].isspace() and tokens[at + 1][0].isupper():
                at += 2
            if len(kept) > 1 and kept[-1].isspace() and kept[-2].lower() in ("the", "a", "an"):
                del kept[-2:]
            if not has_name:
                kept.append(draw.choice(PRONOUNS))
            has_name = True
        elif (found := synonyms(token.lower())) and draw.random() < 0.85:
            kept.append(draw.choice(found[:4]))
    text = re.sub(r"\s+([,.;:!?)])", r"\1", re.sub(r"\s+", " ", "".join(kept))).strip(" ,;")
    text = re.sub(r"\(\s*\)", "", text)
    return text[:1].upper() + text[1:]


def _is_name(token: str) -> bool:
    return token[0].isupper() and token.lower() not in STOP


def subjects(question: str) -> list[str]:
    """Return the runs of words of a question without stop words, the longest first."""
    runs: list[list[str]] = [[]]
    for word in re.findall(r"[\w'’-]+", QUESTION_WORD.sub("", question.strip())):
        if word.lower() in NO_SUBJECTS:
            runs.append([])
        else:
            runs[-1].append(word)
    return sorted(dict.fromkeys(" ".join(run) for run in runs if run), key=len, reverse=True)


def echoes(question: str, titles: list[str], draw: random.Random) -> list[str]:
    """Return two or three sentences with a question's words that say nothing of what it asks.

    Args:
        question: the question.
        titles: of other articles, which some sentences name.
        draw: random numbers.

    """
    asked = question.strip().rstrip("?. ")
    asked = asked[0].lower() + asked[1:] if QUESTION_WORD.match(asked) else asked
    found, known = [], subjects(question)
    for _ in range(3 if draw.random() < 0.5 else 2):
        if draw.random() < 0.3 or not known:
            text = draw.choice(ASKED).format(question=asked)
        else:
            subject = known[0] if draw.random() < 0.6 else draw.choice(known)
            other = draw.choice([run for run in known if run != subject] or [subject])
            article = draw.choice(("", "the ")) if subject[0].islower() else ""
            text = draw.choice(ABOUT).format(
                subject=article + subject,
                other=other,
                count=draw.choice(COUNTS),
                year=draw.randint(1850, 2020),
                title=draw.choice(titles),
            )
        found.append(text[0].upper() + text[1:])
    return found


def disguised_group(scene: Scene, titles: list[str], draw: random.Random) -> Group | None:
    """Build the group of a scene; None if an answer is lost."""
    numbers = list(scene.answer)
    passages: dict[str, dict[int, float | None]] = {}

    def add(text: str, grade: Callable[[int], float | None]) -> None:
        if text not in passages:
            passages[text] = {number: grade(number) for number in numbers}

    for number in numbers:
        question, own = scene.questions[number], scene.answer[number]
        text = scene.every[own]
        if draw.random() < DISGUISED and len(changed := disguised(question, text, draw)) >= SHORTEST:
            text = changed
        add(text, lambda asked, own=own: 1.0 if scene.answer[asked] == own else scene.grade(asked, {own}))  # type: ignore[misc]
        for echo in echoes(question, titles, draw):
            add(echo, lambda _: 0.0)
    shown = draw.sample(list(passages), len(passages))
    grades: list[Row] = [[passages[text][number] for text in shown] for number in numbers]
    if any(1.0 not in row for row in grades):
        return None
    return Group([scene.questions[number] for number in numbers], shown, grades)


def disguised_groups(data: Path, embeddings: Embeddings, count: int, seed: int) -> list[Group]:
    """Build some groups of passages in random order."""
    articles, draw = read_articles(data), random.Random(f"disguised {seed}")
    keys = keys_with_questions(articles)
    draw.shuffle(keys)
    groups: list[Group] = []
    for key in keys:
        scene = scene_of(key, articles, embeddings, draw)
        if scene is not None and (group := disguised_group(scene, articles.short_titles, draw)) is not None:
            groups.append(group)
        if len(groups) == count:
            break
    return groups


def main() -> None:
    """Write the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the training sets, in BEIR's layout")
    parser.add_argument("teachers", type=Path, help="folder that teachers.py has written")
    parser.add_argument("out", type=Path)
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    embeddings = EmbeddingsOnDemand(options.teachers)
    groups = disguised_groups(options.data, embeddings, options.groups, options.seed)
    options.out.write_text("".join(json.dumps(asdict(group)) + "\n" for group in groups), "utf-8")


if __name__ == "__main__":
    main()
