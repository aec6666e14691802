"""The data set `examples/contrast`: that it is what its README says."""

import re
from collections import Counter
from pathlib import Path

from mistral_rerank.evaluation.datasets import BeirDataset, load_beir

FOLDER = Path(__file__).parent.parent / "examples" / "contrast"
SMALL_WORDS = re.compile(
    r"\b(a|an|the|of|to|in|on|for|is|are|do|does|did|i|my|can|how|what|when|where|who|why|which|it|be)\b"
)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", SMALL_WORDS.sub("", text.lower())))


def misleads(data: BeirDataset, query: str) -> bool:
    """Whether a passage that does not answer has more of the question's words than the one that does."""
    shared = {grade: [] for grade in (0, 1)}
    for passage, grade in data.qrels[query].items():
        shared[grade].append(len(words(data.queries[query]) & words(data.corpus[passage])))
    return max(shared[0]) > max(shared[1])


def test_a_question_has_one_answer_among_the_four_passages_of_its_scene():
    splits = {split: load_beir(FOLDER, split=split) for split in ("train", "test")}
    question_counts: Counter[str] = Counter()
    for data in splits.values():
        for query, judged in data.qrels.items():
            scene = query.rpartition("-")[0]
            assert set(judged) == {f"{scene}-{letter}" for letter in "abcd"}
            assert sorted(judged.values()) == [0, 0, 0, 1]
            question_counts[scene] += 1
    assert len(question_counts) == 392
    assert set(question_counts.values()) == {6}
    assert len(data.corpus) == len(set(data.corpus.values())) == 392 * 4
    assert not splits["train"].queries.keys() & splits["test"].queries.keys()


def test_word_overlap_misleads_in_half_of_the_questions():
    for split in ("train", "test"):
        data = load_beir(FOLDER, split=split)
        assert sum(misleads(data, query) for query in data.queries) > len(data.queries) / 2
