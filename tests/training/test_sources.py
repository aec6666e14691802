import pytest
from support import FACTS, split_facts

from mistral_rerank import InvalidInputError
from mistral_rerank.training.groups import Group, write_groups
from mistral_rerank.training.sources import load_groups, load_split

SHAPE = {"questions": 1, "negatives": 2, "random_negatives": 0, "seed": 0}


def test_a_cap_holds_for_folders_and_for_files_of_groups(tmp_path):
    assert len(load_groups(FACTS, **SHAPE, max_queries=7)) == 7
    file = tmp_path / "groups.jsonl"
    write_groups([Group((f"q{i}", "q"), ("a", "b"), ((1, 0), (0, 1))) for i in range(9)], file)
    samples = [load_groups(file, **SHAPE | {"seed": seed}, max_queries=7) for seed in (0, 0, 1)]
    assert [len(groups) for groups in samples] == [3, 3, 3]
    assert samples[0] == samples[1] != samples[2]
    assert len(load_groups(file, **SHAPE)) == 9
    with pytest.raises(InvalidInputError, match="has more than 1 questions; raise max_queries"):
        load_groups(file, **SHAPE, max_queries=1)


def test_of_several_splits_the_one_for_the_purpose_is_read(tmp_path):
    folder = split_facts(tmp_path / "split")
    assert len(load_split(folder, "train").queries) == 32
    assert len(load_split(folder, "dev", "test").queries) == 8
    with pytest.raises(InvalidInputError, match="found: test, train"):
        load_split(folder, "dev")
