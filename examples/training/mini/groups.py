"""Build training groups from embedded training sets: questions, passages, grades, and the teachers' logits.

python groups.py DATA EMBEDDINGS OUT PASSES [SHARE]

Each pass draws other negatives, other sentences and other rewritings of the questions. SHARE of the questions are used.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
from texts import (
    IN_SENTENCES,
    SETS,
    Embeddings,
    cut,
    dataset,
    is_held_out,
    sentences,
    standardized_sum,
    titled,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import messy_questions
from messy_questions import NOT_NAMES

from mistral_rerank.evaluation.datasets import load_beir

PART = 2500
"""Questions of one task."""
QUESTIONS = 4
LARGEST = 20
"""The most passages of a group."""
TEACHER_SCALE = 1.3
RANDOM_NEGATIVES = ("tatqa_text",)
"""Sets whose retrieved passages often answer the question too, since it leaves the company out."""
DOUBLES = ("squad_du", "squadshifts_wiki", "selqa", "bioasq_6_8", "covidqa_deepset")
CONTRAST = Path(__file__).parent.parent.parent / "contrast"

Row = list[float | None]


def rewritten(name: str, question: str, draw: random.Random) -> str:
    """Rewrite some questions as users type them."""
    if name == "medquad":
        return messy_questions.as_a_patient(question, draw)
    if name != "fever_eraser" and draw.random() < 0.3:
        return messy_questions.in_a_hurry(question, draw)
    return question


def joined(first: str, second: str, draw: random.Random) -> str:
    """Join two questions into one."""
    first, second = (text.strip().rstrip("?. ") for text in (first, second))
    if second.split()[0].lower() in NOT_NAMES:
        second = second[0].lower() + second[1:]
    return draw.choice((f"{first}, and {second}?", f"{first}? {second}?", f"{first} and {second}?"))


def both(first: Row, second: Row) -> Row:
    """Grade for a joined question: what answers one half is relevant; what may answer one is unknown."""
    return [1.0 if 1.0 in pair else None if None in pair else 0.0 for pair in zip(first, second, strict=True)]


def index_of(texts: list[str]) -> bm25s.BM25:
    """Index texts for BM25."""
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    return index


def retrieved(index: bm25s.BM25, questions: list[str], k: int) -> np.ndarray:
    """Return the best passages of each question: (questions, k)."""
    tokens = bm25s.tokenize(questions, stopwords="en", show_progress=False)
    return index.retrieve(tokens, k=k, show_progress=False, n_threads=1)[0]


def retrieved_groups(data: Path, embeddings: Embeddings, name: str, part: int, seed: int, share: float) -> list[dict[str, Any]]:
    """Build groups of four questions of a set, each with its answer and passages that BM25 or a teacher finds."""
    draw = random.Random(f"{name} {seed}")
    texts = dataset(data, name)
    ids = list(texts.corpus)
    position = {key: row for row, key in enumerate(ids)}
    passages = [cut(text) for text in texts.corpus.values()]
    chosen = [key for key in texts.queries if not is_held_out(texts.positives(key)[0])]
    draw.shuffle(chosen)
    chosen = chosen[: round(share * min(len(chosen), SETS[name]))][PART * part : PART * (part + 1)]
    if not chosen:
        return []
    questions = [texts.queries[key] for key in chosen]
    answers = [{position[passage] for passage in texts.positives(key)} for key in chosen]
    found = [list(row) for row in retrieved(index_of(passages), questions, min(30, len(ids)))]
    of_passages = embeddings.of("passages", passages)
    nearest: list[list[list[int]]] = []
    for start in range(0, len(questions), 256):
        cosines = embeddings.of("questions", questions[start : start + 256]) @ of_passages.transpose(0, 2, 1)
        few = min(12, cosines.shape[-1] - 1)
        best = np.argpartition(-cosines, few, axis=-1)[..., :few]
        order = np.argsort(-np.take_along_axis(cosines, best, -1), axis=-1)
        best = np.take_along_axis(best, order, -1)
        nearest += [[list(best[0, row]), list(best[1, row])] for row in range(best.shape[1])]
    asked: dict[int, list[int]] = {}
    for number, relevant in enumerate(answers):
        for passage in relevant:
            asked.setdefault(passage, []).append(number)
    unused, groups = dict.fromkeys(range(len(chosen))), []
    while len(unused) >= 2:
        first = next(iter(unused))
        near = [n for p in [*found[first][:15], *nearest[first][0]] for n in asked.get(p, ()) if n in unused and n != first]
        near = list(dict.fromkeys(near))
        members = [first, *draw.sample(near, min(len(near), QUESTIONS - 1))]
        others = [number for number in unused if number not in members][:50] if len(members) < QUESTIONS else []
        members += draw.sample(others, min(len(others), QUESTIONS - len(members)))
        for number in members:
            del unused[number]
        groups.append(_retrieved_group(name, members, questions, answers, found, nearest, passages, of_passages, embeddings, draw))
    return groups


def _retrieved_group(name, members, questions, answers, found, nearest, passages, of_passages, embeddings, draw) -> dict[str, Any]:
    taken: dict[int, None] = {}
    for number in members:
        relevant = list(answers[number])
        taken |= dict.fromkeys(draw.sample(relevant, min(len(relevant), 1 + (draw.random() < 0.4))))
    negatives: list[int] = []
    for number in members:
        if name in RANDOM_NEGATIVES:
            negatives += draw.sample(range(len(passages)), min(len(passages), 4))
            continue
        pools = found[number][:6], found[number][:30], nearest[number][0][:8], nearest[number][1][:8]
        for pool in pools:
            left = [p for p in pool if p not in answers[number] and p not in negatives and p not in taken]
            negatives += draw.sample(left, min(len(left), 1))
    draw.shuffle(negatives)
    taken |= dict.fromkeys(negatives[: LARGEST - len(taken)])
    rows = list(taken)
    draw.shuffle(rows)
    cosines = embeddings.of("questions", [questions[number] for number in members]) @ of_passages[:, rows].transpose(0, 2, 1)
    sums = standardized_sum(cosines)
    margin = 0.0 if name in ("squad_du", "squadshifts_wiki", "selqa", "tatqa_text") else 0.15
    grades: list[Row] = []
    teacher: list[list[float]] = []
    for number, scores in zip(members, sums, strict=True):
        own = [row in answers[number] for row in rows]
        lowest = min(score for score, is_answer in zip(scores, own, strict=True) if is_answer)
        grades.append(
            [1.0 if is_answer else None if score >= lowest - margin else 0.0 for score, is_answer in zip(scores, own, strict=True)]
        )
        best = float(scores.max())
        teacher.append(
            [round(TEACHER_SCALE * (best if is_answer else float(score)), 3) for score, is_answer in zip(scores, own, strict=True)]
        )
    asked = [rewritten(name, questions[number], draw) for number in members]
    if name in DOUBLES and len(members) > 1 and draw.random() < 0.35:
        one, two = draw.sample(range(len(members)), 2)
        if not answers[members[one]] & answers[members[two]]:
            asked.append(joined(questions[members[one]], questions[members[two]], draw))
            grades.append(both(grades[one], grades[two]))
            teacher.append([max(pair) for pair in zip(teacher[one], teacher[two], strict=True)])
    return {"queries": asked, "passages": [passages[row] for row in rows], "grades": grades, "teacher": teacher}


STOP = set(
    "a an the of in on at to for by with from as is are was were be been being do does did has have had what which who "
    "whom whose when where why how many much it its this that these those and or not can could would should will may "
    "might there their they he she his her him i you your my we our one s t than then also into about after before over "
    "under between during".split()
)
TIME = re.compile(
    r"\d|century|January|February|March|April|May|June|July|August|September|October|November|December|during|after|before"
)
NUMBER = re.compile(
    r"\d|\b(one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|million|billion|half|third|quarter)\b", re.I
)
ASKS = re.compile(
    r"^\W*(who|when|where|how many|how much|what year|which year|in what year|in which year)\b", re.I
)


def shared_words(question: str, text: str) -> float:
    """Return the share of a question's words that a text has."""
    stems = [
        {word[:5] for word in re.findall(r"[a-z0-9]+", part.lower()) if word not in STOP and len(word) > 1}
        for part in (question, text)
    ]
    return len(stems[0] & stems[1]) / max(1, len(stems[0]))


def may_answer(question: str, sentence: str) -> bool:
    """Say whether a sentence holds the kind of answer that a question asks for."""
    match = ASKS.match(question)
    if not match:
        return True
    word = match[1].lower()
    if "year" in word or word == "when":
        return bool(TIME.search(sentence))
    return bool(NUMBER.search(sentence) if word.startswith("how") else re.search(r"\s[A-Z]", sentence))


@cache
def articles(data: Path) -> tuple[dict[str, tuple[str, str]], dict[str, list[str]], dict[str, list[str]]]:
    """Return the passages with titles, the questions of each, and the passages of each article."""
    docs: dict[str, tuple[str, str]] = {}
    questions: dict[str, list[str]] = {}
    for name in IN_SENTENCES:
        texts = dataset(data, name)
        docs |= {f"{name} {key}": record for key, record in titled(data, name).items() if not is_held_out(record[0])}
        for key, text in texts.queries.items():
            if not is_held_out(texts.positives(key)[0]):
                for passage in texts.positives(key):
                    questions.setdefault(f"{name} {passage}", []).append(text)
    of_article: dict[str, list[str]] = {}
    for key, (title, _) in docs.items():
        of_article.setdefault(title, []).append(key)
    return docs, questions, of_article


def sentence_groups(data: Path, embeddings: Embeddings, part: int, parts: int, seed: int, share: float) -> list[dict[str, Any]]:
    """Build groups whose passages are sentences: words that mislead, and answers that share few words."""
    draw = random.Random(f"sentences {seed}")
    docs, questions, of_article = articles(data)
    everywhere = [(s, title) for title, text in docs.values() for s in sentences(text) if 40 < len(s) < 320]
    index = index_of([sentence for sentence, _ in everywhere])
    titles = [title for title in of_article if 3 < len(title) < 30 and not re.search(r"[(_,:]", title)]
    passages = [key for key in docs if len(questions.get(key, [])) >= 3 and 4 <= len(sentences(docs[key][1])) <= 12]
    draw.shuffle(passages)
    passages = passages[: round(share * len(passages))][part::parts]
    draw = random.Random(f"sentences {seed} {part}")
    groups: list[dict[str, Any]] = []
    for key in passages:
        groups += _sentence_groups(key, docs, questions, of_article, everywhere, index, titles, embeddings, draw)
    return groups


def _sentence_groups(key, docs, questions, of_article, everywhere, index, titles, embeddings, draw) -> list[dict[str, Any]]:
    title, text = docs[key]
    own = sentences(text)
    asked = [question for question in dict.fromkeys(questions[key]) if 15 < len(question) < 160]
    siblings = [other for other in of_article[title] if other != key and questions.get(other)]
    further: list[str] = []
    if siblings:
        further = [s for s in sentences(docs[draw.choice(siblings)][1]) if 40 < len(s) < 320]
    draw.shuffle(further)
    further = further[:4]
    candidates = [sentence for sentence in own if 30 < len(sentence) < 360]
    if len(candidates) < 3 or len(asked) < 2:
        return []
    every = candidates + further
    cosines = embeddings.cosines(asked, [f"{title}: {sentence}" for sentence in every])
    sums, count = standardized_sum(cosines), len(candidates)
    usable = []
    for number, question in enumerate(asked):
        best = int(sums[number].argmax())
        if best >= count or not may_answer(question, candidates[best]):
            continue
        if cosines[0, number, :count].argmax() != best or cosines[1, number, :count].argmax() != best:
            continue
        if sums[number, best] - np.delete(sums[number], best).max() < 0.35:
            continue
        shared = [shared_words(question, sentence) for sentence in every]
        usable.append((shared[best] - max(v for j, v in enumerate(shared) if j != best) + draw.random() / 3, number, best))
    if len(usable) < 2:
        return []
    usable = sorted(usable)[:4]
    answer = {number: best for _, number, best in usable}
    rows: dict[int, Row] = {number: [] for number in answer}
    texts: list[str] = []

    def add(passage: str, grade) -> None:
        texts.append(passage)
        for number in rows:
            rows[number].append(grade(number))

    def known(members: set[int]):
        def grade(number: int) -> float | None:
            if answer[number] in members:
                return 1.0
            gap = min(sums[number, answer[number]] - sums[number, member] for member in members)
            return 0.0 if gap > 0.6 else None

        return grade

    with_title, in_windows = draw.random() < 0.55, draw.random() < 0.4
    kept = sorted(set(answer.values()) | set(draw.sample(range(len(every)), min(len(every), 9))))
    for member in kept:
        window = {member}
        if in_windows and member + 1 < count and member < count:
            window.add(member + 1)
        if in_windows and draw.random() < 0.4 and 0 < member < count:
            window.add(member - 1)
        passage = " ".join(every[j] for j in sorted(window))
        if title in passage and member in answer.values() and draw.random() < 0.45:
            passage = re.sub(rf"\b(?:The |the )?{re.escape(title)}(?=\W|$)", "It", passage, count=1)
        add(f"{title} {passage}" if with_title and draw.random() < 0.85 else passage, known(window))
    for number in draw.sample(list(rows), min(2, len(rows))):  # sentences of other articles with the question's words
        others = [row for row in retrieved(index, [asked[number]], 40)[0] if everywhere[row][1] != title][:3]
        if others:
            sentence, other = everywhere[draw.choice(others)]
            near = embeddings.cosines([asked[n] for n in rows], [sentence])
            order = list(rows)
            add(
                f"{other} {sentence}" if with_title else sentence,
                lambda n, near=near, order=order: 0.0
                if (near[:, order.index(n), 0] < cosines[:, n, answer[n]]).all()
                else None,
            )
    number = draw.choice(list(rows))
    sentence = every[answer[number]]
    if title in sentence and title in asked[number] and draw.random() < 0.8:  # the same fact of something else
        other = draw.choice([name for name in titles if name != title and name[:1].isupper()])
        add(
            (f"{other} " if with_title else "") + sentence.replace(title, other),
            lambda n: 0.0 if answer[n] != answer[number] or title in asked[n] else None,
        )
    if draw.random() < 0.35:
        add(asked[draw.choice(list(rows))], lambda _: 0.0)  # a question is no answer
    order = list(range(len(texts)))
    draw.shuffle(order)
    queries = [rewritten("squad_du", asked[n], draw) for n in rows]
    grades = [[rows[n][j] for j in order] for n in rows]
    one, two = draw.sample(list(rows), 2)
    if answer[one] != answer[two] and draw.random() < 0.5:
        queries.append(joined(asked[one], asked[two], draw))
        grades.append([both(rows[one], rows[two])[j] for j in order])
    groups = [{"queries": queries, "passages": [texts[j] for j in order], "grades": grades, "teacher": None}]
    removed = sorted(set(answer.values()))[:4]
    if len(removed) >= 3 and len(text) < 1100 and siblings:  # passages without the sentence that answers
        lacking = [" ".join(s for s in own if s != candidates[j]) for j in removed]
        lacking.append(cut(docs[draw.choice(siblings)][1], 900))
        others = [row for row in retrieved(index, [asked[next(iter(rows))]], 40)[0] if everywhere[row][1] != title][:2]
        lacking += [everywhere[row][0] for row in others]
        numbers = [n for n in rows if answer[n] in removed]
        extra = len(lacking) - len(removed) - 1
        near_misses = [
            [*(0.0 if j == answer[n] else 1.0 for j in removed), None if row % 2 else 0.0, *[0.0] * extra]
            for row, n in enumerate(numbers)
        ]
        named = draw.random() < 0.6
        groups.append(
            {
                "queries": [asked[n] for n in numbers],
                "passages": [f"{title} {passage}" if named else passage for passage in lacking],
                "grades": near_misses,
                "teacher": None,
            }
        )
    return groups


def contrast_groups(seed: int, turn: int) -> list[dict[str, Any]]:
    """Build a group of each training scene of `examples/contrast`: its questions with two scenes' passages."""
    draw = random.Random(f"contrast {seed} {turn}")
    texts = load_beir(CONTRAST, split="train")
    scenes: dict[str, tuple[list[str], list[str]]] = {}
    for key in texts.queries:
        if texts.positives(key):
            scenes.setdefault(key.rsplit("-", 1)[0], ([], []))[0].append(key)
    for key in texts.corpus:
        if (scene := key.rsplit("-", 1)[0]) in scenes:
            scenes[scene][1].append(key)
    names = list(scenes)
    whole = [" ".join([texts.queries[q] for q in scenes[n][0]] + [texts.corpus[p] for p in scenes[n][1]]) for n in names]
    alike = retrieved(index_of(whole), whole, 6)
    groups = []
    for number, name in enumerate(names):
        other = names[draw.choice([row for row in alike[number] if row != number][:4])]
        passages = scenes[name][1] + scenes[other][1]
        draw.shuffle(passages)
        groups.append(
            {
                "queries": [texts.queries[q] for q in scenes[name][0]],
                "passages": [texts.corpus[p] for p in passages],
                "grades": [[float(p in texts.positives(q)) for p in passages] for q in scenes[name][0]],
                "teacher": None,
            }
        )
    return groups


_EMBEDDINGS: list[Embeddings] = []


def _run(task: tuple[Any, ...]) -> tuple[str, int, list[str]]:
    kind, data, folder, seed, share, *rest = task
    if not _EMBEDDINGS and kind != "contrast":
        _EMBEDDINGS.append(Embeddings(folder))
    if kind == "contrast":
        groups = contrast_groups(seed, *rest)
    elif kind == "sentences":
        groups = sentence_groups(data, _EMBEDDINGS[0], *rest, seed, share)
    else:
        groups = retrieved_groups(data, _EMBEDDINGS[0], kind, *rest, seed, share)
    for group in groups:
        group["source"] = kind
    return kind, seed, [json.dumps(group) for group in groups]


def main() -> None:
    """Write one file of groups for each pass, in random order."""
    data, folder, out = map(Path, sys.argv[1:4])
    passes, share = int(sys.argv[4]), float(sys.argv[5]) if len(sys.argv) > 5 else 1.0
    start, workers = time.monotonic(), len(os.sched_getaffinity(0))
    tasks: list[tuple[Any, ...]] = []
    for seed in range(passes):
        for name in SETS:
            count = round(share * min(SETS[name], len(dataset(data, name).queries)))
            tasks += [(name, data, folder, seed, share, part) for part in range(-(-count // PART))]
        parts = max(1, min(6, workers))
        tasks += [("sentences", data, folder, seed, share, part, parts) for part in range(parts)]
        tasks += [("contrast", data, folder, seed, share, half) for half in range(2)]
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    counts: dict[str, int] = {}
    with ProcessPoolExecutor(workers) as pool:
        for task, (kind, seed, made) in zip(tasks, pool.map(_run, tasks), strict=True):
            lines += made
            counts[kind] = counts.get(kind, 0) + len(made)
            if task is tasks[-1] or tasks[tasks.index(task) + 1][3] != seed:
                random.Random(seed).shuffle(lines)
                partial = out / f"pass-{seed}.partial"
                partial.write_text("\n".join(lines) + "\n", "utf-8")
                partial.replace(out / f"pass-{seed}.jsonl")
                print(f"{time.monotonic() - start:.0f} s: pass {seed} has {len(lines)} groups; so far {counts}", flush=True)
                lines = []


if __name__ == "__main__":
    main()
