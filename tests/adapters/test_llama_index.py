import json

import pytest
from llama_index.core import QueryBundle
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import ImageNode, MetadataMode, Node, NodeWithScore, TextNode
from llama_index.core.tools import RetrieverTool

from llama_index_mistral_rerank import MistralRerank
from mistral_rerank import InvalidInputError, SettingsError


@pytest.fixture
def nodes():
    return [
        NodeWithScore(node=TextNode(id_="1", text="a", metadata={"nested": {"list": [1]}}), score=0.9),
        NodeWithScore(node=TextNode(id_="2", text="cccccccccccccccccccccccccccccc"), score=0.1),
        NodeWithScore(node=TextNode(id_="3", text="bb"), score=None),
        NodeWithScore(node=TextNode(id_="3", text="bb"), score=0.5),
    ]


async def both_ways(postprocessor, nodes, query="q"):
    sync = postprocessor.postprocess_nodes(nodes, query_str=query)
    assert await postprocessor.apostprocess_nodes(nodes, query_bundle=QueryBundle(query)) == sync
    return sync


async def test_nodes_come_back_reordered_in_new_wrappers(length_reranker, nodes):
    before = [(node.score, node.node.to_json()) for node in nodes]
    reranked = await both_ways(MistralRerank(reranker=length_reranker, top_n=None), nodes)
    assert [node.node.node_id for node in reranked] == [
        "2",
        "1",
        "3",
        "3",
    ]  # "nested: ..." is read with the text
    assert all(type(node.score) is float for node in reranked)
    assert reranked[0].node is nodes[1].node
    assert reranked[0] is not nodes[1]
    json.dumps([node.to_dict() for node in reranked])
    assert [(node.score, node.node.to_json()) for node in nodes] == before


async def test_metadata_mode_decides_what_the_model_reads(length_reranker, nodes):
    postprocessor = MistralRerank(reranker=length_reranker, top_n=None, metadata_mode=MetadataMode.NONE)
    assert [node.node.node_id for node in await both_ways(postprocessor, nodes)] == ["2", "3", "3", "1"]


async def test_top_n_and_min_score(length_reranker, nodes):
    assert len(await both_ways(MistralRerank(reranker=length_reranker, top_n=2), nodes)) == 2
    assert len(await both_ways(MistralRerank(reranker=length_reranker, min_score=0.9), nodes)) == 2


async def test_an_empty_list_loads_no_model():
    assert await both_ways(MistralRerank(model="/not/there"), []) == []


def test_a_missing_query_and_a_wrong_element_are_refused(length_reranker, nodes):
    postprocessor = MistralRerank(reranker=length_reranker)
    for bundle in (None, QueryBundle(" ")):
        with pytest.raises(InvalidInputError, match="needs a query"):
            postprocessor.postprocess_nodes(nodes, query_bundle=bundle)
    with pytest.raises(InvalidInputError, match="item 0 is a TextNode"):
        postprocessor.postprocess_nodes([nodes[0].node], query_str="q")


@pytest.mark.parametrize("options", [{"topn": 3}, {"top_n": -1}, {"metadata_mode": "some"}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(SettingsError):
        MistralRerank(**options)


def test_class_and_settings_are_as_the_framework_expects():
    assert BaseNodePostprocessor in MistralRerank.__mro__
    assert MistralRerank.class_name() == "MistralRerank"
    instance = MistralRerank(top_n=3, device="cpu")
    assert MistralRerank.from_dict(instance.to_dict()).to_dict() == instance.to_dict()


class Everything(BaseRetriever):
    def __init__(self, nodes):
        super().__init__()
        self._nodes = nodes

    def _retrieve(self, query_bundle):
        return self._nodes


async def test_it_works_in_the_frameworks_query_engine(length_reranker, nodes):
    engine = RetrieverQueryEngine(
        retriever=Everything(nodes),
        response_synthesizer=get_response_synthesizer(llm=MockLLM(), response_mode=ResponseMode.COMPACT),
        node_postprocessors=[MistralRerank(reranker=length_reranker, top_n=1)],
    )
    assert [node.node.node_id for node in engine.query("q").source_nodes] == ["2"]
    assert [node.node.node_id for node in (await engine.aquery("q")).source_nodes] == ["2"]


async def test_a_real_model_behind_it_ranks_as_the_core_does(tiny, tiny_reranker, facts):
    texts = list(facts.corpus.values())[:12]
    postprocessor = MistralRerank(model=str(tiny), device="cpu", dtype="float32", batch_tokens=400, top_n=None)
    reranked = await both_ways(postprocessor, [NodeWithScore(node=TextNode(text=text)) for text in texts], "who?")
    expected = tiny_reranker.rank("who?", texts)
    assert [(node.node.text, node.score) for node in reranked] == [
        (ranked.text, ranked.score.probability) for ranked in expected
    ]


async def test_it_works_in_citations_a_chat_and_a_tool(length_reranker, nodes):
    retriever, options = Everything(nodes), {"node_postprocessors": [MistralRerank(reranker=length_reranker, top_n=1)]}
    retriever_tool = RetrieverTool.from_defaults(retriever, name="facts", **options)
    assert "cccc" in str(retriever_tool("q"))
    assert "cccc" in str(await retriever_tool.acall("q"))
    citing = CitationQueryEngine(retriever=retriever, llm=MockLLM(), **options)
    assert len(citing.query("q").source_nodes) == 1
    chat = ContextChatEngine.from_defaults(retriever=retriever, llm=MockLLM(), **options)
    assert [node.node.node_id for node in chat.chat("q").source_nodes] == ["2"]
    assert [node.node.node_id for node in (await chat.achat("q")).source_nodes] == ["2"]


async def test_a_node_without_text_comes_last_with_probability_0(length_reranker):
    nodes = [NodeWithScore(node=node) for node in (ImageNode(image="aGk="), Node(), TextNode(text="words"))]
    reranked = await both_ways(MistralRerank(reranker=length_reranker, top_n=None), nodes)
    assert [type(node.node) for node in reranked] == [TextNode, ImageNode, Node]
    assert [node.score for node in reranked][1:] == [0.0, 0.0]


async def test_any_sequence_of_nodes_will_do(length_reranker, nodes):
    instance = MistralRerank(reranker=length_reranker, top_n=1)
    assert instance.postprocess_nodes(tuple(nodes), query_str="q") == instance.postprocess_nodes(nodes, query_str="q")


def test_every_option_survives_the_frameworks_serialization():
    instance = MistralRerank(model="m", top_n=None, metadata_mode=MetadataMode.ALL, keep_retrieval_score=True)
    assert MistralRerank.from_dict(instance.to_dict()).to_dict() == instance.to_dict()
    assert MistralRerank.from_json(instance.to_json()).to_dict() == instance.to_dict()
