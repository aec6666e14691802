from hypothesis import given
from hypothesis import strategies as st

from mistral_rerank.local.batching.planning import plan_padded


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
