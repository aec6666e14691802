import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.first_stage import BM25
from mistral_rerank.training.groups import Group, make_groups, read_groups


def test_a_group_is_a_positive_hard_negatives_and_random_ones(facts):
    groups = make_groups(facts, negatives=3, random_negatives=1, depth=10)
    assert len(groups) == len(facts.queries)
    ids = {text: passage for passage, text in facts.corpus.items()}
    queries = {text: query for query, text in facts.queries.items()}
    bm25 = BM25(facts.corpus)
    for group in groups:
        positives = facts.positives(queries[group.query])
        found = [ids[text] for text in group.passages]
        assert found[0] in positives
        assert not set(found[1:]) & set(positives)
        assert len(set(found)) == 5
        (ranking,) = bm25.search([group.query], k=10)
        hard = {passage for passage, _ in ranking} - set(positives)
        assert len(hard & set(found[1:])) >= min(3, len(hard))


def test_the_seed_decides_the_groups(facts):
    assert make_groups(facts, negatives=2, random_negatives=1) == make_groups(facts, negatives=2, random_negatives=1)
    other = make_groups(facts, negatives=2, random_negatives=1, seed=1)
    assert other != make_groups(facts, negatives=2, random_negatives=1)


def test_the_number_of_questions_can_be_bounded(facts):
    assert len(make_groups(facts, negatives=1, random_negatives=0, max_queries=7)) == 7


def test_a_corpus_that_is_too_small_is_refused(facts):
    with pytest.raises(InvalidInputError, match="too few"):
        make_groups(facts, negatives=0, random_negatives=500)


def test_groups_are_read_from_json_lines(tmp_path):
    file = tmp_path / "groups.jsonl"
    file.write_text(
        '{"query": "q", "passages": ["a", "b"]}\n{"query": "r", "passages": ["c", "d"], "teacher": [1, 0.5]}\n'
    )
    assert read_groups(file) == [Group("q", ("a", "b")), Group("r", ("c", "d"), (1.0, 0.5))]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"query": "q"}',
        '{"query": "q", "passages": ["alone"]}',
        '{"query": "q", "passages": ["a", "b"], "teacher": [1]}',
    ],
)
def test_a_line_that_is_no_group_is_named(tmp_path, line):
    file = tmp_path / "groups.jsonl"
    file.write_text('{"query": "q", "passages": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(InvalidInputError, match="line 2"):
        read_groups(file)
