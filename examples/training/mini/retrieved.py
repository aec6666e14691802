"""Groups of four questions of a set, each with its answer and passages that BM25 or a teacher retrieves."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bm25 import best_rows, index_of
from questions import Group, Row, both, joined, rewritten
from texts import Embeddings, StoredEmbeddings, Vectors, cosines, cut, dataset, is_held_out, standardized_sum

PART = 2500
"""Questions of one task."""
QUESTIONS = 4
"""Questions of a group."""
DEPTH = 50
"""How many passages BM25 retrieves."""
LARGEST = 20
"""The most passages of a group."""
TEACHER_SCALE = 1.3
"""From standardized similarities to logits."""
RANDOM_NEGATIVES = ("tatqa_text",)
"""Sets whose retrieved passages often answer the question too, since it leaves the company out."""
DOUBLES = "squad_du", "squadshifts_wiki", "selqa", "bioasq_6_8", "covidqa_deepset"
"""Sets whose questions are also joined."""
COMPLETE = "squad_du", "squadshifts_wiki", "selqa", "tatqa_text"
"""Sets where few unjudged passages are relevant."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some questions of a set, its passages, and the passages that are near to each question.

    Attributes:
        name: of the set.
        questions: the texts.
        answers: the rows of the relevant passages of each question.
        retrieved: the rows of BM25's best passages of each question.
        nearest: the rows of the best passages of each question by each teacher; none with embeddings on demand.
        passages: the texts.
        embeddings: of these texts.

    """

    name: str
    questions: list[str]
    answers: list[set[int]]
    retrieved: list[list[int]]
    nearest: list[tuple[list[int], list[int]]]
    passages: list[str]
    embeddings: Embeddings


def nearest_rows(of_questions: Vectors, of_passages: Vectors) -> list[tuple[list[int], list[int]]]:
    """Return the rows of the best twelve passages of each question by each teacher, best first."""
    rows: list[tuple[list[int], list[int]]] = []
    for start in range(0, of_questions.shape[1], 256):
        cosines = of_questions[:, start : start + 256] @ of_passages.transpose(0, 2, 1)
        few = min(12, cosines.shape[-1] - 1)
        best = np.argpartition(-cosines, few, axis=-1)[..., :few]
        order = np.argsort(-np.take_along_axis(cosines, best, -1), axis=-1)
        best = np.take_along_axis(best, order, -1)
        rows += zip(best[0].tolist(), best[1].tolist(), strict=True)
    return rows


def retrieved_groups(data: Path, embeddings: Embeddings, name: str, part: int, seed: int, most: int) -> list[Group]:
    """Build the groups of one part of a set's questions, those of held-out passages left out.

    Args:
        data: the folder of the training sets.
        embeddings: of the texts.
        name: of the set.
        part: which `PART` questions.
        seed: of the drawing; the order of the questions depends on it too.
        most: questions that all parts take together.

    """
    draw = random.Random(f"{name} {seed}")
    texts = dataset(data, name)
    position = {key: row for row, key in enumerate(texts.corpus)}
    passages = [cut(text) for text in texts.corpus.values()]
    chosen = [key for key in texts.queries if not is_held_out(texts.positives(key)[0])]
    draw.shuffle(chosen)
    chosen = chosen[:most][PART * part : PART * (part + 1)]
    if not chosen:
        return []
    questions = [texts.queries[key] for key in chosen]
    nearest: list[tuple[list[int], list[int]]] = [([], [])] * len(questions)
    if isinstance(embeddings, StoredEmbeddings):
        nearest = nearest_rows(embeddings.of("questions", questions), embeddings.of("passages", passages))
    whole = Part(
        name,
        questions,
        [{position[passage] for passage in texts.positives(key)} for key in chosen],
        best_rows(index_of(passages), questions, min(DEPTH, len(passages))).tolist(),
        nearest,
        passages,
        embeddings,
    )
    return [_group(whole, members, draw) for members in _neighbours(whole, draw)]


def _neighbours(part: Part, draw: random.Random) -> list[list[int]]:
    """Divide the questions into groups, where possible of questions that are answered by similar passages."""
    asked: dict[int, list[int]] = {}
    for number, relevant in enumerate(part.answers):
        for passage in relevant:
            asked.setdefault(passage, []).append(number)
    unused, groups = dict.fromkeys(range(len(part.questions))), []
    while len(unused) >= 2:
        first = next(iter(unused))
        around = [*part.retrieved[first][:15], *part.nearest[first][0]]
        near = [number for row in around for number in asked.get(row, ()) if number in unused and number != first]
        near = list(dict.fromkeys(near))
        members = [first, *draw.sample(near, min(len(near), QUESTIONS - 1))]
        others = [number for number in unused if number not in members][:50] if len(members) < QUESTIONS else []
        members += draw.sample(others, min(len(others), QUESTIONS - len(members)))
        for number in members:
            del unused[number]
        groups.append(members)
    return groups


def _rows(part: Part, members: list[int], draw: random.Random) -> list[int]:
    """Draw the passages of a group: one or two answers of each question, then negatives of several ranks."""
    taken: dict[int, None] = {}
    for number in members:
        relevant = list(part.answers[number])
        taken |= dict.fromkeys(draw.sample(relevant, min(len(relevant), 1 + (draw.random() < 0.4))))
    negatives: list[int] = []
    for number in members:
        if part.name in RANDOM_NEGATIVES:
            negatives += draw.sample(range(len(part.passages)), min(len(part.passages), 4))
            continue
        by_bm25, by_teachers = part.retrieved[number], part.nearest[number]
        pools = [by_bm25[:6], by_bm25[:30], by_teachers[0][:8], by_teachers[1][:8]]
        if not by_teachers[0]:
            pools = [by_bm25[:5], by_bm25[:10], by_bm25[:25], by_bm25[10:]]
        for pool in pools:
            left = [p for p in pool if p not in part.answers[number] and p not in negatives and p not in taken]
            negatives += draw.sample(left, min(len(left), 1))
    draw.shuffle(negatives)
    taken |= dict.fromkeys(negatives[: LARGEST - len(taken)])
    rows = list(taken)
    draw.shuffle(rows)
    return rows


def _group(part: Part, members: list[int], draw: random.Random) -> Group:
    """Build the group of some questions. Passages that teachers rank like the answer have an unknown grade."""
    rows = _rows(part, members, draw)
    margin = 0.0 if part.name in COMPLETE else 0.15
    grades: list[Row] = []
    teacher: list[list[float]] = []
    near = cosines(
        part.embeddings, [part.questions[number] for number in members], [part.passages[row] for row in rows]
    )
    for number, scores in zip(members, standardized_sum(near).tolist(), strict=True):
        relevant = [row in part.answers[number] for row in rows]
        graded = list(zip(relevant, scores, strict=True))
        lowest, best = min(score for is_answer, score in graded if is_answer), max(scores)
        grades.append([1.0 if is_answer else None if score >= lowest - margin else 0.0 for is_answer, score in graded])
        teacher.append([round(TEACHER_SCALE * (best if is_answer else score), 3) for is_answer, score in graded])
    queries = [rewritten(part.name, part.questions[number], draw) for number in members]
    if part.name in DOUBLES and len(members) > 1 and draw.random() < 0.35:
        one, two = draw.sample(range(len(members)), 2)
        if not part.answers[members[one]] & part.answers[members[two]]:
            queries.append(joined(part.questions[members[one]], part.questions[members[two]], draw))
            grades.append(both(grades[one], grades[two]))
            teacher.append([max(pair) for pair in zip(teacher[one], teacher[two], strict=True)])
    return Group(queries, [part.passages[row] for row in rows], grades, teacher)
