"""Batch plans, packed and padded: every sequence once, within the budget."""

from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_rerank.local.batching.planning import PrefixGroup, bucket_length, join, plan_packed, plan_padded

QUESTION = list(range(10, 22))


SEQUENCES = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=30)


@settings(deadline=None)
@given(SEQUENCES, st.integers(1, 100))
def test_a_plan_holds_every_sequence_once_within_its_budget_and_saves_tokens(sequences, budget):
    plan = plan_packed(sequences, budget)
    assert sorted(i for batch in plan for i in batch.members) == list(range(len(sequences)))
    assert sum(batch.real_tokens for batch in plan) <= sum(map(len, sequences))
    for batch in plan:
        check_packed(batch)
        assert batch.sequences == tuple(sequences[i] for i in batch.members)
        assert len(batch.members) == 1 or batch.real_tokens <= budget
    (whole,) = plan_packed(sequences, 10**9)
    assert whole.real_tokens <= sum(batch.real_tokens for batch in plan), "one row of all computes no more"


def check_packed(batch):
    """Every sequence is in one group, from left to right, with the group's prefix and a token more."""
    assert [i for group in batch.groups for i in group.members] == list(range(len(batch.sequences)))
    row = 0
    for group in batch.groups:
        assert len({tuple(batch.sequences[i][: group.prefix]) for i in group.members}) == 1
        assert all(len(batch.sequences[i]) > group.prefix for i in group.members)
        row += group.prefix + sum(len(batch.sequences[i]) - group.prefix for i in group.members)
    assert batch.real_tokens == row
    assert batch.tokens == bucket_length(row)


@settings(deadline=None)
@given(st.data(), SEQUENCES, st.sampled_from([plan_packed, plan_padded]))
def test_parts_of_a_batch_and_joined_batches_hold_their_sequences(data, sequences, plan):
    (batch,) = plan(sequences, 10**9)
    positions = data.draw(st.sets(st.integers(0, len(sequences) - 1), min_size=1))
    part = batch.select(positions)
    assert set(part.members) == positions
    assert part.sequences == tuple(batch.sequences[i] for i in part.members)
    whole = join([batch, part, batch])
    concatenated = batch.sequences + part.sequences + batch.sequences
    assert sorted(whole.members) == list(range(len(concatenated)))
    assert whole.sequences == tuple(concatenated[i] for i in whole.members)
    for made in (part, whole):
        if plan is plan_packed:
            check_packed(made)
        else:
            assert made.tokens == len(made.sequences) * max(map(len, made.sequences))


def test_a_group_over_the_budget_is_split_and_its_prefix_repeated():
    sequences = [[*QUESTION, i, i] for i in range(5)]
    plan = plan_packed(sequences, 17)
    assert [batch.members for batch in plan] == [(0, 1), (2, 3), (4,)]
    assert [batch.groups for batch in plan] == [(PrefixGroup(12, (0, 1)),)] * 2 + [(PrefixGroup(0, (0,)),)]


def test_a_part_of_a_group_has_the_longest_prefix_of_its_own():
    sequences = [[*QUESTION, start, 5, i] for start in (1, 2) for i in range(5)]
    assert [batch.groups[0].prefix for batch in plan_packed(sequences, 24)] == [14, 14]


@given(st.lists(st.integers(1, 600), max_size=60), st.integers(1, 2000))
def test_every_position_is_planned_once_within_the_budget_longest_first(lengths, budget):
    batches = [batch.members for batch in plan_padded([[0] * length for length in lengths], budget)]
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    flat = [lengths[position] for batch in batches for position in batch]
    assert flat == sorted(lengths, reverse=True)


def test_equal_lengths_keep_their_input_order():
    plan = plan_padded([[0] * length for length in (5, 7, 5, 5)], 10)
    assert [batch.members for batch in plan] == [(1,), (0, 2), (3,)]
