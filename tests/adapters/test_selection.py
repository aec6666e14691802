"""`max_gap`, `retriever_weight` and `diversity` in both frameworks."""

import asyncio

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import InvalidInputError, SettingsError

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
SCORED = {"a": 0.9, "ccc": 0.1, "bb": 0.8}
"""Texts with the retriever's scores; the stand-in's logits are 1, 3 and 2."""


def texts(instance, scores):
    """The texts of the results, from the framework's synchronous and asynchronous method."""
    if isinstance(instance, LANGCHAIN):
        documents = [
            Document(page_content=text, metadata={} if score is None else {"score": score})
            for text, score in scores.items()
        ]
        yield [d.page_content for d in instance.compress_documents(documents, "q")]
        yield [d.page_content for d in asyncio.run(instance.acompress_documents(documents, "q"))]
    else:
        nodes = [NodeWithScore(node=TextNode(text=text), score=score) for text, score in scores.items()]
        yield [n.node.text for n in instance.postprocess_nodes(nodes, query_str="q")]
        yield [n.node.text for n in asyncio.run(instance.apostprocess_nodes(nodes, query_str="q"))]


@BOTH
@pytest.mark.parametrize(
    ("options", "scores", "expected"),
    [
        ({"max_gap": 1.0}, SCORED, ["ccc", "bb"]),
        ({"retriever_weight": 1.0}, SCORED, ["a", "bb", "ccc"]),
        ({"retriever_weight": 0.45}, SCORED, ["bb", "ccc", "a"]),
        ({"retriever_weight": 1.0}, dict.fromkeys(SCORED), ["a", "ccc", "bb"]),  # by rank
        ({"retriever_weight": 1.0, "top_n": 1}, SCORED, ["a"]),
        ({"retriever_weight": 1.0, "top_n": 0}, SCORED, []),
        ({"retriever_weight": 1.0, "max_gap": 1.0}, SCORED, ["bb", "ccc"]),
        ({"retriever_weight": 1.0, "min_score": 0.8}, SCORED, ["bb", "ccc"]),
    ],
)
def test_results_are_blended_and_then_selected(adapter, length_reranker, options, scores, expected):
    instance = adapter(**{"reranker": length_reranker, "top_n": None} | options)
    assert list(texts(instance, scores)) == [expected] * 2


@BOTH
def test_probabilities_stay_the_rerankers(adapter, length_reranker):
    items = [Document(page_content=text) for text in SCORED]
    if adapter is LLAMA_INDEX:
        items = [NodeWithScore(node=TextNode(text=text)) for text in SCORED]
    plain = adapter(reranker=length_reranker).rerank("q", items)
    blended = adapter(reranker=length_reranker, retriever_weight=1.0).rerank("q", items)
    assert {ranked.text: ranked.score for ranked in blended} == {ranked.text: ranked.score for ranked in plain}


@BOTH
def test_max_gap_can_be_given_for_one_call(adapter, length_reranker):
    items = [Document(page_content=text) for text in SCORED]
    if adapter is LLAMA_INDEX:
        items = [NodeWithScore(node=TextNode(text=text)) for text in SCORED]
    assert [ranked.text for ranked in adapter(reranker=length_reranker).rerank("q", items, max_gap=0.5)] == ["ccc"]


@BOTH
def test_options_of_one_call_are_checked_before_anything_is_scored(adapter, length_reranker):
    instance = adapter(reranker=length_reranker, retriever_weight=0.5)
    items = [Document(page_content="a")] if adapter is LANGCHAIN else [NodeWithScore(node=TextNode(text="a"))]
    for options in ({"top_n": -1}, {"min_score": 2}, {"max_gap": -1}, {"deadline": 0}):
        with pytest.raises(InvalidInputError, match=next(iter(options))):
            instance.rerank("q", items, **options)
    assert length_reranker.calls == 0


@BOTH
def test_options_out_of_range_are_refused(adapter):
    for options in ({"max_gap": -1}, {"retriever_weight": 1.5}, {"retriever_weight": -0.1}):
        with pytest.raises(SettingsError, match=next(iter(options))):
            adapter(**options)


def test_langchain_reads_the_score_under_the_given_key(length_reranker):
    documents = [Document(page_content=text, metadata={"bm25": score}) for text, score in SCORED.items()]
    compressor = LANGCHAIN(reranker=length_reranker, retriever_weight=1.0, retriever_score_key="bm25")
    assert [d.page_content for d in compressor.compress_documents(documents, "q")] == ["a", "bb", "ccc"]


REPEATED = ["the long glacier", "the glacier", "rocks"]
"""By length the order of the input; the second repeats words of the first."""


@BOTH
def test_results_that_repeat_earlier_ones_fall_back(adapter, length_reranker):
    scores = dict.fromkeys(REPEATED)
    options = {"reranker": length_reranker, "diversity": 0.5}
    assert list(texts(adapter(**options), scores)) == [["the long glacier", "rocks", "the glacier"]] * 2
    assert list(texts(adapter(**options, top_n=2), scores)) == [["the long glacier", "rocks"]] * 2
    assert list(texts(adapter(**options, max_gap=6.0), scores)) == [["the long glacier", "the glacier"]] * 2
    assert list(texts(adapter(reranker=length_reranker), scores)) == [REPEATED] * 2


def test_llama_index_compares_embeddings_where_all_nodes_have_one(length_reranker):
    vectors = ([1.0, 0.0], [0.0, 1.0], [1.0, 0.1])
    nodes = [
        NodeWithScore(node=TextNode(text=text, embedding=vector))
        for text, vector in zip(REPEATED, vectors, strict=True)
    ]
    reranked = LLAMA_INDEX(reranker=length_reranker, diversity=0.5).postprocess_nodes(nodes, query_str="q")
    assert [n.node.text for n in reranked] == REPEATED
