"""Beside NVIDIA's own adapters, unmodified, on one server."""

import pytest
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank as LangChainNvidia
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank as LlamaIndexNvidia
from remote.endpoint import Endpoint, expected, gives, speaks

from mistral_rerank import open_reranker

MODEL = "nvidia/llama-nemotron-rerank-1b-v2"
PASSAGES = [f"passage {number}" for number in range(20)]


@pytest.fixture
def nim():
    models = gives(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "root": MODEL}]})
    response = speaks("nvidia")
    with Endpoint(lambda exchange: (models if exchange.request.method == "GET" else response)(exchange)) as endpoint:
        yield endpoint


def ours(nim, **settings):
    with open_reranker(MODEL, backend="remote", base_url=f"{nim.url}/v1", protocol="nvidia", **settings) as reranker:
        return [place.text for place in reranker.rank("which?", PASSAGES)], nim.bodies[-1]


@pytest.mark.parametrize(("truncate", "overflow"), [("END", "truncate"), ("NONE", "error")])
def test_langchain_sends_the_same_body_and_gets_the_same_order(nim, truncate, overflow):
    baseline = LangChainNvidia(base_url=f"{nim.url}/v1", model=MODEL, top_n=20, truncate=truncate)
    documents = baseline.compress_documents([Document(page_content=text) for text in PASSAGES], "which?")
    theirs = nim.bodies[-1]
    order, body = ours(nim, overflow=overflow)
    assert body == theirs
    assert order == [document.page_content for document in documents] == [p.text for p in expected(PASSAGES)]


@pytest.mark.parametrize(("truncate", "overflow"), [("END", "truncate"), ("NONE", "error")])
def test_llama_index_sends_the_same_body_and_gets_the_same_order(nim, truncate, overflow):
    baseline = LlamaIndexNvidia(base_url=f"{nim.url}/v1", model=MODEL, top_n=20, truncate=truncate)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    found = baseline.postprocess_nodes(nodes, query_str="which?")
    theirs = nim.bodies[-1]
    order, body = ours(nim, overflow=overflow)
    assert body == theirs
    assert order == [node.node.text for node in found]
