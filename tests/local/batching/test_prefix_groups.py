"""Prefix groups, by value."""

import pytest

from mistral_rerank.local.batching.planning import PrefixGroup, find_prefix_groups

QUESTION = list(range(10, 22))


def test_sequences_that_begin_alike_share_a_prefix_group():
    sequences = [[*QUESTION, 1], [5, 6, 7], [*QUESTION, 2, 3], [*QUESTION, 1]]
    assert find_prefix_groups(sequences) == [PrefixGroup(0, (1,)), PrefixGroup(12, (0, 3, 2))]


@pytest.mark.parametrize("word", [1, 99], ids=["before", "after"])
def test_a_group_keeps_its_long_prefix_beside_a_sequence_with_a_shorter_one(word):
    sequences = [[*QUESTION, *QUESTION, i] for i in range(3)] + [[*QUESTION[:9], word]]
    assert sorted(find_prefix_groups(sequences), key=lambda group: group.prefix) == [
        PrefixGroup(0, (3,)),
        PrefixGroup(24, (0, 1, 2)),
    ]


def test_single_sequences_share_a_short_prefix_beside_a_group_with_a_longer_one():
    sequences = [
        [*QUESTION, 1],
        [*QUESTION, *QUESTION, 5],
        [*QUESTION, *QUESTION, 6],
        [*QUESTION, 90],
        [*QUESTION, 91],
    ]
    assert sorted(find_prefix_groups(sequences), key=lambda group: group.prefix) == [
        PrefixGroup(12, (0, 3, 4)),
        PrefixGroup(24, (1, 2)),
    ]


def test_every_sequence_keeps_a_token_of_its_own():
    assert find_prefix_groups([QUESTION, QUESTION]) == [PrefixGroup(11, (0, 1))]
    assert find_prefix_groups([QUESTION, [*QUESTION, 1]]) == [PrefixGroup(11, (0, 1))]


def test_a_prefix_under_the_shortest_length_is_not_shared():
    assert find_prefix_groups([[1, 2, 3], [1, 2, 4]]) == [PrefixGroup(0, (0,)), PrefixGroup(0, (1,))]
