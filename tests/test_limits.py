"""Limits of a passage: `PassageLimits`, and Cohere's names for them on the wire."""

import httpx
import pytest
from remote.endpoint import Endpoint, speaks
from server.running import running

from mistral_rerank import InvalidInputError, LocalReranker, PassageLimits, RemoteReranker
from mistral_rerank.protocols import PROTOCOLS

LONG = "The glacier moved slowly down the valley and carved the rock. " * 9
HUGE = LONG * 400


@pytest.fixture(scope="module")
def reranker(tiny):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", max_length=100) as opened:
        yield opened


def score(reranker, passage, overflow=None, **limits):
    (result,) = reranker.score_pairs([("q", passage)], overflow=overflow, limits=PassageLimits(**limits))
    return result


def test_a_passage_is_read_up_to_its_limit_of_tokens(reranker):
    empty = score(reranker, "x", tokens=1).tokens - 1  # of the template and the question
    whole = score(reranker, LONG, "truncate", tokens=10**6).tokens
    for overflow in ("truncate", "chunk", "error"):
        cut = score(reranker, LONG, overflow, tokens=20)
        assert cut.tokens == empty + 20
        assert cut.tokens_left_out > 0
    assert whole == 100
    assert score(reranker, "short", tokens=20).tokens_left_out == 0


@pytest.mark.parametrize("overflow", ["truncate", "chunk", "error"])
def test_a_huge_passage_is_cut_to_the_same_tokens(reranker, overflow):
    cut, huge = (score(reranker, passage, overflow, tokens=20) for passage in (LONG, HUGE))
    assert (huge, huge.tokens) == (cut, cut.tokens)
    assert huge.tokens_left_out > 300 * cut.tokens_left_out


def test_a_limit_above_the_models_leaves_the_overflow_as_it_is(reranker):
    plain = reranker.score_pairs([("q", LONG)])[0]
    assert score(reranker, LONG, tokens=90) == plain
    with pytest.raises(InvalidInputError, match="exceeds maximum allowed token size 100"):
        score(reranker, LONG, "error", tokens=99)


def test_at_most_so_many_chunks_are_scored(reranker):
    (all_chunks,) = reranker.score_pairs([("q", LONG)], overflow="chunk")
    one, two, many = (score(reranker, LONG, chunks=number) for number in (1, 2, 50))
    assert one == reranker.score_pairs([("q", LONG)])[0]  # the first chunk is what truncation leaves
    assert (many, many.tokens, many.tokens_left_out) == (all_chunks, all_chunks.tokens, 0)
    assert one.tokens_left_out > two.tokens_left_out > 0
    assert 100 < two.tokens <= 200
    assert score(reranker, HUGE, chunks=2) == two


def test_calls_with_limits_and_without_may_share_a_cache(tiny):
    with LocalReranker(str(tiny), device="cpu", dtype="float32", max_length=100, cache_size=9) as reranker:
        assert reranker.score_pairs([("q", LONG)])[0].tokens == 100
        assert score(reranker, LONG, tokens=20).tokens < 100


@pytest.mark.parametrize("limits", [{"tokens": 0}, {"chunks": 0}, {"tokens": -1}])
def test_limits_are_positive(limits):
    with pytest.raises(InvalidInputError, match="at least 1"):
        PassageLimits(**limits)


def test_coheres_names_are_read_and_written():
    body = {"query": "q", "documents": ["a"], "max_tokens_per_doc": 512, "max_chunks_per_doc": "3"}
    for name in ("cohere", "jina", "vllm"):
        assert PROTOCOLS[name].read_request(body).limits == PassageLimits(tokens=512, chunks=3)
    assert PROTOCOLS["cohere"].read_request({"query": "q", "documents": ["a"]}).limits is None
    with Endpoint(speaks("cohere")) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="cohere") as remote:
            remote.rank("q", ["a", "b"], limits=PassageLimits(tokens=512))
    assert endpoint.bodies[0]["max_tokens_per_doc"] == 512
    assert "max_chunks_per_doc" not in endpoint.bodies[0]


def test_other_protocols_refuse_limits():
    with Endpoint(speaks("nvidia")) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia") as remote:
            with pytest.raises(InvalidInputError, match="'nvidia' has no limits"):
                remote.rank("q", ["a"], limits=PassageLimits(tokens=512))
    assert endpoint.bodies == []


def test_the_server_cuts_passages_as_cohere_does(reranker):
    body = {"query": "q", "documents": [LONG]}
    with running(reranker) as url:
        whole, cut, chunks = (
            httpx.post(f"{url}/v2/rerank", json=body | limits, timeout=60).json()["results"][0]
            for limits in ({}, {"max_tokens_per_doc": 20}, {"max_chunks_per_doc": 2})
        )
    assert cut["tokens"] < whole["tokens"] == 100 < chunks["tokens"]
    assert cut["tokens_left_out"] > whole["tokens_left_out"] > chunks["tokens_left_out"]
