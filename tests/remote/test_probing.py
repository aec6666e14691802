"""How `protocol="auto"` finds a route, and what it takes for an answer."""

import pytest
from remote.endpoint import Endpoint, expected, gives, speaks

from mistral_rerank import RemoteReranker, errors

PASSAGES = [f"passage {number}" for number in range(5)]

UNKNOWN_MODEL = {
    "this package's server": (404, {"detail": "no such model; there is tiny"}),
    "vLLM": (404, {"error": {"message": "The model `nope` does not exist.", "type": "NotFoundError", "code": 404}}),
    "NVIDIA": (404, {"detail": "Unknown. Available models are: ['a', 'b']"}),
    "infinity": (400, {"error": {"message": "ModelNotDeployedError: model `nope` not found; available: {'a'}"}}),
    "LiteLLM": (400, {"error": {"message": "Invalid model name passed in model=nope"}}),
    "in a 200": (200, {"error": {"message": "model 'nope' not found"}}),
}


def on_routes(routes, otherwise):
    """Behave by path."""
    return lambda exchange: routes.get(exchange.request.path, otherwise)(exchange)


@pytest.mark.parametrize(("status", "body"), UNKNOWN_MODEL.values(), ids=UNKNOWN_MODEL)
def test_an_unknown_model_ends_the_search(status, body):
    behave = on_routes({"/rerank": speaks("tei")}, gives(status, body))
    with Endpoint(behave) as endpoint, RemoteReranker("nope", base_url=endpoint.url) as reranker:
        with pytest.raises(errors.RemoteError, match="model"):
            reranker.rank("q", PASSAGES)
    assert [request.path for request in endpoint.requests] == ["/v1/ranking"]


@pytest.mark.parametrize("path", ["/v1/ranking/unknown model", "/v1/retrieval/unknown model/reranking"])
def test_a_missing_route_that_names_the_model_in_its_path_does_not_end_the_search(path):
    def misses(exchange):
        exchange.respond(404, {"message": f"The URL {exchange.request.path} is not served here"})

    behave = on_routes({"/reranking": speaks("jina", path="/reranking")}, misses)
    with Endpoint(behave) as endpoint, RemoteReranker("unknown model", base_url=endpoint.url) as reranker:
        assert [place.index for place in reranker.rank("q", PASSAGES)] == [p.index for p in expected(PASSAGES)]


@pytest.mark.parametrize("status", [401, 403])
def test_a_gateway_that_forbids_unknown_paths_does_not_end_the_search(status):
    behave = on_routes({"/v1/rerank": speaks("jina")}, gives(status, {"message": "Missing Authentication Token"}))
    with Endpoint(behave) as endpoint, RemoteReranker("m", base_url=endpoint.url) as reranker:
        assert [place.index for place in reranker.rank("q", PASSAGES)] == [p.index for p in expected(PASSAGES)]
        assert [request.path for request in endpoint.requests] == ["/v1/ranking", "/v1/rerank"]


@pytest.mark.parametrize(
    ("routes", "kind", "said"),
    [
        ({"/v1/ranking": (404, "a"), "/v1/rerank": (401, "b"), "/rerank": (422, "c")}, "RequestRefusedError", "c"),
        ({"/v1/ranking": (403, "a"), "/v1/rerank": (404, "b")}, "AuthenticationError", "a"),
        ({"/v1/ranking": (200, "a"), "/v1/rerank": (401, "b")}, "AuthenticationError", "b"),
        ({"/v1/rerank": (200, "a")}, "RequestRefusedError", "a"),
    ],
)
def test_when_all_routes_fail_the_error_that_says_most_is_raised(routes, kind, said):
    answers = {path: gives(status, {"error": f"it is {word}"}) for path, (status, word) in routes.items()}
    with Endpoint(on_routes(answers, gives(404, b""))) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url) as reranker, pytest.raises(errors.RemoteError) as raised:
            reranker.rank("q", PASSAGES)
    assert type(raised.value).__name__ == kind
    assert f"it is {said}" in str(raised.value)


def test_a_200_with_an_error_for_an_unknown_path_does_not_end_the_search():
    unknown = gives(200, {"error": "Unexpected endpoint or method. (POST /v1/ranking)"})
    behave = on_routes({"/v1/rerank": speaks("jina")}, unknown)
    with Endpoint(behave) as endpoint, RemoteReranker("m", base_url=endpoint.url) as reranker:
        assert [place.index for place in reranker.rank("q", PASSAGES)] == [p.index for p in expected(PASSAGES)]
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("protocol", "path"),
    [
        ("jina", "/compatible-api/v1/reranks"),
        ("jina", "/v3/rerank"),
        ("cohere", "/reranking"),
        ("vllm", "/invocations"),
        ("tei", "/invocations"),
        ("jina", "/openai/v1/rerank?api-version=2025-01-01"),
    ],
)
@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
def test_a_base_url_may_be_the_whole_route(protocol, path, named):
    with Endpoint(speaks(protocol, path=path)) as endpoint:
        options = {"protocol": protocol} if named else {}
        with RemoteReranker("m", base_url=endpoint.url + path, **options) as reranker:
            assert [place.index for place in reranker.rank("q", PASSAGES)] == [p.index for p in expected(PASSAGES)]
    assert {request.path for request in endpoint.requests} == {path}


def test_tei_is_served_beside_a_version():
    with Endpoint(speaks("tei")) as endpoint:
        with RemoteReranker("m", base_url=f"{endpoint.url}/v1", protocol="tei") as reranker:
            assert reranker.rank("q", PASSAGES) == expected(PASSAGES)


def test_no_message_shows_the_query_of_a_url():
    with Endpoint(gives(404, b"")) as endpoint:
        for protocol in ("auto", "nvidia"):
            with RemoteReranker("m", base_url=f"{endpoint.url}?tenant=acme", protocol=protocol) as reranker:
                with pytest.raises(errors.NotFoundError) as raised:
                    reranker.rank("q", PASSAGES)
                assert "acme" not in str(raised.value) + repr(reranker)
    assert all(request.path.endswith("?tenant=acme") for request in endpoint.requests)
