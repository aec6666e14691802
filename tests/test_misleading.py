"""The data set `examples/misleading`: that it is what its README says."""

from pathlib import Path

from mistral_rerank.demo import FACTS
from mistral_rerank.evaluation.datasets import load_beir
from mistral_rerank.evaluation.run_files import read_run

FOLDER = Path(__file__).parent.parent / "examples" / "misleading"


def test_a_question_has_four_passages_of_which_bm25_ranks_the_answer_last():
    data, candidates = load_beir(FOLDER), read_run(FOLDER / "candidates.trec")
    assert len(data.queries) == 60
    assert len(set(data.corpus.values())) == 240
    for query in data.queries:
        scene = query.replace("q", "p")
        assert data.positives(query) == [f"{scene}-0"]
        ranked = [passage for passage, _ in candidates[query]]
        assert sorted(ranked) == [f"{scene}-{number}" for number in range(4)]
        assert ranked[-1] == f"{scene}-0"


def test_no_text_is_part_of_the_data_to_train_on_or_of_the_demo():
    own, *others = (load_beir(folder) for folder in (FOLDER, FACTS))
    others.append(load_beir(FOLDER.parent / "contrast", split="train"))
    texts = {*own.queries.values(), *own.corpus.values()}
    for data in others:
        assert texts.isdisjoint([*data.queries.values(), *data.corpus.values()])
