import json

import pytest

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.evaluation.beir import BeirDataset
from mistral_rerank.training.groups import read_groups
from mistral_rerank.training.mining import TEACHER_SCALE, mine, write_groups


class Marks:
    """A teacher whose similarity to any question is the number a text ends in."""

    def embed(self, texts):
        _, *passages = texts
        return [[1.0], *([float(text.split()[-1])] for text in passages)]


@pytest.fixture
def dataset():
    near = {f"n{i}": f"ice floats {0.5 + i / 100}" for i in range(8)}
    corpus = {"p": "ice floats on water 0.8", "twin": "ice floats on water too 0.79", **near}
    return BeirDataset("ice", corpus, {"q": "why does ice float on water"}, {"q": {"p": 1}})


def test_a_candidate_as_close_as_the_positive_is_left_out(dataset):
    for seed in range(20):
        mined = mine(dataset, Marks(), negatives=4, seed=seed)
        (group,) = mined.groups
        assert mined.short == 0
        assert group.passages[0] == dataset.corpus["p"]
        assert len(set(group.passages)) == 5
        assert dataset.corpus["twin"] not in group.passages
        marks = [float(text.split()[-1]) for text in group.passages]
        assert group.teacher == pytest.approx([TEACHER_SCALE * mark for mark in marks])


def test_where_too_few_are_safe_the_least_close_are_taken_and_counted(dataset):
    dataset.corpus.update({f"n{i}": f"ice floats {0.9 + i / 100}" for i in range(8)})
    mined = mine(dataset, Marks(), negatives=4)
    assert mined.short == 1
    assert len(mined.groups[0].passages) == 5


def test_the_seed_decides_the_groups(dataset):
    assert mine(dataset, Marks(), negatives=2, seed=1) == mine(dataset, Marks(), negatives=2, seed=1)


def test_a_corpus_that_is_too_small_is_refused(dataset):
    with pytest.raises(InvalidInputError, match="too few"):
        mine(dataset, Marks(), negatives=50)


def test_groups_survive_their_file_and_no_file_is_overwritten(dataset, tmp_path):
    groups, file = mine(dataset, Marks(), negatives=2).groups, tmp_path / "groups.jsonl"
    write_groups(groups, file)
    assert read_groups(file) == groups
    assert set(json.loads(file.read_text())) == {"query", "passages", "teacher"}
    with pytest.raises(SettingsError, match="exists"):
        write_groups([], file)
    assert list(tmp_path.iterdir()) == [file]
