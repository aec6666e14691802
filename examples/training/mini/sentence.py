"""Groups whose passages are sentences: words that mislead, and answers that share few words with the question.

A sentence of the judged passage is the answer if both teachers rank it first by a margin. Sentences that come close
have an unknown grade.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import bm25s
import numpy as np
from bm25 import best_rows, index_of
from overlap import may_answer, shared_words
from questions import Group, Row, both, joined, rewritten
from texts import (
    IN_SENTENCES,
    Embeddings,
    Vectors,
    cosines,
    cut,
    dataset,
    is_held_out,
    sentences,
    standardized_sum,
    titled,
)

LEAST_LEAD = 0.35
"""Of the answer's score over the next sentence's, in standard deviations of both teachers' sum."""
LEAST_GAP = 0.6
"""A sentence so far behind the answer is irrelevant."""


@dataclass(frozen=True, slots=True)
class Articles:
    """The passages of `IN_SENTENCES` that are not held out.

    Attributes:
        passages: title and text by key.
        questions: the questions of each passage, by its key.
        of_title: the keys of each article's passages.
        everywhere: sentences of all passages, with their titles.
        index: BM25 of these sentences.
        short_titles: titles that can replace another in a sentence.

    """

    passages: dict[str, tuple[str, str]]
    questions: dict[str, list[str]]
    of_title: dict[str, list[str]]
    everywhere: list[tuple[str, str]]
    index: bm25s.BM25
    short_titles: list[str]

    def misleading(self, question: str, title: str, count: int) -> list[tuple[str, str]]:
        """Return the best sentences of other articles by BM25, with their titles."""
        rows = best_rows(self.index, [question], 40)[0]
        return [self.everywhere[row] for row in rows if self.everywhere[row][1] != title][:count]


@dataclass(frozen=True, slots=True)
class Scene:
    """A passage's questions with the sentences that answer them.

    Attributes:
        title: of the article.
        text: of the passage.
        own: all sentences of the passage.
        siblings: keys of other passages of the article.
        questions: of the passage; the dicts below have their numbers as keys.
        every: sentences of the passage that are long enough, then sentences of a sibling.
        count: how many of `every` belong to the passage.
        answer: which of `every` answers each question.
        cosines: both teachers' similarities, (2, questions, sentences).
        sums: their standardized sum.

    """

    title: str
    text: str
    own: list[str]
    siblings: list[str]
    questions: list[str]
    every: list[str]
    count: int
    answer: dict[int, int]
    cosines: Vectors
    sums: Vectors

    def grade(self, number: int, members: set[int]) -> float | None:
        """Grade a passage of some of the sentences for a question."""
        if self.answer[number] in members:
            return 1.0
        gap = min(self.sums[number, self.answer[number]] - self.sums[number, member] for member in members)
        return 0.0 if gap > LEAST_GAP else None


class Passages:
    """The passages of a group, with the grades of each question."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self.texts: list[str] = []
        self.grades: dict[int, Row] = {number: [] for number in numbers}

    def add(self, text: str, grade: Callable[[int], float | None]) -> None:
        """Add a passage; `grade` is called with the number of each question."""
        self.texts.append(text)
        for number, row in self.grades.items():
            row.append(grade(number))


@cache
def read_articles(data: Path) -> Articles:
    """Read and index the passages of `IN_SENTENCES`."""
    passages: dict[str, tuple[str, str]] = {}
    questions: dict[str, list[str]] = {}
    for name in IN_SENTENCES:
        texts = dataset(data, name)
        passages |= {
            f"{name} {key}": record for key, record in titled(data, name).items() if not is_held_out(record[0])
        }
        for key, text in texts.queries.items():
            if not is_held_out(texts.positives(key)[0]):
                for passage in texts.positives(key):
                    questions.setdefault(f"{name} {passage}", []).append(text)
    of_title: dict[str, list[str]] = {}
    for key, (title, _) in passages.items():
        of_title.setdefault(title, []).append(key)
    everywhere = [(s, title) for title, text in passages.values() for s in sentences(text) if 40 < len(s) < 320]
    index = index_of([sentence for sentence, _ in everywhere])
    short = [title for title in of_title if 3 < len(title) < 30 and not re.search(r"[(_,:]", title)]
    return Articles(passages, questions, of_title, everywhere, index, short)


def keys_with_questions(articles: Articles) -> list[str]:
    """List the passages of four to twelve sentences that have at least three questions."""
    asked = [key for key in articles.passages if len(articles.questions.get(key, [])) >= 3]
    return [key for key in asked if 4 <= len(sentences(articles.passages[key][1])) <= 12]


def sentence_groups(data: Path, embeddings: Embeddings, part: int, parts: int, seed: int, share: float) -> list[Group]:
    """Build the groups of one part of the passages that have at least three questions.

    Args:
        data: the folder of the training sets.
        embeddings: of the texts.
        part: which of the parts.
        parts: how many there are.
        seed: of the drawing.
        share: of the passages that all parts take together.

    """
    articles = read_articles(data)
    keys = keys_with_questions(articles)
    random.Random(f"sentences {seed}").shuffle(keys)
    draw = random.Random(f"sentences {seed} {part}")
    groups: list[Group] = []
    for key in keys[: round(share * len(keys))][part::parts]:
        if (scene := scene_of(key, articles, embeddings, draw)) is not None:
            groups += _groups(scene, articles, embeddings, draw)
    return groups


def scene_of(key: str, articles: Articles, embeddings: Embeddings, draw: random.Random) -> Scene | None:
    """Find the sentences that answer a passage's questions; None if fewer than two questions have one."""
    title, text = articles.passages[key]
    own = sentences(text)
    questions = [question for question in dict.fromkeys(articles.questions[key]) if 15 < len(question) < 160]
    siblings = [other for other in articles.of_title[title] if other != key and articles.questions.get(other)]
    further: list[str] = []
    if siblings:
        further = [s for s in sentences(articles.passages[draw.choice(siblings)][1]) if 40 < len(s) < 320]
    draw.shuffle(further)
    candidates = [sentence for sentence in own if 30 < len(sentence) < 360]
    if len(candidates) < 3 or len(questions) < 2:
        return None
    every, count = candidates + further[:4], len(candidates)
    near = cosines(embeddings, questions, [f"{title}: {sentence}" for sentence in every])
    sums = standardized_sum(near)
    by_overlap: list[tuple[float, int, int]] = []
    for number, question in enumerate(questions):
        best = int(sums[number].argmax())
        if best >= count or not may_answer(question, candidates[best]):
            continue
        if (near[:, number, :count].argmax(-1) != best).any():
            continue
        if sums[number, best] - np.delete(sums[number], best).max() < LEAST_LEAD:
            continue
        shared = [shared_words(question, sentence) for sentence in every]
        lead = shared[best] - max(share for row, share in enumerate(shared) if row != best)
        by_overlap.append((lead + draw.random() / 3, number, best))
    if len(by_overlap) < 2:
        return None
    answer = {number: best for _, number, best in sorted(by_overlap)[:4]}  # whose words mislead most
    return Scene(title, text, own, siblings, questions, every, count, answer, near, sums)


def _groups(scene: Scene, articles: Articles, embeddings: Embeddings, draw: random.Random) -> list[Group]:
    """Build one or two groups of a scene: of sentences, and of passages that lack the answering sentence."""
    numbers, passages = list(scene.answer), Passages(scene.answer)
    with_title, in_windows = draw.random() < 0.55, draw.random() < 0.4
    _add_sentences(scene, passages, draw, with_title=with_title, in_windows=in_windows)
    for number in draw.sample(numbers, min(2, len(numbers))):
        if others := articles.misleading(scene.questions[number], scene.title, 3):
            _add_misleading(scene, passages, embeddings, *draw.choice(others), with_title=with_title)
    _add_replaced_title(scene, passages, articles, draw, with_title=with_title)
    if draw.random() < 0.35:
        passages.add(scene.questions[draw.choice(numbers)], lambda _: 0.0)  # a question is no answer
    order = list(range(len(passages.texts)))
    draw.shuffle(order)
    queries = [rewritten("squad_du", scene.questions[number], draw) for number in numbers]
    grades = [[passages.grades[number][row] for row in order] for number in numbers]
    one, two = draw.sample(numbers, 2)
    if scene.answer[one] != scene.answer[two] and draw.random() < 0.5:
        queries.append(joined(scene.questions[one], scene.questions[two], draw))
        grades.append([both(passages.grades[one], passages.grades[two])[row] for row in order])
    groups = [Group(queries, [passages.texts[row] for row in order], grades)]
    removed = sorted(set(scene.answer.values()))[:4]
    if len(removed) >= 3 and len(scene.text) < 1100 and scene.siblings:
        groups.append(_without_answers(scene, removed, articles, draw))
    return groups


def _add_sentences(
    scene: Scene, passages: Passages, draw: random.Random, *, with_title: bool, in_windows: bool
) -> None:
    """Add the answers and up to nine other sentences, alone or with their neighbours."""
    answers, title = set(scene.answer.values()), scene.title
    others = draw.sample(range(len(scene.every)), min(len(scene.every), 9))
    for member in sorted(answers | set(others)):
        window = {member}
        if in_windows and member + 1 < scene.count:
            window.add(member + 1)
        if in_windows and draw.random() < 0.4 and 0 < member < scene.count:
            window.add(member - 1)
        passage = " ".join(scene.every[row] for row in sorted(window))
        if title in passage and member in answers and draw.random() < 0.45:
            passage = re.sub(rf"\b(?:The |the )?{re.escape(title)}(?=\W|$)", "It", passage, count=1)
        shown = f"{title} {passage}" if with_title and draw.random() < 0.85 else passage
        passages.add(shown, lambda number, window=window: scene.grade(number, window))  # type: ignore[misc]


def _add_misleading(
    scene: Scene, passages: Passages, embeddings: Embeddings, sentence: str, title: str, *, with_title: bool
) -> None:
    """Add a sentence of another article with a question's words; unknown where it is as near as the answer."""
    numbers = list(passages.grades)
    near = cosines(embeddings, [scene.questions[number] for number in numbers], [sentence])[:, :, 0]

    def grade(number: int) -> float | None:
        is_farther = near[:, numbers.index(number)] < scene.cosines[:, number, scene.answer[number]]
        return 0.0 if is_farther.all() else None

    passages.add(f"{title} {sentence}" if with_title else sentence, grade)


def _add_replaced_title(
    scene: Scene, passages: Passages, articles: Articles, draw: random.Random, *, with_title: bool
) -> None:
    """Add an answer as a sentence about something else: another article's title replaces its own."""
    number, title = draw.choice(list(passages.grades)), scene.title
    sentence = scene.every[scene.answer[number]]
    if title not in sentence or title not in scene.questions[number] or draw.random() >= 0.8:
        return
    other = draw.choice([name for name in articles.short_titles if name != title and name[:1].isupper()])

    def grade(asked: int) -> float | None:
        is_irrelevant = scene.answer[asked] != scene.answer[number] or title in scene.questions[asked]
        return 0.0 if is_irrelevant else None

    passages.add((f"{other} " if with_title else "") + sentence.replace(title, other), grade)


def _without_answers(scene: Scene, removed: list[int], articles: Articles, draw: random.Random) -> Group:
    """Build a group of the whole passage without one of the answering sentences, and other passages."""
    passages = [" ".join(s for s in scene.own if s != scene.every[member]) for member in removed]
    passages.append(cut(articles.passages[draw.choice(scene.siblings)][1], 900))
    first = scene.questions[next(iter(scene.answer))]
    passages += [sentence for sentence, _ in articles.misleading(first, scene.title, 2)]
    numbers = [number for number, member in scene.answer.items() if member in removed]
    irrelevant = [0.0] * (len(passages) - len(removed) - 1)
    grades: list[Row] = [
        [*(0.0 if member == scene.answer[number] else 1.0 for member in removed), None if row % 2 else 0.0, *irrelevant]
        for row, number in enumerate(numbers)
    ]
    named = draw.random() < 0.6
    shown = [f"{scene.title} {passage}" if named else passage for passage in passages]
    return Group([scene.questions[number] for number in numbers], shown, grades)
