"""What a call used: tokens and billed units, in results and in traces."""

import asyncio

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.schema import NodeWithScore, TextNode
from remote.endpoint import Endpoint, gives, speaks

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import RemoteReranker
from mistral_rerank._telemetry import result_attributes
from mistral_rerank.scores import Usage

PASSAGES = ["one", "two", "three"]


def test_local_calls_count_the_tokens_of_all_passages(tiny_reranker):
    ranking = tiny_reranker.rank("q", [*PASSAGES, " "], top_n=1)
    tokens = sum(score.tokens for score in tiny_reranker.score_pairs([("q", passage) for passage in PASSAGES]))
    assert ranking.usage == Usage(tokens=tokens)
    assert asyncio.run(tiny_reranker.arank("q", PASSAGES)).usage == Usage(tokens=tokens)


RESULTS = [{"index": index, "relevance_score": 0.5} for index in range(3)]


@pytest.mark.parametrize(
    ("protocol", "body", "headers", "expected"),
    [
        ("jina", {"results": RESULTS, "usage": {"total_tokens": 21}}, {}, Usage(21)),
        ("voyage", {"data": RESULTS, "usage": {"total_tokens": 21}}, {}, Usage(21)),
        ("vllm", {"results": RESULTS, "usage": {"prompt_tokens": 21, "total_tokens": 21}}, {}, Usage(21)),
        ("cohere", {"results": RESULTS, "meta": {"billed_units": {"search_units": 1.0}}}, {}, Usage(0, 1)),
        ("cohere", {"results": RESULTS, "meta": {"tokens": {"input_tokens": 21}, "billed_units": None}}, {}, Usage(21)),
        ("tei", [{"index": index, "score": 0.5} for index in range(3)], {"x-compute-tokens": "21"}, Usage(21)),
        ("jina", {"results": RESULTS, "usage": {"total_tokens": "many"}, "meta": [1]}, {}, Usage()),
    ],
)
def test_an_endpoints_own_counts_arrive(protocol, body, headers, expected):
    with Endpoint(gives(200, body, headers)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol=protocol) as reranker:
            assert reranker.rank("q", PASSAGES).usage == expected


def test_the_requests_of_a_call_are_added_up():
    with Endpoint(speaks("cohere")) as endpoint:  # each reply says 1 token and 1 search unit
        with RemoteReranker("m", base_url=endpoint.url, protocol="cohere", max_passages=1) as reranker:
            assert reranker.rank("q", PASSAGES).usage == Usage(tokens=3, search_units=3)


def test_a_refused_batch_counts_with_its_parts():
    with Endpoint(speaks("vllm", most=2)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="vllm") as reranker:
            assert reranker.rank("q", PASSAGES).usage.tokens == len(endpoint.bodies) - 1 == 2


def test_traces_have_the_counts(tiny_reranker):
    ranking = tiny_reranker.rank("q", PASSAGES)
    assert result_attributes(ranking)["gen_ai.usage.input_tokens"] == ranking.usage.tokens
    ranking.usage = Usage(search_units=2)
    attributes = result_attributes(ranking)
    assert attributes["mistral_rerank.search_units"] == 2
    assert "gen_ai.usage.input_tokens" not in attributes


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.outputs = []

    def on_chain_end(self, outputs, **_):
        self.outputs.append(outputs)


def test_langchain_has_the_counts_in_the_outputs_of_the_run(tiny_reranker):
    recorder = Recorder()
    compressor = langchain_mistral_rerank.MistralRerank(reranker=tiny_reranker)
    documents = [Document(page_content=text) for text in PASSAGES]
    compressor.compress_documents(documents, "q", callbacks=[recorder])
    tokens = compressor.rerank("q", documents).usage.tokens
    (outputs,) = recorder.outputs
    assert outputs["usage_metadata"] == {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}


def test_llama_index_has_the_counts_in_its_event_and_callback(tiny_reranker, monkeypatch):
    events = []
    dispatcher = llama_index_mistral_rerank.rerank.dispatcher
    monkeypatch.setattr(type(dispatcher), "event", lambda _, event, **__: events.append(event))
    handler = LlamaDebugHandler(print_trace_on_end=False)
    postprocessor = llama_index_mistral_rerank.MistralRerank(reranker=tiny_reranker)
    postprocessor.callback_manager = CallbackManager([handler])
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    postprocessor.postprocess_nodes(nodes, query_str="q")
    tokens = postprocessor.rerank("q", nodes).usage.tokens
    assert [event.tags for event in events if event.class_name() == "ReRankEndEvent"] == [{"total_tokens": tokens}]
    ((_, end),) = handler.get_event_pairs(CBEventType.RERANKING)
    assert end.payload["additional_kwargs"] == {"total_tokens": tokens}
