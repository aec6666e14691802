"""Batch plans, packed and padded: every sequence once, within the budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_rerank.local.batching.planning import PackedCost, packed_cost, plan_packs, plan_padded
from mistral_rerank.local.batching.prefix_groups import PrefixGroup

QUESTION = list(range(10, 22))


def tokens(groups, sequences):
    return sum(group.prefix + sum(len(sequences[i]) - group.prefix for i in group.members) for group in groups)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), max_size=30), st.integers(1, 100))
def test_a_plan_holds_every_sequence_once_within_its_budget_and_saves_tokens(sequences, budget):
    plan = plan_packs(sequences, budget)
    groups = [group for groups in plan for group in groups]
    assert sorted(i for group in groups for i in group.members) == list(range(len(sequences)))
    assert tokens(groups, sequences) <= sum(map(len, sequences))
    whole = PackedCost(0)
    for row in plan:
        cost = packed_cost([sequences[i] for group in row for i in group.members])
        assert cost.real <= tokens(row, sequences), "what is planned is not exceeded by what is run"
        whole += cost
        alone = len(row) == 1 and len(row[0].members) == 1
        assert alone or tokens(row, sequences) <= max(budget, 1)
    assert packed_cost(sequences).real <= whole.real, "one row of all computes no more"
    for group in groups:
        assert len({tuple(sequences[i][: group.prefix]) for i in group.members}) == 1
        assert all(len(sequences[i]) > group.prefix for i in group.members)


def test_a_group_over_the_budget_is_split_and_its_prefix_repeated():
    sequences = [[*QUESTION, i, i] for i in range(5)]
    assert plan_packs(sequences, 17) == [[PrefixGroup(12, (0, 1))], [PrefixGroup(12, (2, 3))], [PrefixGroup(0, (4,))]]


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_every_position_is_planned_once_within_the_budget_longest_first(lengths, budget):
    batches = plan_padded(lengths, budget)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[position] for batch in batches for position in batch]
    assert flat == sorted(lengths, reverse=True)


def test_equal_lengths_keep_their_input_order():
    assert plan_padded([5, 7, 5, 5], 10) == [[1], [0, 2], [3]]
