from pathlib import Path

import pytest
from pydantic import ValidationError
from support import FACTS, split_facts

from mistral_rerank import InvalidInputError
from mistral_rerank.training.groups import Group, write_groups
from mistral_rerank.training.sources import Source, weighted

SHAPE = {"questions": 1, "negatives": 2, "random_negatives": 0, "seed": 0}


@pytest.mark.parametrize(
    ("written", "path", "cap", "weight"),
    [
        ("data/squad", "data/squad", None, 1),
        ("data/squad@500", "data/squad", 500, 1),
        ("data/squad@2x", "data/squad", None, 2),
        ("me@home/squad.jsonl@500@0.5x", "me@home/squad.jsonl", 500, 0.5),
        ("squad@home", "squad@home", None, 1),
    ],
)
def test_a_source_is_written_with_its_cap_and_weight(written, path, cap, weight):
    source = Source.model_validate(written)
    assert (source.path, source.max_queries, source.weight) == (Path(path), cap, weight)
    assert source.name == written.rpartition("/")[2]
    assert Source.model_validate_json(source.model_dump_json()) == source


@pytest.mark.parametrize("written", ["squad@0", "squad@0x"])
def test_no_questions_and_no_weight_are_refused(written):
    with pytest.raises(ValidationError):
        Source.model_validate(written)


def test_a_cap_holds_for_folders_and_for_files_of_groups(tmp_path):
    assert len(Source.model_validate(f"{FACTS}@7").groups(**SHAPE)) == 7
    file = tmp_path / "groups.jsonl"
    write_groups([Group((f"q{i}", "q"), ("a", "b"), ((1, 0), (0, 1))) for i in range(9)], file)
    read = [Source.model_validate(f"{file}@7").groups(**SHAPE | {"seed": seed}) for seed in (0, 0, 1)]
    assert [len(groups) for groups in read] == [3, 3, 3]
    assert read[0] == read[1] != read[2]
    assert len(Source.model_validate(f"{file}@7@2x").groups(**SHAPE)) == 6
    with pytest.raises(InvalidInputError, match="more than 1 questions each; raise the cap"):
        Source.model_validate(f"{file}@1").groups(**SHAPE)


def test_of_several_splits_the_one_for_the_purpose_is_read(tmp_path):
    source = Source(path=split_facts(tmp_path / "split"))
    assert len(source.load("train").queries) == 32
    assert len(source.load("dev", "test").queries) == 8
    with pytest.raises(InvalidInputError, match="found: test, train"):
        source.load("dev")


def test_a_weight_repeats_groups_or_takes_a_part_of_them():
    groups = [Group((f"q{i}",), ("a", "b"), ((1, 0),)) for i in range(10)]
    assert weighted(groups, 1, 0) == groups
    assert sorted(map(weighted(groups, 2.5, 0).count, groups)) == [2] * 5 + [3] * 5
    assert weighted(groups, 0.3, 0) == weighted(groups, 0.3, 0) != weighted(groups, 0.3, 1)
    assert len(set(weighted(groups, 0.3, 0))) == 3
