"""Rows without padding and shared prefixes: the plan by value, the scores against transformers' own loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain_logits, tiny_config
from transformers import AutoModelForSequenceClassification, MistralForSequenceClassification

from mistral_rerank.local import packing
from mistral_rerank.local.model import RerankModel, packed_logits
from mistral_rerank.local.packing import (
    PACKED_ATTENTION,
    PackedCost,
    Tree,
    pack,
    packed_cost,
    plan_packs,
    register,
    share_prefixes,
    span_masks,
)
from mistral_rerank.local.tokens import PairTokenizer
from mistral_rerank.prompts import Prompt

QUESTION = list(range(10, 22))


def tokens(trees, sequences):
    return sum(tree.prefix + sum(len(sequences[i]) - tree.prefix for i in tree.members) for tree in trees)


@pytest.fixture(scope="module", params=[None, 24], ids=["full", "window"])
def classifiers(request):
    """The same weights twice: for the reference, and for packed rows."""
    register()
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(MistralForSequenceClassification(tiny_config(100, sliding_window=request.param)).eval())
    made[1].base_model.set_attn_implementation(PACKED_ATTENTION)
    return made


def test_sequences_that_begin_alike_share_a_tree():
    sequences = [[*QUESTION, 1], [5, 6, 7], [*QUESTION, 2, 3], [*QUESTION, 1]]
    assert share_prefixes(sequences) == [Tree(0, (1,)), Tree(12, (0, 3, 2))]


@pytest.mark.parametrize("word", [1, 99], ids=["before", "after"])
def test_a_tree_is_not_spoilt_by_a_stranger_with_the_same_first_words(word):
    sequences = [[*QUESTION, *QUESTION, i] for i in range(3)] + [[*QUESTION[:9], word]]
    assert sorted(share_prefixes(sequences), key=lambda tree: tree.prefix) == [Tree(0, (3,)), Tree(24, (0, 1, 2))]


def test_single_ones_share_a_short_beginning_beside_a_tree_with_a_longer_one():
    sequences = [
        [*QUESTION, 1],
        [*QUESTION, *QUESTION, 5],
        [*QUESTION, *QUESTION, 6],
        [*QUESTION, 90],
        [*QUESTION, 91],
    ]
    assert sorted(share_prefixes(sequences), key=lambda tree: tree.prefix) == [
        Tree(12, (0, 3, 4)),
        Tree(24, (1, 2)),
    ]


def test_every_sequence_keeps_a_token_of_its_own():
    assert share_prefixes([QUESTION, QUESTION]) == [Tree(11, (0, 1))]
    assert share_prefixes([QUESTION, [*QUESTION, 1]]) == [Tree(11, (0, 1))]


def test_a_prefix_too_short_to_pay_is_not_shared():
    assert share_prefixes([[1, 2, 3], [1, 2, 4]]) == [Tree(0, (0,)), Tree(0, (1,))]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), max_size=30), st.integers(1, 100))
def test_a_plan_holds_every_sequence_once_within_its_budget_and_saves_tokens(sequences, budget):
    plan = plan_packs(sequences, budget)
    trees = [tree for trees in plan for tree in trees]
    assert sorted(i for tree in trees for i in tree.members) == list(range(len(sequences)))
    assert tokens(trees, sequences) <= sum(map(len, sequences))
    whole = PackedCost(0)
    for row in plan:
        cost = packed_cost([sequences[i] for tree in row for i in tree.members])
        assert cost.tokens <= tokens(row, sequences), "what is planned is not exceeded by what is run"
        whole += cost
        alone = len(row) == 1 and len(row[0].members) == 1
        assert alone or tokens(row, sequences) <= max(budget, 1)
    assert packed_cost(sequences).tokens <= whole.tokens, "one row of all computes no more"
    for tree in trees:
        assert len({tuple(sequences[i][: tree.prefix]) for i in tree.members}) == 1
        assert all(len(sequences[i]) > tree.prefix for i in tree.members)


def test_a_tree_over_the_budget_is_cut_and_its_prefix_repeated():
    sequences = [[*QUESTION, i, i] for i in range(5)]
    assert plan_packs(sequences, 17) == [[Tree(12, (0, 1))], [Tree(12, (2, 3))], [Tree(0, (4,))]]


def test_a_row_has_no_padding_and_each_prefix_once():
    sequences = [[*QUESTION, 1], [5, 6, 7], [*QUESTION, 2, 3]]
    packed = pack(sequences, share_prefixes(sequences))
    assert packed.ids.tolist() == [[5, 6, 7, *QUESTION, 1, 2, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, *range(12), 12, 12, 13]]
    assert packed.members == (1, 0, 2)
    assert packed.last.tolist() == [2, 15, 17]


def test_a_mask_shows_the_prefix_and_what_came_before_of_the_same_sequence():
    sequences = [[*QUESTION, 1], [*QUESTION, 2, 3]]
    packed = pack(sequences, share_prefixes(sequences))
    prefix, rests = span_masks(packed, window=4)
    places = torch.arange(12)
    assert torch.equal(prefix, (places <= places[:, None]) & (places > places[:, None] - 4))
    assert rests[:, :12].sum(1).tolist() == [3, 3, 2]
    assert rests[:, 12:].tolist() == [[True, False, False], [False, True, False], [False, True, True]]


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_packed_scores_equal_transformers_own_one_at_a_time(classifiers, data):
    reference, packed_model = classifiers
    ids = st.lists(st.integers(1, 99), min_size=1, max_size=40)
    prefixes = data.draw(st.lists(ids, min_size=1, max_size=3))
    rests = data.draw(st.lists(st.tuples(st.sampled_from(prefixes), ids), min_size=1, max_size=12))
    sequences = [prefix + rest for prefix, rest in rests]
    found = [0.0] * len(sequences)
    with torch.inference_mode():
        for trees in plan_packs(sequences, data.draw(st.sampled_from([20, 100, 10_000]))):
            packed = pack(sequences, trees)
            logits = packed_logits(packed_model.base_model, packed_model.score, packed)
            for member, logit in zip(packed.members, logits.tolist(), strict=True):
                found[member] = logit
    assert found == pytest.approx(plain_logits(reference, sequences), abs=1e-4)


def test_a_model_scores_alike_with_and_without_padding(tiny, tokenizer, pairs):
    sequences = [pair.sequences[0] for pair in PairTokenizer(tokenizer, Prompt(), max_length=512).encode(pairs[:40])]
    found = []
    for packed in (True, False):
        loaded = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
        model = RerankModel(loaded.base_model, loaded.score, torch.device("cpu"), packed=packed)
        batches = model.plan(sequences, 600)
        assert sorted(i for batch in batches for i in batch) == list(range(40))
        logits = dict.fromkeys(range(40), 0.0)
        for batch in batches:
            rows = [sequences[i] for i in batch]
            assert model.cost(rows).tokens <= 600
            logits |= dict(zip(batch, model.logits(rows), strict=True))
        found.append(list(logits.values()))
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_gradients_equal_those_of_single_sequences(classifiers):
    reference, packed_model = classifiers
    sequences = [[*QUESTION, *range(30, 30 + n)] for n in (1, 5, 20)] + [[7, 8, 9]]
    packed = pack(sequences, share_prefixes(sequences))
    packed_logits(packed_model.base_model, packed_model.score, packed).square().sum().backward()
    sum(
        reference(input_ids=torch.tensor([ids]), use_cache=False).logits.square().sum() for ids in sequences
    ).backward()
    for (name, weight), other in zip(reference.named_parameters(), packed_model.parameters(), strict=True):
        assert torch.allclose(weight.grad, other.grad, rtol=1e-3, atol=1e-4), name
    reference.zero_grad()
    packed_model.zero_grad()


def test_long_rests_attend_in_calls_of_bounded_size(monkeypatch):
    monkeypatch.setattr(packing, "SPAN_TOKENS", 10)
    sequences = [[*QUESTION, *[i] * 4] for i in range(1, 6)]
    packed = pack(sequences, share_prefixes(sequences))
    assert [span.rests for span in packed.spans] == [(), (4, 4), (4, 4), (4,)]
