import numpy as np
import pytest

from mistral_rerank import InvalidInputError
from mistral_rerank.evaluation.bi_encoder import BiEncoderReranker


class Lengths:
    """Questions point along their length, passages along theirs plus one."""

    def __init__(self):
        self.texts = []

    def encode(self, texts, kind, *, progress):
        self.texts += [(kind, text) for text in texts]
        return np.array([[len(text) + (kind == "passage"), 1.0] for text in texts], dtype=np.float32)


def test_a_score_is_the_product_of_the_vectors_and_no_text_is_encoded_twice():
    encoder = Lengths()
    reranker = BiEncoderReranker("lengths", encoder)
    assert [s.logit for s in reranker.score_pairs([("ab", "x"), ("ab", "xyz"), ("c", "x")])] == [5.0, 9.0, 3.0]
    assert [s.logit for s in reranker.score_pairs([("c", "xyz"), ("c", "new")])] == [5.0, 5.0]
    assert sorted(encoder.texts) == [("passage", "new"), ("passage", "x"), ("passage", "xyz"), ("query", "ab"), ("query", "c")]  # fmt: skip


async def test_it_ranks_like_any_reranker():
    reranker = BiEncoderReranker("lengths", Lengths())
    assert [place.index for place in await reranker.arank("q", ["a", "ccc", "bb"])] == [1, 2, 0]
    assert reranker.model_name == "lengths"
    with pytest.raises(InvalidInputError):
        reranker.score_pairs([(" ", "x")])


def test_pairs_may_come_from_a_generator():
    reranker = BiEncoderReranker("lengths", Lengths())
    pairs = [("who?", "me"), ("who?", "you")]
    assert reranker.score_pairs(pair for pair in pairs) == reranker.score_pairs(pairs)
