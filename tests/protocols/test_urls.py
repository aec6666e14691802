import pytest

from mistral_rerank import SettingsError
from mistral_rerank.protocols import PROTOCOLS
from mistral_rerank.protocols.urls import candidates, clean_url, request_url, vendor_of

HOSTED = "https://ai.api.nvidia.com/v1/retrieval/nvidia"


@pytest.mark.parametrize(
    ("base_url", "protocol", "expected"),
    [
        ("http://nim:8000", "nvidia", "http://nim:8000/v1/ranking"),
        ("http://nim:8000/", "nvidia", "http://nim:8000/v1/ranking"),
        ("http://nim:8000/v1", "nvidia", "http://nim:8000/v1/ranking"),
        ("http://nim:8000/v1//", "nvidia", "http://nim:8000/v1/ranking"),
        ("https://proxy/team/nim", "nvidia", "https://proxy/team/nim/v1/ranking"),
        ("https://proxy/team/v1/ranking/", "nvidia", "https://proxy/team/v1/ranking"),
        ("https://proxy/x/reranking", "nvidia", "https://proxy/x/reranking"),
        ("http://[::1]:8000", "nvidia", "http://[::1]:8000/v1/ranking"),
        ("https://api.cohere.com", "cohere", "https://api.cohere.com/v2/rerank"),
        ("https://api.cohere.com/v1", "cohere", "https://api.cohere.com/v1/rerank"),
        ("https://api.jina.ai/v1", "jina", "https://api.jina.ai/v1/rerank"),
        ("http://vllm:8000", "vllm", "http://vllm:8000/v1/rerank"),
        ("http://vllm:8000/rerank", "vllm", "http://vllm:8000/rerank"),
        ("http://tei:8080", "tei", "http://tei:8080/rerank"),
        ("http://tei:8080/v1", "tei", "http://tei:8080/rerank"),
        ("https://proxy/team/v1/", "tei", "https://proxy/team/rerank"),
        ("http://ovms:8000/v3", "jina", "http://ovms:8000/v3/rerank"),
        ("http://ovms:8000/v3/rerank", "cohere", "http://ovms:8000/v3/rerank"),
        ("https://x/compatible-api/v1/reranks", "cohere", "https://x/compatible-api/v1/reranks"),
        ("https://x/endpoints/e/invocations", "tei", "https://x/endpoints/e/invocations"),
        ("https://azure/v1?api-version=2", "jina", "https://azure/v1/rerank?api-version=2"),
        ("https://azure?api-version=2", "tei", "https://azure/rerank?api-version=2"),
        ("https://azure/v1/rerank/?api-version=2", "cohere", "https://azure/v1/rerank?api-version=2"),
        ("https://api.voyageai.com/v1", "voyage", "https://api.voyageai.com/v1/rerank"),
    ],
)
def test_every_form_of_base_url_leads_to_the_route(base_url, protocol, expected):
    assert request_url(clean_url(base_url), PROTOCOLS[protocol], "m") == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, f"{HOSTED}/reranking"),
        ("nvidia/rerank-qa-mistral-4b", f"{HOSTED}/reranking"),
        ("nv-rerank-qa-mistral-4b:1", f"{HOSTED}/reranking"),
        ("nvidia/nv-rerankqa-mistral-4b-v3", f"{HOSTED}/nv-rerankqa-mistral-4b-v3/reranking"),
        ("nvidia/llama-3.2-nv-rerankqa-1b-v2", f"{HOSTED}/llama-3_2-nv-rerankqa-1b-v2/reranking"),
        ("nvidia/llama-nemotron-rerank-1b-v2", f"{HOSTED}/llama-nemotron-rerank-1b-v2/reranking"),
    ],
)
@pytest.mark.parametrize("base_url", [None, "https://ai.api.nvidia.com", "https://ai.api.nvidia.com/v1/"])
def test_nvidias_hosted_api_has_a_route_for_each_model(base_url, model, expected):
    assert [url for _, url in candidates(base_url, "nvidia", model)] == [expected]
    assert [url for _, url in candidates(base_url, "auto", model)] == [expected]


@pytest.mark.parametrize(
    "base_url",
    [
        "nim:8000",
        "localhost",
        "ftp://nim",
        "http://",
        "http://user:hunter2@nim",
        "http://nim?key=hunter2",
        "http://nim/v1/rerank?api-version=1&code=hunter2",
        "http://nim?subscription-key=hunter2",
        "http://nim#hunter2",
        "http://nim:99999",
    ],
)
def test_a_base_url_that_cannot_be_meant_is_refused_without_repeating_secrets(base_url):
    with pytest.raises(SettingsError, match="base_url") as refused:
        candidates(base_url, "auto", None)
    assert "hunter2" not in str(refused.value)


def test_auto_tries_nvidias_order_then_the_routes_of_other_servers():
    tried = [(protocol.name, url) for protocol, url in candidates("http://h/v1", "auto", "m")]
    assert tried == [
        ("nvidia", "http://h/v1/ranking"),
        ("jina", "http://h/v1/rerank"),
        ("nvidia", "http://h/v1/ranking/m"),
        ("nvidia", "http://h/v1/retrieval/m/reranking"),
        ("jina", "http://h/rerank"),
        ("tei", "http://h/rerank"),
        ("jina", "http://h/v1/reranking"),
        ("jina", "http://h/reranking"),
        ("jina", "http://h/v1/reranks"),
        ("jina", "http://h/v3/rerank"),
    ]


def test_auto_keeps_the_query_and_quotes_the_model():
    urls = [url for _, url in candidates("http://h?api-version=2", "auto", "a model?")]
    assert all(url.endswith("?api-version=2") and url.count("?") == 1 for url in urls)
    assert "http://h/v1/ranking/a%20model%3F?api-version=2" in urls


@pytest.mark.parametrize(
    ("url", "vendor"),
    [
        ("https://ai.api.nvidia.com/v1/retrieval/nvidia/reranking", "nvidia"),
        ("https://integrate.api.nvidia.com/v1/rerank", "nvidia"),
        ("https://api.cohere.com/v2/rerank", "cohere"),
        ("https://api.jina.ai/v1/rerank", "jina"),
        ("https://api.voyageai.com/v1/rerank", "voyage"),
        ("http://ai.api.nvidia.com/v1/ranking", None),
        ("https://evilnvidia.com/v1/ranking", None),
        ("https://nvidia.com.evil.example/v1/ranking", None),
        ("https://h/ai.api.nvidia.com", None),
        ("http://localhost:8000", None),
    ],
)
def test_a_vendor_is_known_by_its_domain_over_tls(url, vendor):
    known = vendor_of(url)
    assert (known.name if known else None) == vendor


@pytest.mark.parametrize(
    ("base_url", "names"),
    [
        ("https://api.cohere.com", ["cohere"]),
        ("https://api.jina.ai/v1", ["jina"]),
        ("https://api.voyageai.com/v1", ["voyage"]),
        ("http://h/v1/ranking", ["nvidia"]),
        ("http://h/rerank", ["jina", "tei"]),
        ("http://h/v3/rerank", ["jina", "tei"]),
        ("http://h/api/v1/reranking", ["nvidia", "jina"]),
        ("http://h/compatible-api/v1/reranks", ["jina"]),
        ("http://h/invocations?x=1", ["nvidia", "jina", "tei"]),
    ],
)
def test_auto_knows_vendors_and_complete_routes(base_url, names):
    assert [protocol.name for protocol, _ in candidates(base_url, "auto", "m")] == names


@pytest.mark.parametrize("protocol", ["vllm", "tei"])
def test_a_protocol_without_a_vendor_needs_a_base_url(protocol):
    with pytest.raises(SettingsError, match="needs a base_url"):
        candidates(None, protocol, "m")
