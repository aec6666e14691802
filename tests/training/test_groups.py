import json

import pytest

from mistral_rerank import InvalidInputError, SettingsError
from mistral_rerank.training.groups import Group, read_groups, write_groups

GROUPS = [
    Group(("q",), ("a", "b"), ((1.0, None),)),
    Group(("r", "s"), ("c", "d"), ((1.0, 0.0), (0.5, 1.0)), ((1.0, 0.5), (0.0, 2.0))),
]


def test_groups_survive_their_file_and_no_file_is_overwritten(tmp_path):
    file = tmp_path / "groups.jsonl"
    write_groups(GROUPS, file)
    assert read_groups(file) == GROUPS
    with pytest.raises(SettingsError, match="exists"):
        write_groups([], file)
    with pytest.raises(SettingsError, match="no folder"):
        write_groups(GROUPS, tmp_path / "none" / "groups.jsonl")
    assert list(tmp_path.iterdir()) == [file]


def test_a_teacher_may_be_left_out(tmp_path):
    file = tmp_path / "groups.jsonl"
    file.write_text('{"queries": ["q"], "passages": ["a", "b"], "grades": [[1, null]]}\n')
    assert read_groups(file) == GROUPS[:1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grades": None}, "valid"),
        ({"queries": []}, "needs a question"),
        ({"passages": ["alone"], "grades": [[1]]}, "two passages"),
        ({"grades": [[1, 0], [1, 0]]}, "grades must hold"),
        ({"teacher": [[1]]}, "teacher must hold"),
        ({"teacher": [[1, float("nan")]]}, "finite"),
        ({"graders": 3}, "Unexpected"),
        ({"grades": [[0, None]]}, "needs a passage above 0"),
        ({"grades": [[2, 0]]}, "between 0 and 1"),
    ],
)
def test_a_line_that_is_no_group_is_named(tmp_path, changes, message):
    good = {"queries": ["q"], "passages": ["a", "b"], "grades": [[1, 0]]}
    file = tmp_path / "groups.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | changes) + "\n")
    with pytest.raises(InvalidInputError, match=f"line 2: .*{message}"):
        read_groups(file)
