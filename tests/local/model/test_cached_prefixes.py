"""Rows with cached prefixes: the logits of whole sequences, with mixed hits and misses, windows and chunks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_config
from transformers import LlamaConfig, LlamaForSequenceClassification, MistralForSequenceClassification

from mistral_rerank.local.model.pooling import PoolingConfig
from mistral_rerank.local.model.rerank_model import RerankModel

CPU = torch.device("cpu")


def reranker_of(dtype=torch.float32, pooling=None, **changes):
    torch.manual_seed(0)
    model = MistralForSequenceClassification(tiny_config(100, **changes)).eval().to(dtype)
    return RerankModel(model.base_model, model.score, CPU, **({} if pooling is None else {"pooling": pooling}))


RERANKERS = {window: reranker_of(sliding_window=window) for window in (None, 24, 5, 1)}


def sequence(start, length):
    return [(7 * n + 13 * start) % 90 + 3 for n in range(length)]


def logits_of(reranker, sequences, cached=None, new=()):
    """Score sequences in one row; `cached` maps positions to their cached prefixes."""
    cached = cached or {}
    lengths = [cached[i].tokens if i in cached else 0 for i in range(len(sequences))]
    (batch,) = reranker.plan(sequences, 10**9, lengths)
    prefixes = [cached[batch.members[group.members[0]]] for group in batch.groups if group.cached]
    positions = {member: place for place, member in enumerate(batch.members)}
    logits = reranker.logits_with_prefixes(batch, prefixes, [(positions[member], prefix) for member, prefix in new])
    return [logits[positions[member]] for member in range(len(sequences))], batch


def plain(reranker, sequences):
    return [reranker.logits(reranker.plan([ids], 10**9)[0])[0] for ids in sequences]


PREFIXES = [sequence(start, length) for start, length in ((1, 9), (2, 14), (3, 40), (4, 41), (5, 90))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(1, 30)), min_size=1, max_size=12),
    st.sets(st.integers(0, 4)),
    st.sampled_from(list(RERANKERS)),
)
def test_hits_and_misses_in_one_row_have_the_logits_of_whole_sequences(picks, hits, window):
    reranker = RERANKERS[window]
    sequences = [PREFIXES[prefix] + sequence(question, length) for prefix, question, length in picks]
    known = {}
    for prefix in hits:
        known[prefix] = reranker.new_prefix(len(PREFIXES[prefix]))
        logits_of(reranker, [[*PREFIXES[prefix], 1, 2]], new=[(0, known[prefix])])
    cached = {i: known[prefix] for i, (prefix, _, _) in enumerate(picks) if prefix in hits}
    misses = {prefix: i for i, (prefix, _, _) in enumerate(picks) if prefix not in hits}
    new = {prefix: (i, reranker.new_prefix(len(PREFIXES[prefix]))) for prefix, i in misses.items()}
    expected = plain(reranker, sequences)
    logits, batch = logits_of(reranker, sequences, cached, new.values())
    assert logits == pytest.approx(expected, abs=1e-4)
    assert batch.real_tokens <= sum(len(ids) for ids in sequences) - sum(prefix.tokens for prefix in cached.values())
    known |= {prefix: made for prefix, (_, made) in new.items()}
    logits, _ = logits_of(reranker, sequences, {i: known[prefix] for i, (prefix, _, _) in enumerate(picks)})
    assert logits == pytest.approx(expected, abs=1e-4)


def test_a_prefix_that_is_part_of_a_group_and_of_a_suffix_is_copied_whole():
    reranker = RERANKERS[None]
    start = sequence(9, 12)
    sequences = [[*start, *sequence(1, 20)], [*start, *sequence(2, 20)]]
    prefix = reranker.new_prefix(25)
    _, batch = logits_of(reranker, sequences, new=[(1, prefix)])
    assert batch.groups[0].prefix == 12
    logits, _ = logits_of(reranker, [sequences[1]], {0: prefix})
    assert logits == pytest.approx(plain(reranker, sequences[1:]), abs=1e-4)


def test_the_rest_of_a_cached_sequence_shares_its_own_prefix():
    reranker = RERANKERS[None]
    instruction, question = sequence(1, 30), sequence(2, 12)
    sequences = [[*instruction, *question, *sequence(n, 20)] for n in range(3, 8)]
    prefix = reranker.new_prefix(30)
    expected, whole = logits_of(reranker, sequences, new=[(0, prefix)])
    logits, batch = logits_of(reranker, sequences, dict.fromkeys(range(5), prefix))
    assert logits == pytest.approx(expected, abs=1e-4)
    assert whole.real_tokens - batch.real_tokens == 30
    part = batch.select([0, 2])
    assert part.real_tokens == 12 + 20 + 20
    assert reranker.logits_with_prefixes(part, [prefix], []) == pytest.approx(
        [expected[batch.members[0]], expected[batch.members[2]]], abs=1e-4
    )


@pytest.mark.parametrize("window", [None, 24, 5])
def test_chunks_fill_a_prefix_and_begin_after_one(window):
    reranker = RERANKERS[window]
    ids, prefix = sequence(1, 150), reranker.new_prefix(110)
    *_, logit = reranker.chunks(ids, 16, None, prefix)
    other = [*ids[:110], *sequence(2, 60)]
    (expected,) = plain(reranker, [other])
    assert logit == pytest.approx(plain(reranker, [ids])[0], abs=1e-4)
    assert logits_of(reranker, [other], {0: prefix})[0] == pytest.approx([expected], abs=1e-4)
    *earlier, resumed = reranker.chunks(other, 16, prefix)
    assert resumed == pytest.approx(expected, abs=1e-4)
    assert len(earlier) < len(list(reranker.chunks(other, 16))) - 4


def test_a_cached_prefix_is_never_written():
    reranker = RERANKERS[24]
    prefix = reranker.new_prefix(40)
    logits_of(reranker, [PREFIXES[2] + sequence(1, 9)], new=[(0, prefix)])
    before = copy.deepcopy(prefix)
    logits_of(reranker, [PREFIXES[2] + sequence(2, 9), PREFIXES[2] + sequence(3, 4)], {0: prefix, 1: prefix})
    list(reranker.chunks(PREFIXES[2] + sequence(2, 90), 16, prefix))
    assert torch.equal(before.keys, prefix.keys)
    assert torch.equal(before.values, prefix.values)


def test_keys_and_values_have_the_dtype_of_the_weights():
    reranker = reranker_of(torch.bfloat16)
    prefix = reranker.new_prefix(40)
    assert prefix.keys.dtype == prefix.values.dtype == torch.bfloat16
    assert prefix.keys.nbytes + prefix.values.nbytes == 40 * reranker.prefix_bytes == 40 * 2 * 3 * 16 * 2
    expected, _ = logits_of(reranker, [PREFIXES[2] + sequence(1, 9)], new=[(0, prefix)])
    logits, _ = logits_of(reranker, [PREFIXES[2] + sequence(1, 9)], {0: prefix})
    assert logits == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("pooling", [PoolingConfig(bidirectional=True), PoolingConfig(mean=True)])
def test_bidirectional_attention_and_mean_pooling_have_no_cached_prefixes(pooling):
    assert reranker_of(pooling=pooling).prefix_bytes == 0


@pytest.mark.parametrize(("kind", "caches"), [("default", True), ("yarn", True), ("dynamic", False)])
def test_frequencies_that_depend_on_the_length_have_no_cached_prefixes(kind, caches):
    ropes = {
        "default": {},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "dynamic": {"factor": 1.7},
    }
    config = tiny_config(100, head_dim=16, max_position_embeddings=256).to_dict()
    config = {name: value for name, value in config.items() if name not in ("model_type", "rope_parameters")}
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ropes[kind]}
    model = LlamaForSequenceClassification(LlamaConfig(**config, rope_parameters=rope)).eval()
    assert (RerankModel(model.base_model, model.score, CPU).prefix_bytes > 0) == caches
