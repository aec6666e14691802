import json

import pytest
from support import FACTS, LengthReranker

from mistral_rerank import InvalidInputError
from mistral_rerank.calibration.fit import LabelledPairs, pooled
from mistral_rerank.calibration.labelled_pairs import read_pairs
from mistral_rerank.evaluation.evaluate import evaluate
from mistral_rerank.evaluation.first_stage import BM25Stage
from mistral_rerank.evaluation.workspace import EvaluationSettings

SETTINGS = EvaluationSettings(data=(FACTS,), top_k=4, queries=6)


def read(source, reranker=None):
    return read_pairs(source, reranker or LengthReranker(), BM25Stage(), SETTINGS, notify=lambda *_: None)


def test_the_pairs_of_a_folder_are_those_of_its_evaluation(tmp_path):
    evaluate(LengthReranker(), SETTINGS, tmp_path / "out")
    found = read(FACTS)
    again = read(tmp_path / "out" / "scores" / "facts.jsonl")
    assert found == again
    assert found.name == "facts"
    assert len(found.logits) == 24
    assert 0 < sum(found.labels) <= 6


def test_pairs_of_a_file_are_scored_unless_they_are(tmp_path):
    lines = [
        {"query": "q", "passage": "four", "label": 1},
        {"query": "q", "passage": "never read", "label": 0, "logit": -1.5},
        {"query": "q", "passage": "sevenly", "label": False, "other": "kept out"},
    ]
    (tmp_path / "mine.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert read(tmp_path / "mine.jsonl") == LabelledPairs("mine", (4.0, -1.5, 7.0), (1, 0, 0))


def test_scored_pairs_need_no_model(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"logit": 2, "label": 1}\n' * 300)
    reranker = LengthReranker()
    assert read(tmp_path / "p.jsonl", reranker).logits == (2.0,) * 300
    assert reranker.calls == 0


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"query": "q", "passage": "p"}',
        '{"query": "q", "passage": "p", "label": 2}',
        '{"query": "q", "label": 1}',
        '{"query": 1, "passage": "p", "label": 1}',
        '{"logit": "x", "label": 1}',
        '{"logits": [1.0], "labels": [1, 0]}',
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(f'{{"logit": 2, "label": 1}}\n{line}\n')
    with pytest.raises(InvalidInputError, match=r'p\.jsonl:2: expected "query"'):
        read(tmp_path / "p.jsonl")


def test_collections_are_put_together_in_order():
    both = pooled("both", [LabelledPairs("a", (1.0,), (0,)), LabelledPairs("b", (2.0, 3.0), (1, 0))])
    assert both == LabelledPairs("both", (1.0, 2.0, 3.0), (0, 1, 0))
