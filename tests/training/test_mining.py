import numpy as np
import pytest
from support import FACTS, split_facts

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.datasets import BeirDataset
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.training.groups import Group, write_groups
from mistral_rerank.training.mining import JUDGED_BELOW, SHARE_OF_POSITIVE, load_groups, load_split, mine
from mistral_rerank.training.settings import TrainSettings


class NumberEncoder:
    """A teacher whose similarity to any question is the number that a text ends with."""

    def encode(self, texts, kind, *, progress):
        progress(len(texts))
        return np.array([[1.0] if kind == "query" else [float(text.split()[-1])] for text in texts])


@pytest.fixture
def ice():
    near = {f"n{i}": f"ice floats {0.5 + i / 100}" for i in range(8)}
    corpus = {"p": "ice floats on water 0.8", "twin": "ice floats on water too 0.79", **near}
    return BeirDataset("ice", corpus, {"q": "why does ice float on water"}, {"q": {"p": 1}})


def test_a_group_is_a_positive_hard_negatives_and_random_ones(facts):
    mined = mine(facts, negatives=3, random_negatives=1, depth=10)
    assert (len(mined.groups), mined.short) == (len(facts.queries), 0)
    ids = {text: passage for passage, text in facts.corpus.items()}
    queries = {text: query for query, text in facts.queries.items()}
    bm25 = BM25(facts.corpus)
    for group in mined.groups:
        (query,) = group.queries
        positives = facts.positives(queries[query])
        passages = [ids[text] for text in group.passages]
        assert group.grades == (tuple(float(passage in positives) for passage in passages),)
        assert passages[0] in positives
        assert not set(passages[1:]) & set(positives)
        assert len(set(passages)) == 5
        (ranking,) = bm25.search([query], k=10)
        hard = {passage for passage, _ in ranking} - set(positives)
        assert len(hard & set(passages[1:])) >= min(3, len(hard))


def test_questions_of_a_group_are_compared_with_all_its_passages(facts):
    groups = mine(facts, questions=4, negatives=3).groups
    queries = {text: query for query, text in facts.queries.items()}
    ids = {text: passage for passage, text in facts.corpus.items()}
    seen = [query for group in groups for query in group.queries]
    assert len(seen) == len(set(seen)) == len(facts.queries)
    for group in groups:
        assert (len(group.queries), len(group.passages)) == (4, 7)
        assert len(set(group.passages)) == 7
        for query, grades in zip(group.queries, group.grades, strict=True):
            positives = facts.positives(queries[query])
            assert grades == tuple(float(ids[text] in positives) for text in group.passages)
            assert 1.0 in grades


def test_questions_whose_passages_are_retrieved_together_share_a_group():
    topics = {"ice": "ice water floats", "sun": "sun star burns"}
    corpus = {f"{topic}{i}": f"{text} {i}" for topic, text in topics.items() for i in range(4)}
    queries = {f"q{passage}": f"{topics[passage[:3]]}?" for passage in corpus}
    dataset = BeirDataset("topics", corpus, queries, {query: {query[1:]: 1} for query in queries})
    for seed in range(5):
        groups = mine(dataset, questions=4, negatives=0, seed=seed).groups
        assert {frozenset(query.split()[0] for query in group.queries) for group in groups} == {
            frozenset({"ice"}),
            frozenset({"sun"}),
        }


def test_two_questions_of_one_passage_may_share_a_group_and_a_third_may_not():
    corpus = {f"p{i}": f"ice water floats {i}" for i in range(6)}
    queries = {f"q{i}": "why does ice float" for i in range(6)}
    qrels = {f"q{i}": {f"p{i // 3}": 1} for i in range(6)}
    groups = mine(BeirDataset("ice", corpus, queries, qrels), questions=3, negatives=1).groups
    assert all(sum(row[column] for row in group.grades) <= 2 for group in groups for column in range(4))


def test_a_passage_as_close_as_the_positive_is_unknown(ice):
    for seed in range(20):
        mined = mine(ice, NumberEncoder(), negatives=4, seed=seed)
        (group,) = mined.groups
        (scores,) = group.teacher
        limit = SHARE_OF_POSITIVE * scores[0]
        assert group.passages[0] == ice.corpus["p"]
        assert group.grades == ((1.0, *(None if score >= limit else 0.0 for score in scores[1:])),)
        assert mined.short == (ice.corpus["twin"] in group.passages)


def test_the_teacher_never_puts_a_passage_before_one_that_is_judged_to_answer(ice):
    ice.corpus["p"] = "ice floats on water 0.2"
    for seed in range(5):
        (group,) = mine(ice, NumberEncoder(), negatives=6, seed=seed).groups
        (scores,) = group.teacher
        assert scores[0] == max(scores)
        assert len(set(scores[1:])) == 6  # the others stay apart


def test_a_judged_negative_stays_one_at_any_teacher_score(ice):
    ice.qrels["q"]["twin"] = 0
    for seed in range(5):
        (group,) = mine(ice, NumberEncoder(), negatives=8, seed=seed).groups
        assert None not in group.grades[0]
        (scores,) = group.teacher
        assert scores[group.passages.index(ice.corpus["twin"])] == pytest.approx(scores[0] - JUDGED_BELOW, abs=1e-3)


def test_a_judged_negative_is_taken_before_retrieved_passages(ice):
    ice.corpus["far"] = "nothing of the kind 0.1"
    ice.qrels["q"] |= {"far": 0, "not there": 0}
    for seed in range(5):
        (group,) = mine(ice, negatives=1, seed=seed).groups
        assert group.passages == (ice.corpus["p"], ice.corpus["far"])


def test_the_seed_decides_the_groups(facts):
    assert mine(facts, negatives=2, random_negatives=1) == mine(facts, negatives=2, random_negatives=1)
    assert mine(facts, negatives=2, seed=1) != mine(facts, negatives=2)


def test_the_number_of_questions_can_be_bounded(facts):
    assert len(mine(facts, negatives=1, max_queries=7).groups) == 7


def test_a_corpus_that_is_too_small_is_refused(facts):
    with pytest.raises(InvalidInputError, match="too few"):
        mine(facts, negatives=0, random_negatives=500)


def test_a_corpus_of_answers_alone_has_no_negatives():
    corpus = {f"p{i}": f"ice {i}" for i in range(4)}
    dataset = BeirDataset("ice", corpus, {"q": "why does ice float"}, {"q": dict.fromkeys(corpus, 1)})
    with pytest.raises(InvalidInputError, match="do not answer"):
        mine(dataset, negatives=2)


def test_too_few_questions_for_a_group_are_an_error(ice):
    with pytest.raises(InvalidInputError, match="1 questions with an answer in its corpus, too few"):
        mine(ice, questions=2, negatives=1)
    with pytest.raises(InvalidInputError, match="one passage teaches nothing"):
        mine(ice, negatives=0)


def test_judgements_of_missing_passages_are_an_error(ice):
    ice.qrels["q"] = {"gone": 1}
    with pytest.raises(InvalidInputError, match="0 questions with an answer in its corpus"):
        mine(ice, negatives=2)


def test_a_passage_with_the_text_of_the_answer_is_no_negative(ice):
    ice.corpus["copy"] = ice.corpus["p"]
    for seed in range(10):
        (group,) = mine(ice, negatives=8, seed=seed).groups
        assert group.passages.count(ice.corpus["p"]) == 1


def test_a_judged_passage_that_is_not_in_the_corpus_is_passed_over(ice):
    ice.qrels["q"]["gone"] = 1
    assert mine(ice, negatives=2).groups[0].passages[0] == ice.corpus["p"]
    ice.queries["r"], ice.qrels["r"] = "who?", {"gone": 1}
    assert len(mine(ice, negatives=2).groups) == 1


def test_negatives_come_from_the_first_stage_that_is_given(facts):
    """A first stage that always retrieves the corpus' last passages."""
    last = list(facts.corpus)[-6:]

    class Last:
        def search(self, dataset, queries, *, k, progress):
            progress(len(queries), len(queries))
            return [[(passage, 1.0) for passage in last][:k] for _ in queries]

    texts = {facts.corpus[passage] for passage in last}
    for group in mine(facts, negatives=3, first_stage=Last()).groups:
        assert set(group.passages[1:]) <= texts


def test_negatives_come_from_the_upper_half_of_a_reranker(facts, tiny_reranker):
    groups = mine(facts, negatives=2, depth=8, reranker=tiny_reranker).groups
    bm25 = BM25(facts.corpus)
    for group in groups:
        (ranking,) = bm25.search(group.queries, k=8)
        texts = [facts.corpus[passage] for passage, _ in ranking]
        ranked = [texts[ranked.index] for ranked in tiny_reranker.rank(group.queries[0], texts)]
        upper = set(ranked[: (len(ranked) + 1) // 2])
        hard = upper - {text for text, grade in zip(group.passages, group.grades[0], strict=True) if grade}
        assert len(set(group.passages[1:]) & hard) == min(2, len(hard))


def test_a_cap_holds_for_folders_and_for_files_of_groups(tmp_path):
    settings = TrainSettings(data=(FACTS,), negatives=2, random_negatives=0, max_queries=7)
    assert len(load_groups(FACTS, settings)) == 7
    file = tmp_path / "groups.jsonl"
    write_groups([Group((f"q{i}", "q"), ("a", "b"), ((1, 0), (0, 1))) for i in range(9)], file)
    samples = [load_groups(file, settings.model_copy(update={"seed": seed})) for seed in (0, 0, 1)]
    assert [len(groups) for groups in samples] == [3, 3, 3]
    assert samples[0] == samples[1] != samples[2]
    assert len(load_groups(file, settings.model_copy(update={"max_queries": None}))) == 9
    with pytest.raises(InvalidInputError, match="has more than 1 questions; raise max_queries"):
        load_groups(file, settings.model_copy(update={"max_queries": 1}))


def test_of_several_splits_the_one_for_the_purpose_is_read(tmp_path):
    folder = split_facts(tmp_path / "split")
    assert len(load_split(folder, "train").queries) == 32
    assert len(load_split(folder, "dev", "test").queries) == 8
    with pytest.raises(InvalidInputError, match="found: test, train"):
        load_split(folder, "dev")
