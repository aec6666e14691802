"""The data of `mistral-rerank demo`: 94 passages, 40 questions, and BM25's first ten passages for each question.

`facts` is a BEIR folder, written for this project. Word overlap is misleading in it: BM25 ranks the answer first for
half of the questions. `bm25.trec` is the run of `evaluation.first_stage.BM25`, stored so that the demo needs no
retriever.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FACTS = Path(__file__).parent / "facts"
"""A BEIR folder whose questions have one relevant passage each."""

BM25_RUN = Path(__file__).parent / "bm25.trec"
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage that the retriever found.

    Attributes:
        title: of the passage.
        body: its text without the title.
        text: title and body, as a model reads them.
        answers: whether it is judged relevant.

    """

    title: str
    body: str
    text: str
    answers: bool


def demo_questions() -> dict[str, list[Candidate]]:
    """Return the first three questions whose answer BM25 does not rank first, with BM25's passages, best first."""
    from mistral_rerank.data_files.passages import read_passages
    from mistral_rerank.evaluation.datasets import load_beir
    from mistral_rerank.evaluation.run_files import read_scores

    facts, run = load_beir(FACTS), read_scores(BM25_RUN)
    records = {str(passage.record["_id"]): passage.record for passage in read_passages(FACTS / "corpus.jsonl")}
    questions: dict[str, list[Candidate]] = {}
    for query_id, query in facts.queries.items():
        answers = facts.positives(query_id)
        found = [
            Candidate(
                str(records[passage]["title"]), str(records[passage]["text"]), facts.corpus[passage], passage in answers
            )
            for passage, _ in run[query_id]
        ]
        if not found[0].answers:
            questions[query] = found
        if len(questions) == SHOWN:
            break
    return questions
