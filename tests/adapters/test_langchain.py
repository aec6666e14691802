import copy
import json
from typing import TypedDict

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker, DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.load import dumps, loads
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import create_retriever_tool
from langgraph.graph import END, START, StateGraph

from langchain_mistral_rerank import MistralCrossEncoder, MistralRerank
from mistral_rerank import InvalidInputError, SettingsError


class Note(Document):
    """A document class of a user's own."""


@pytest.fixture
def documents():
    return [
        Document(page_content="a", id="1", metadata={"nested": {"list": [1]}, "relevance_score": 99}),
        Note(page_content="ccc", id="2"),
        Document(page_content="bb", metadata={"source": "s"}),
        Document(page_content="a", id="1"),
    ]


async def both_ways(compressor, documents, query="q"):
    sync = compressor.compress_documents(documents, query)
    assert await compressor.acompress_documents(documents, query) == sync
    return sync


async def test_documents_come_back_reordered_with_ids_classes_and_scores(length_reranker, documents):
    reranked = await both_ways(MistralRerank(reranker=length_reranker, top_n=None), documents)
    assert [(document.page_content, document.id) for document in reranked] == [
        ("ccc", "2"),
        ("bb", None),
        ("a", "1"),
        ("a", "1"),
    ]
    assert type(reranked[0]) is Note
    assert [document.metadata["relevance_score"] for document in reranked] == pytest.approx(
        [0.9526, 0.8808, 0.7311, 0.7311], abs=1e-4
    )
    assert json.loads(json.dumps([document.metadata for document in reranked]))[2]["nested"] == {"list": [1]}


async def test_inputs_are_not_touched_and_share_nothing_with_the_outputs(length_reranker, documents):
    before = copy.deepcopy(documents)
    reranked = await both_ways(MistralRerank(reranker=length_reranker, top_n=None), documents)
    reranked[2].metadata["nested"]["list"].append(2)
    reranked[1].metadata["new"] = True
    assert documents == before


async def test_top_n_and_min_score(length_reranker, documents):
    assert len(await both_ways(MistralRerank(reranker=length_reranker, top_n=2), documents)) == 2
    assert await both_ways(MistralRerank(reranker=length_reranker, top_n=0), documents) == []
    relevant = await both_ways(MistralRerank(reranker=length_reranker, min_score=0.9), documents)
    assert [document.page_content for document in relevant] == ["ccc"]


async def test_an_empty_list_loads_no_model():
    assert await both_ways(MistralRerank(model="/not/there"), []) == []


@pytest.mark.parametrize("options", [{"topn": 3}, {"top_n": -1}, {"min_score": 2}, {"dtype": "int7"}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(SettingsError):
        MistralRerank(**options)


def test_a_blank_query_and_a_wrong_element_are_refused(length_reranker, documents):
    compressor = MistralRerank(reranker=length_reranker)
    with pytest.raises(ValueError, match="question is empty"):
        compressor.compress_documents(documents, " ")
    with pytest.raises(InvalidInputError, match="item 1 is a str"):
        compressor.compress_documents([documents[0], "text"], "q")


class Everything(BaseRetriever):
    documents: list[Document]

    def _get_relevant_documents(self, query, *, run_manager):
        return self.documents


async def test_it_works_in_the_frameworks_retriever_and_pipeline(length_reranker, documents):
    base = Everything(documents=documents)
    alone = MistralRerank(reranker=length_reranker, top_n=2)
    for compressor in (alone, DocumentCompressorPipeline(transformers=[alone])):
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=base)
        reranked = retriever.invoke("q")
        assert [document.page_content for document in reranked] == ["ccc", "bb"]
        assert await retriever.ainvoke("q") == reranked


async def test_a_real_model_behind_it_ranks_as_the_core_does(tiny, tiny_reranker, facts):
    texts = list(facts.corpus.values())[:12]
    compressor = MistralRerank(model=str(tiny), device="cpu", dtype="float32", batch_tokens=400, top_n=None)
    reranked = await both_ways(compressor, [Document(page_content=text) for text in texts], "who?")
    expected = tiny_reranker.rank("who?", texts)
    assert [document.page_content for document in reranked] == [ranked.text for ranked in expected]
    assert [document.metadata["relevance_score"] for document in reranked] == [
        ranked.score.probability for ranked in expected
    ]


async def test_metadata_keys_and_text_fn_decide_what_the_model_reads(length_reranker):
    documents = [Document(page_content="aa", metadata={"title": "t"}), Document(page_content="b" * 9)]
    instance = MistralRerank(reranker=length_reranker, metadata_keys=("title", "absent"))
    assert instance.rerank("q", documents, top_n=None)[0].text == "title: t\naa"
    assert [d.page_content for d in await both_ways(instance, documents)] == ["aa", "b" * 9]
    instance = MistralRerank(reranker=length_reranker, text_fn=lambda document: document.page_content[:1])
    assert [ranked.text for ranked in instance.rerank("q", documents)] == ["a", "b"]


async def test_as_a_runnable_it_batches_retries_and_falls_back(length_reranker, documents):
    instance = MistralRerank(reranker=length_reranker, top_n=1)
    runnable, request = instance.as_runnable(), {"query": "q", "documents": documents}
    expected = instance.compress_documents(documents, "q")
    assert runnable.invoke(request) == await runnable.ainvoke(request) == expected
    assert runnable.batch([request, request]) == await runnable.abatch([request, request]) == [expected, expected]
    broken = MistralRerank(model="/not/there", device="cpu").as_runnable()
    assert broken.with_retry(stop_after_attempt=2).with_fallbacks([runnable]).invoke(request) == expected


def test_the_cross_encoder_works_in_langchains_cross_encoder_reranker(length_reranker, documents):
    compressor = CrossEncoderReranker(model=MistralCrossEncoder(reranker=length_reranker), top_n=2)
    assert [document.page_content for document in compressor.compress_documents(documents, "q")] == ["ccc", "bb"]
    assert MistralCrossEncoder().score([]) == []
    assert MistralCrossEncoder(reranker=length_reranker).score([("q", "")]) == [0.5]


def test_it_survives_langchains_serialization():
    instance = MistralRerank(model="m", top_n=None, min_score=0.25, metadata_keys=("title",), score_key="s")
    text = dumps(instance)
    with pytest.raises(ValueError, match="not allowed"):
        loads(text, allowed_objects="core")
    again = loads(text, allowed_objects=[MistralRerank], valid_namespaces=["langchain_mistral_rerank"])
    assert again == instance


async def test_it_works_as_a_tool_and_in_a_chain(length_reranker, documents):
    compressor = MistralRerank(reranker=length_reranker, top_n=1)
    retriever = ContextualCompressionRetriever(
        base_compressor=compressor, base_retriever=Everything(documents=documents)
    )
    tool = create_retriever_tool(retriever, "facts", "finds facts")
    assert tool.invoke({"query": "q"}) == await tool.ainvoke({"query": "q"}) == "ccc"
    chain = retriever | (lambda documents: [document.id for document in documents])
    assert chain.invoke("q") == ["2"]


class State(TypedDict):
    query: str
    documents: list[Document]


async def test_it_works_as_the_retrieval_step_of_a_graph(length_reranker, documents):
    compressor = MistralRerank(reranker=length_reranker, top_n=1)

    async def rerank(state: State):
        return {"documents": await compressor.acompress_documents(state["documents"], state["query"])}

    graph = StateGraph(State)
    graph.add_node("rerank", rerank)
    graph.add_edge(START, "rerank")
    graph.add_edge("rerank", END)
    state = await graph.compile().ainvoke({"query": "q", "documents": documents})
    assert [document.page_content for document in state["documents"]] == ["ccc"]
