"""Other projects' clients, unmodified, and our own remote backend and adapters, in front of one real server."""

import cohere
import pytest
import voyageai
from langchain_core.documents import Document
from langchain_nvidia_ai_endpoints import NVIDIARerank as LangChainNvidia
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.postprocessor.jinaai_rerank import JinaRerank
from llama_index.postprocessor.nvidia_rerank import NVIDIARerank as LlamaIndexNvidia
from llama_index.postprocessor.tei_rerank import TextEmbeddingInference
from server.running import running

import langchain_mistral_rerank
import llama_index_mistral_rerank
from mistral_rerank import LocalReranker, RemoteReranker

QUERY = "which is it?"
PASSAGES = ["a passage", "another one, and a longer one", "short", "", "the last of them " * 8]


@pytest.fixture(scope="module")
def served(tiny):
    """A local reranker in fp32, and the URL of a server in front of it."""
    with LocalReranker(str(tiny), device="cpu", dtype="float32", share_batches=True) as reranker:
        with running(reranker, model_id="tiny") as url:
            yield reranker, url


@pytest.fixture(scope="module")
def expected(served):
    return served[0].rank(QUERY, PASSAGES)


def documents():
    return [Document(page_content=text) for text in PASSAGES]


def nodes():
    return [NodeWithScore(node=TextNode(text=text)) for text in PASSAGES]


@pytest.mark.parametrize(
    ("protocol", "path"),
    [
        ("auto", ""),
        ("nvidia", "/v1"),
        ("cohere", ""),
        ("jina", "/v1"),
        ("vllm", ""),
        ("tei", ""),
        ("voyage", "/v1"),
    ],
)
def test_our_remote_backend_gives_the_local_scores_in_every_protocol(served, expected, protocol, path):
    with RemoteReranker("tiny", base_url=served[1] + path, protocol=protocol) as remote:
        found = remote.rank(QUERY, PASSAGES)
    assert [place.index for place in found] == [place.index for place in expected]
    for got, wanted in zip(found, expected, strict=True):
        assert got.score.logit == pytest.approx(wanted.score.logit, abs=1e-4)
        assert got.score.probability == pytest.approx(wanted.score.probability, abs=1e-4)


@pytest.mark.parametrize("backend", ["local", "remote"])
def test_both_adapters_give_the_local_scores_on_both_backends(served, expected, tiny, backend):
    settings = {
        "local": {"model": str(tiny), "device": "cpu", "dtype": "float32"},
        "remote": {"model": "tiny", "backend": "remote", "base_url": served[1]},
    }[backend]
    langchain = langchain_mistral_rerank.MistralRerank(top_n=None, **settings)
    llama_index = llama_index_mistral_rerank.MistralRerank(top_n=None, **settings)
    wanted = [(place.text, pytest.approx(place.score.probability, abs=1e-4)) for place in expected]
    found = langchain.compress_documents(documents(), QUERY)
    assert [(document.page_content, document.metadata["relevance_score"]) for document in found] == wanted
    found = llama_index.postprocess_nodes(nodes(), query_str=QUERY)
    assert [(node.node.text, node.score) for node in found] == wanted


def test_langchains_nvidia_client(served, expected):
    client = LangChainNvidia(base_url=f"{served[1]}/v1", model="tiny", top_n=3)
    found = client.compress_documents(documents(), QUERY)
    assert [document.page_content for document in found] == [place.text for place in expected[:3]]
    assert [document.metadata["relevance_score"] for document in found] == pytest.approx(
        [place.score.logit for place in expected[:3]], abs=1e-4
    )


def test_llama_indexs_nvidia_client(served, expected):
    client = LlamaIndexNvidia(base_url=f"{served[1]}/v1", model="tiny", top_n=3)
    found = client.postprocess_nodes(nodes(), query_str=QUERY)
    assert [node.node.text for node in found] == [place.text for place in expected[:3]]


@pytest.mark.parametrize("client_of", [cohere.Client, cohere.ClientV2])
def test_coheres_clients(served, expected, client_of):
    client = client_of(api_key="any", base_url=served[1])
    found = client.rerank(model="tiny", query=QUERY, documents=PASSAGES, top_n=3)
    assert [place.index for place in found.results] == [place.index for place in expected[:3]]
    assert [place.relevance_score for place in found.results] == pytest.approx(
        [place.score.probability for place in expected[:3]], abs=1e-4
    )


def test_coheres_client_raises_its_own_typed_error(served):
    with pytest.raises(cohere.NotFoundError, match="no such model"):
        cohere.ClientV2(api_key="any", base_url=served[1]).rerank(model="another", query=QUERY, documents=PASSAGES)


@pytest.mark.parametrize(
    "client_of",
    [
        lambda url: TextEmbeddingInference(base_url=url, top_n=3),
        lambda url: JinaRerank(base_url=f"{url}/v1", model="tiny", top_n=3, api_key="any"),
    ],
    ids=["tei", "jina"],
)
def test_llama_indexs_tei_and_jina_clients(served, expected, client_of):
    found = client_of(served[1]).postprocess_nodes(nodes(), query_str=QUERY)
    assert [node.node.text for node in found] == [place.text for place in expected[:3]]
    assert [node.score for node in found] == pytest.approx(
        [place.score.probability for place in expected[:3]], abs=1e-4
    )


def test_voyages_client(served, expected):
    found = voyageai.Client(api_key="any", base_url=f"{served[1]}/v1").rerank(QUERY, PASSAGES, model="tiny", top_k=3)
    assert [place.index for place in found.results] == [place.index for place in expected[:3]]
    assert [place.relevance_score for place in found.results] == pytest.approx(
        [place.score.probability for place in expected[:3]], abs=1e-4
    )
