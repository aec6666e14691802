"""Make training questions as people really ask them: what the last round of mini was trained on beside its data sets.

python examples/training/messy_questions.py DATA GROUPS OUT

DATA holds the BEIR folders bioasq_6_8 and squad_du, GROUPS what `mine` made of medquad, stackexchange_small and
techdocs_faq. OUT gets two new BEIR folders, to `mine` in turn, and the three files of groups in other words:

- requests: a piece of an abstract asks for the other abstracts that answer the same question;
- double: two questions in one, so that each of two passages answers half;
- medquad: its questions from templates as a patient would ask them;
- medquad, stackexchange_small and techdocs_faq: often in lower case, without a question mark, or mistyped.

The teacher's scores stay those of the question as it was.
"""

import argparse
import json
import random
import re
from pathlib import Path

import bm25s

from mistral_rerank.evaluation.beir import BeirDataset, load_beir

REQUESTS = 320
DOUBLES = 420

NOT_NAMES = {"what", "who", "when", "where", "how", "why", "which", "whose", "did", "is", "was", "were", "are"}
NOT_NAMES |= {"does", "do", "in", "to", "at", "on", "from", "by", "for", "the"}
"""Words that lose their capital in the middle of a sentence."""

FORMS = {
    r"what are the symptoms of (.+?) ?\??$": (
        "{x} symptoms",
        "how do i know if i have {x}",
        "signs of {x}",
        "{x}. what should I look for? My daughter may have it",
        "what does it feel like to have {x}",
    ),
    r"what causes (.+?) ?\??$": (
        "why do people get {x}",
        "{x} cause",
        "where does {x} come from? my doctor didnt say",
        "reasons for {x}",
    ),
    r"what are the treatments for (.+?) ?\??$": (
        "{x} treatment",
        "how is {x} treated",
        "is there a cure for {x}",
        "My mother has {x}. What can be done for her?",
        "help with {x}. what medicine is there",
    ),
    r"how to diagnose (.+?) ?\??$": (
        "test for {x}",
        "{x}. how do doctors find out if you have it",
        "how is {x} diagnosed",
        "what exams are needed for {x}",
    ),
    r"what is the outlook for (.+?) ?\??$": (
        "{x} prognosis",
        "life expectancy with {x}",
        "will I get better from {x}",
        "can you die from {x}",
    ),
    r"how many people are affected by (.+?) ?\??$": (
        "how common is {x}",
        "is {x} rare",
        "{x} how many people have it",
    ),
    r"is (.+?) inherited ?\??$": (
        "can i pass {x} to my children",
        "{x} runs in family?",
        "is {x} genetic",
        "my husband has {x}. will our baby get it",
    ),
    r"what are the genetic changes related to (.+?) ?\??$": (
        "which gene causes {x}",
        "{x} gene mutation",
        "genetics of {x}",
    ),
    r"how to prevent (.+?) ?\??$": ("prevent {x}", "how can i avoid getting {x}", "can {x} be prevented"),
    r"who is at risk for (.+?) ?\??$": ("who gets {x}", "{x} risk factors", "am i likely to get {x}"),
    r"what (?:are the )?complications of (.+?) ?\??$": (
        "{x} complications",
        "what happens if {x} is not treated",
    ),
    r"what (?:is|are) (?:\(are\) )?(.+?) ?\??$": (
        "{x}",
        "{x}. what is it",
        "what does {x} mean",
        "can you tell me about {x}",
        "information on {x} please",
        "I was told I have {x}. What is that?",
    ),
}


def requests(dataset: BeirDataset, draw: random.Random) -> BeirDataset:
    """Ask with a piece of one relevant passage, which leaves the corpus, for the others of its question."""
    chosen = [query for query in dataset.queries if len(dataset.positives(query)) >= 3]
    draw.shuffle(chosen)
    queries: dict[str, str] = {}
    taken: dict[str, str] = {}
    for query in chosen[:REQUESTS]:
        left = [passage for passage in dataset.positives(query) if passage not in taken.values()]
        if len(left) < 3:
            continue
        taken[query] = draw.choice(left)
        words = draw.randint(25, 75)
        sentences = re.split(r"(?<=[.?!]) ", dataset.corpus[taken[query]])
        start = draw.randrange(max(1, len(sentences) // 2))
        queries[query] = " ".join(" ".join(sentences[start:]).split()[:words])
    gone = set(taken.values())
    qrels = {query: {p: 1 for p in dataset.positives(query) if p not in gone} for query in queries}
    corpus = {passage: text for passage, text in dataset.corpus.items() if passage not in gone}
    return BeirDataset("requests", corpus, queries, {query: found for query, found in qrels.items() if found})


def doubles(dataset: BeirDataset, draw: random.Random) -> BeirDataset:
    """Join a question with one of a passage that shares its words."""
    asked: dict[str, list[str]] = {}
    for query in dataset.queries:
        asked.setdefault(dataset.positives(query)[0], []).append(query)
    ids = list(dataset.corpus)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(dataset.corpus.values()), show_progress=False), show_progress=False)
    chosen = list(dataset.queries)
    draw.shuffle(chosen)
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for query in chosen[:DOUBLES]:
        (own, *_), text = dataset.positives(query), dataset.queries[query]
        (top,), _ = index.retrieve(
            bm25s.tokenize([text], show_progress=False), k=min(12, len(ids)), show_progress=False
        )
        others = [ids[place] for place in top if ids[place] != own and ids[place] in asked]
        if not others:
            continue
        passage = draw.choice(others[:6])
        other = dataset.queries[draw.choice(asked[passage])]
        first, second = (words.strip().rstrip("?. ") for words in (text, other))
        joined = second[0].lower() + second[1:] if second.split()[0].lower() in NOT_NAMES else second
        forms = f"{first}, and {joined}?", f"{first}? {second}?", f"{first} and {joined}?"
        queries[query] = draw.choice(forms)
        qrels[query] = {own: 1, passage: 1}
    return BeirDataset("double", dataset.corpus, queries, qrels)


def as_a_patient(question: str, draw: random.Random) -> str:
    """Say most questions of MedQuAD's templates in other words."""
    for pattern, forms in FORMS.items():
        found = re.match(pattern, question.strip(), re.IGNORECASE)
        if found and draw.random() < 0.8:
            question = draw.choice(forms).format(x=found[1])
            break
    return in_a_hurry(question, draw)


def in_a_hurry(question: str, draw: random.Random) -> str:
    """Leave capitals, the question mark, or letters out."""
    if draw.random() < 0.35:
        question = question.lower()
    if draw.random() < 0.35:
        question = question.rstrip("?. ")
    return mistyped(question, draw) if draw.random() < 0.35 else question


def mistyped(question: str, draw: random.Random) -> str:
    """Leave out, swap or double a letter of up to two longer words."""
    words = question.split()
    for _ in range(draw.randint(0, 2)):
        place = draw.randrange(len(words))
        word = words[place]
        if len(word) > 5:
            i = draw.randrange(1, len(word) - 2)
            words[place] = draw.choice(
                (
                    word[:i] + word[i + 1 :],
                    word[:i] + word[i + 1] + word[i] + word[i + 2 :],
                    word[:i] + word[i] + word[i:],
                )
            )
    return " ".join(words)


def write(dataset: BeirDataset, folder: Path) -> None:
    """Write a BEIR folder."""
    (folder / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", dataset.corpus), ("queries", dataset.queries)):
        lines = (json.dumps({"_id": key, "text": text}, ensure_ascii=False) + "\n" for key, text in texts.items())
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [f"{query}\t{passage}\t1\n" for query, found in dataset.qrels.items() for passage in found]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")


def main() -> None:
    """Write all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("groups", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    for make, source in ((requests, "bioasq_6_8"), (doubles, "squad_du")):
        made = make(load_beir(options.data / source), draw)
        write(made, options.out / made.name)
        print(f"{made.name}: {len(made.queries)} questions, {len(made.corpus)} passages")
    for name, rewrite in (
        ("medquad", as_a_patient),
        ("stackexchange_small", in_a_hurry),
        ("techdocs_faq", in_a_hurry),
    ):
        groups = [json.loads(line) for line in (options.groups / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for group in groups:
            group["queries"] = [rewrite(question, draw) for question in group["queries"]]
        lines = (json.dumps(group, ensure_ascii=False) + "\n" for group in groups)
        (options.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(groups)} groups")


if __name__ == "__main__":
    main()
