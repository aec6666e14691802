"""Rewrite training questions as users type them. mini's last training round used them.

python examples/training/messy_questions.py DATA GROUPS OUT

DATA has the BEIR folders bioasq_6_8 and squad_du. GROUPS has the output of `mine` for medquad, stackexchange_small and
techdocs_faq. The script writes two new BEIR folders for `mine`, and the three files of groups with rewritten questions:

- requests: part of an abstract is the query for the other abstracts that answer the same question;
- double: two questions in one, each answered by its own passage;
- medquad: questions from templates in a patient's words;
- medquad, stackexchange_small and techdocs_faq: often in lower case, without a question mark, or with typos.

The teacher's scores of the original questions are kept.
"""

import argparse
import json
import random
import re
from pathlib import Path

import bm25s

from mistral_rerank.evaluation.datasets import BeirDataset, load_beir

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


def requests(dataset: BeirDataset, rng: random.Random) -> BeirDataset:
    """Turn part of a relevant passage into the query for the other relevant passages; the passage leaves the corpus."""
    chosen = [query for query in dataset.queries if len(dataset.positives(query)) >= 3]
    rng.shuffle(chosen)
    queries: dict[str, str] = {}
    sources: dict[str, str] = {}
    for query in chosen[:REQUESTS]:
        left = [passage for passage in dataset.positives(query) if passage not in sources.values()]
        if len(left) < 3:
            continue
        sources[query] = rng.choice(left)
        words = rng.randint(25, 75)
        sentences = re.split(r"(?<=[.?!]) ", dataset.corpus[sources[query]])
        start = rng.randrange(max(1, len(sentences) // 2))
        queries[query] = " ".join(" ".join(sentences[start:]).split()[:words])
    removed = set(sources.values())
    qrels = {query: {p: 1 for p in dataset.positives(query) if p not in removed} for query in queries}
    corpus = {passage: text for passage, text in dataset.corpus.items() if passage not in removed}
    return BeirDataset("requests", corpus, queries, {query: judged for query, judged in qrels.items() if judged})


def doubles(dataset: BeirDataset, rng: random.Random) -> BeirDataset:
    """Join a question with a question that is answered by one of its BM25 passages."""
    questions_of: dict[str, list[str]] = {}
    for query in dataset.queries:
        questions_of.setdefault(dataset.positives(query)[0], []).append(query)
    ids = list(dataset.corpus)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(dataset.corpus.values()), show_progress=False), show_progress=False)
    chosen = list(dataset.queries)
    rng.shuffle(chosen)
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for query in chosen[:DOUBLES]:
        (answer, *_), text = dataset.positives(query), dataset.queries[query]
        (top,), _ = index.retrieve(
            bm25s.tokenize([text], show_progress=False), k=min(12, len(ids)), show_progress=False
        )
        others = [ids[index] for index in top if ids[index] != answer and ids[index] in questions_of]
        if not others:
            continue
        passage = rng.choice(others[:6])
        other = dataset.queries[rng.choice(questions_of[passage])]
        first, second = (words.strip().rstrip("?. ") for words in (text, other))
        joined = second[0].lower() + second[1:] if second.split()[0].lower() in NOT_NAMES else second
        forms = f"{first}, and {joined}?", f"{first}? {second}?", f"{first} and {joined}?"
        queries[query] = rng.choice(forms)
        qrels[query] = {answer: 1, passage: 1}
    return BeirDataset("double", dataset.corpus, queries, qrels)


def as_a_patient(question: str, rng: random.Random) -> str:
    """Rewrite most of MedQuAD's template questions."""
    for pattern, forms in FORMS.items():
        match = re.match(pattern, question.strip(), re.IGNORECASE)
        if match and rng.random() < 0.8:
            question = rng.choice(forms).format(x=match[1])
            break
    return in_a_hurry(question, rng)


def in_a_hurry(question: str, rng: random.Random) -> str:
    """Drop capitals, the question mark, or letters."""
    if rng.random() < 0.35:
        question = question.lower()
    if rng.random() < 0.35:
        question = question.rstrip("?. ")
    return mistyped(question, rng) if rng.random() < 0.35 else question


def mistyped(question: str, rng: random.Random) -> str:
    """Drop, swap or double a letter in up to two longer words."""
    words = question.split()
    for _ in range(rng.randint(0, 2)):
        index = rng.randrange(len(words))
        word = words[index]
        if len(word) > 5:
            i = rng.randrange(1, len(word) - 2)
            words[index] = rng.choice(
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
    rows = [f"{query}\t{passage}\t1\n" for query, judged in dataset.qrels.items() for passage in judged]
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), encoding="utf-8")


def main() -> None:
    """Write the folders and the groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("groups", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    for make, source in ((requests, "bioasq_6_8"), (doubles, "squad_du")):
        dataset = make(load_beir(options.data / source), rng)
        write(dataset, options.out / dataset.name)
        print(f"{dataset.name}: {len(dataset.queries)} questions, {len(dataset.corpus)} passages")
    for name, rewrite in (
        ("medquad", as_a_patient),
        ("stackexchange_small", in_a_hurry),
        ("techdocs_faq", in_a_hurry),
    ):
        groups = [json.loads(line) for line in (options.groups / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for group in groups:
            group["queries"] = [rewrite(question, rng) for question in group["queries"]]
        lines = (json.dumps(group, ensure_ascii=False) + "\n" for group in groups)
        (options.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(groups)} groups")


if __name__ == "__main__":
    main()
