"""`highlight`: the best sentence of each result in its metadata, in both frameworks."""

import asyncio

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from support import LengthReranker

import langchain_mistral_rerank
import llama_index_mistral_rerank

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
TEXTS = ["Short. The longest sentence of this passage! End.", "One sentence", "", "Two. Sentences here"]
MARKED = ["The longest sentence of this passage!", "Sentences here", "One sentence"]


def marked(instance, metadata):
    """The marked parts of the results' texts, from the framework's synchronous and asynchronous method."""
    if isinstance(instance, LANGCHAIN):
        documents = [Document(page_content=text, metadata=metadata) for text in TEXTS]
        for reranked in (
            instance.compress_documents(documents, "q"),
            asyncio.run(instance.acompress_documents(documents, "q")),
        ):
            yield [d.page_content[slice(*d.metadata["rerank_highlight"])] for d in reranked]
    else:
        nodes = [NodeWithScore(node=TextNode(text=text, metadata=metadata)) for text in TEXTS]
        for reranked in (
            instance.postprocess_nodes(nodes, query_str="q"),
            asyncio.run(instance.apostprocess_nodes(nodes, query_str="q")),
        ):
            yield [n.node.text[slice(*n.node.metadata["rerank_highlight"])] for n in reranked]


@BOTH
def test_each_result_has_its_best_sentence(adapter):
    reranker = LengthReranker()
    assert list(marked(adapter(reranker=reranker, top_n=3, highlight=True), {})) == [MARKED] * 2
    assert reranker.calls == 4  # per call of the adapter one for the ranking, and one for all sentences


@BOTH
def test_offsets_are_those_of_the_text_without_metadata(adapter):
    options = {"metadata_keys": ("title",)} if adapter is LANGCHAIN else {}
    instance = adapter(reranker=LengthReranker(), top_n=3, highlight=True, **options)
    assert list(marked(instance, {"title": "A title. Of two sentences"})) == [MARKED] * 2


@BOTH
def test_results_that_are_blended_or_blank_are_marked_too(adapter):
    instance = adapter(reranker=LengthReranker(), top_n=None, highlight=True, retriever_weight=1.0)
    items = [Document(page_content=text) for text in TEXTS]
    if adapter is LLAMA_INDEX:
        items = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    ranking = instance.rerank("q", items)
    highlights = [ranked.highlight and ranked.text[slice(*ranked.highlight)] for ranked in ranking]
    assert highlights == ["The longest sentence of this passage!", "One sentence", "Sentences here", None]


def test_llama_index_hides_the_offsets_from_models():
    nodes = [NodeWithScore(node=TextNode(text=TEXTS[0]))]
    (result,) = LLAMA_INDEX(reranker=LengthReranker(), highlight=True).postprocess_nodes(nodes, query_str="q")
    assert result.node.get_content(MetadataMode.EMBED) == result.node.get_content(MetadataMode.LLM) == TEXTS[0]
