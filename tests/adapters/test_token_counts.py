"""`token_counts`: how many tokens of each result were read and left out, in both frameworks' metadata."""

import asyncio

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode

import langchain_mistral_rerank
import llama_index_mistral_rerank

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
LONG = "The glacier moved slowly down the valley and carved the rock. " * 9
OPTIONS = {"device": "cpu", "dtype": "float32", "max_length": 60}


def metadata(instance, texts):
    """The metadata of the results by text, from the framework's synchronous and asynchronous method."""
    if isinstance(instance, LANGCHAIN):
        documents = [Document(page_content=text, metadata={"rerank_tokens": 1}) for text in texts]
        yield {d.page_content: d.metadata for d in instance.compress_documents(documents, "q")}
        yield {d.page_content: d.metadata for d in asyncio.run(instance.acompress_documents(documents, "q"))}
    else:
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        yield {n.node.text: n.node.metadata for n in instance.postprocess_nodes(nodes, query_str="q")}
        yield {n.node.text: n.node.metadata for n in asyncio.run(instance.apostprocess_nodes(nodes, query_str="q"))}


@BOTH
def test_results_have_the_counts_where_asked(adapter, tiny):
    instance = adapter(model=str(tiny), token_counts=True, **OPTIONS)
    scores = {ranked.text: ranked.score for ranked in instance.use().rank("q", ["short", LONG])}
    assert scores[LONG].tokens_left_out > 0
    for results in metadata(instance, ["short", LONG]):
        for text, score in scores.items():
            counts = (results[text]["rerank_tokens"], results[text]["rerank_tokens_left_out"])
            assert counts == (score.tokens, score.tokens_left_out)


@BOTH
def test_results_have_no_counts_otherwise(adapter, tiny):
    for results in metadata(adapter(model=str(tiny), **OPTIONS), ["short", LONG]):
        assert all(not key.startswith("rerank_") for values in results.values() for key in values)


def test_llama_index_hides_the_counts_from_models_and_from_a_second_pass(tiny):
    instance = LLAMA_INDEX(model=str(tiny), token_counts=True, **OPTIONS)
    first = instance.postprocess_nodes([NodeWithScore(node=TextNode(text=LONG))], query_str="q")
    assert first[0].node.get_content(MetadataMode.EMBED) == first[0].node.get_content(MetadataMode.LLM) == LONG
    assert instance.postprocess_nodes(first, query_str="q") == first
