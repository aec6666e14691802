"""Both adapters with a remote backend: one setting away from a local one."""

import asyncio

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from remote.endpoint import Endpoint, expected, gives, speaks

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import RemoteReranker
from mistral_rerank.errors import AuthenticationError

LANGCHAIN, LLAMA_INDEX = langchain_mistral_rerank.MistralRerank, llama_index_mistral_rerank.MistralRerank
BOTH = pytest.mark.parametrize("adapter", [LANGCHAIN, LLAMA_INDEX], ids=["langchain", "llama_index"])
PASSAGES = [f"passage {number}" for number in range(40)]


def both_ways(adapter):
    """The texts and scores that the framework's own methods give, synchronous and asynchronous."""
    if isinstance(adapter, LANGCHAIN):
        items = [Document(page_content=text) for text in PASSAGES]
        return [
            [(d.page_content, d.metadata["relevance_score"]) for d in reranked]
            for reranked in (
                adapter.compress_documents(items, "q"),
                asyncio.run(adapter.acompress_documents(items, "q")),
            )
        ]
    items = [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]
    return [
        [(n.node.text, n.score) for n in reranked]
        for reranked in (
            adapter.postprocess_nodes(items, query_str="q"),
            asyncio.run(adapter.apostprocess_nodes(items, query_str="q")),
        )
    ]


@BOTH
def test_the_environment_alone_moves_an_adapter_to_an_endpoint(adapter, monkeypatch):
    right = [(ranked.text, ranked.score.probability) for ranked in expected(PASSAGES)][:3]
    with Endpoint(speaks("nvidia")) as endpoint:
        monkeypatch.setenv("MISTRAL_RERANK_BACKEND", "remote")
        monkeypatch.setenv("MISTRAL_RERANK_BASE_URL", endpoint.url)
        monkeypatch.setenv("MISTRAL_RERANK_MODEL", "m")
        instance = adapter(top_n=3)
        assert both_ways(instance) == [right, right]
        assert isinstance(instance.use(), RemoteReranker)


@BOTH
def test_adapters_with_equal_settings_share_connections_and_with_other_keys_do_not(adapter):
    settings = {"backend": "remote", "base_url": "http://h"}
    first, second = adapter(**settings, api_key="a"), adapter(**settings, api_key="a")
    assert first.use() is second.use()
    assert adapter(**settings, api_key="b").use() is not first.use()


@BOTH
def test_an_endpoints_refusal_reaches_the_caller_as_it_is(adapter):
    with Endpoint(gives(401, {"detail": "who are you?"})) as endpoint:
        instance = adapter(backend="remote", base_url=endpoint.url)
        with pytest.raises(AuthenticationError, match="who are you"):
            both_ways(instance)
