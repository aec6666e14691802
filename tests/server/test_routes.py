"""Every route in the words of its contract, errors included, over a real connection."""

import math
import re

import httpx
import pytest
from server.running import replicated, running
from support import FailingReranker, LengthReranker

from mistral_rerank import InputTooLongError, ScoringError

NVIDIA = {"query": {"text": "q"}, "passages": [{"text": "a"}, {"text": "bbb"}, {"text": "cc"}]}
COHERE = {"query": "q", "documents": ["a", "bbb", "cc"]}
TEI = {"query": "q", "texts": ["a", "bbb", "cc"]}
BEST = 1 / (1 + math.exp(-3))


@pytest.fixture(scope="module", params=["one process", "two replicas"])
def client(request: pytest.FixtureRequest):
    aliases = "rerank-v3.5,nvidia/rerank-qa-mistral-4b"
    alone = request.param == "one process"
    with running(LengthReranker(), aliases=aliases) if alone else replicated(LengthReranker, aliases=aliases) as url:
        with httpx.Client(base_url=url) as client:
            yield client


@pytest.mark.parametrize(
    "path",
    [
        "/v1/ranking",
        "/v1/ranking/nvidia/rerank-qa-mistral-4b",
        "/v1/retrieval/nvidia/reranking",
        "/v1/retrieval/nvidia/rerank-qa-mistral-4b/reranking",
    ],
)
def test_nvidia_gets_logits_best_first(client: httpx.Client, path: str):
    reply = client.post(path, json=NVIDIA)
    assert reply.status_code == 200
    assert [(place["index"], place["logit"]) for place in reply.json()["rankings"]] == [(1, 3.0), (2, 2.0), (0, 1.0)]
    assert reply.json()["rankings"][0]["probability"] == pytest.approx(BEST)
    assert reply.json()["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_nvidia_top_k_is_honoured(client: httpx.Client):
    reply = client.post("/v1/retrieval/nvidia/reranking", json=NVIDIA | {"top_k": 1}).json()
    assert [place["index"] for place in reply["rankings"]] == [1]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_cohere_and_jina_get_probabilities(client: httpx.Client, path: str):
    body = COHERE | {"model": "rerank-v3.5", "top_n": 2, "return_documents": True}
    reply = client.post(path, json=body).json()
    assert [(place["index"], place["document"]) for place in reply["results"]] == [
        (1, {"text": "bbb"}),
        (2, {"text": "cc"}),
    ]
    assert reply["results"][0]["relevance_score"] == pytest.approx(BEST)
    assert reply["model"] == "length"


def test_documents_are_left_out_unless_asked_for(client: httpx.Client):
    assert "document" not in client.post("/v1/rerank", json=COHERE).json()["results"][0]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_vllm_gets_logits_without_activation(client: httpx.Client, path: str):
    reply = client.post(path, json=COHERE | {"use_activation": False}).json()
    assert [place["relevance_score"] for place in reply["results"]] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize("mark", [{"top_k": 2}, {"truncation": True}])
def test_voyage_gets_its_results_as_data(client: httpx.Client, mark: dict):
    reply = client.post("/v1/rerank", json=COHERE | mark).json()
    assert [place["index"] for place in reply["data"]] == [1, 2, 0][: mark.get("top_k")]
    assert reply["usage"] == {"total_tokens": 0}


def test_tei_gets_a_list(client: httpx.Client):
    plain = client.post("/rerank", json=TEI).json()
    assert [place["index"] for place in plain] == [1, 2, 0]
    assert plain[0]["score"] == pytest.approx(BEST)
    raw = client.post("/rerank", json=TEI | {"raw_scores": True, "return_text": True}).json()
    assert raw[0] == {"index": 1, "score": 3.0, "text": "bbb"}


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/ranking", NVIDIA | {"model": "gpt-4"}, 404, "length, rerank-v3.5"),
        ("/v1/ranking/gpt-4", NVIDIA, 404, "length, rerank-v3.5"),
        (
            "/v1/ranking",
            {"messages": [{"content": "secret"}]},
            422,
            "query: Field required; passages: Field required",
        ),
        ("/v1/ranking", NVIDIA | {"passages": ["secret"]}, 422, "passages.0"),
        ("/v1/ranking", NVIDIA | {"passages": []}, 422, "at least 1"),
        ("/v1/ranking", NVIDIA | {"passages": [{"text": "secret"}] * 513}, 422, "at most 512"),
        ("/v1/ranking", NVIDIA | {"query": {"text": " "}}, 422, "question is empty"),
        ("/v1/rerank", COHERE | {"documents": ["secret"] * 1001}, 422, "at most 1000"),
        ("/v1/rerank", COHERE | {"top_n": 0}, 422, "top_n"),
        ("/v1/rerank", ["secret"], 422, "body"),
        ("/rerank", {"query": "q", "texts": "secret"}, 422, "texts"),
        ("/v1/nowhere", NVIDIA, 404, "openapi"),
        ("/v1/models", NVIDIA, 405, "another method"),
    ],
)
def test_an_error_is_an_object_that_names_the_field_and_no_text(
    client: httpx.Client, path: str, body: object, status: int, says: str
):
    reply = client.post(path, json=body)
    error = reply.json()
    assert (reply.status_code, error["object"], error["status"], error["code"]) == (status, "error", status, status)
    assert says in error["message"]
    assert error["detail"] == error["message"]
    assert error["title"]
    assert error["type"]
    assert "secret" not in reply.text
    assert ("error_type" in error) == (path == "/rerank")


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b"[" * 100_000, 400), (b"\xff\xfe", 400), (b"", 422)])
def test_a_body_that_is_not_json_is_a_client_error(client: httpx.Client, body: bytes, status: int):
    reply = client.post("/v1/ranking", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == status
    assert reply.json()["object"] == "error"


def test_a_lone_surrogate_is_refused(client: httpx.Client):
    body = b'{"query": {"text": "\\ud800"}, "passages": [{"text": "a"}]}'
    reply = client.post("/v1/ranking", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (
            InputTooLongError("Input length 9000 exceeds maximum allowed token size 8192"),
            422,
            "exceeds maximum allowed",
        ),
        (ScoringError("not a number"), 500, "not a number"),
        (RuntimeError("secret"), 500, "RuntimeError"),
    ],
)
def test_an_error_of_the_model_reaches_the_client(error: Exception, status: int, says: str):
    with running(FailingReranker(error)) as url:
        reply = httpx.post(url + "/v1/ranking", json=NVIDIA, headers={"X-Request-Id": "abc-3"})
        metrics = httpx.get(url + "/metrics").text
    assert reply.status_code == status
    assert says in reply.json()["message"]
    assert reply.headers["X-Request-Id"] == "abc-3"
    assert f'requests_total{{route="/v1/ranking",status="{status}"}} 1.0' in metrics
    assert "secret" not in reply.text


def test_a_request_id_is_echoed(client: httpx.Client):
    assert client.get("/health", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    assert client.post("/v1/nowhere", headers={"X-Request-Id": "abc-2"}).headers["X-Request-Id"] == "abc-2"
    assert len(client.get("/health").headers["X-Request-Id"]) >= 32


def test_a_request_id_that_is_none_is_replaced():
    with running(LengthReranker()) as url:
        assert len(httpx.get(url + "/health", headers={"X-Request-Id": "not one"}).headers["X-Request-Id"]) == 32


def test_the_model_is_listed_once_under_its_own_name(client: httpx.Client):
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["root"], model["object"]) == ("length", "length", "model")


def test_health_speaks_nims_words(client: httpx.Client):
    assert client.get("/v1/health/live").json()["message"] == "Service is live."
    assert client.get("/v1/health/ready").json()["message"] == "Service is ready."
    assert client.get("/health").status_code == 200


def test_management_routes_answer(client: httpx.Client):
    assert client.get("/v1/version").json()["api"] == "v1"
    assert client.get("/v1/metadata").json()["modelInfo"][0]["shortName"] == "length"
    assert "/v1/ranking" in client.get("/openapi.json").json()["paths"]


def test_the_openapi_document_defines_every_path_parameter(client: httpx.Client):
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for operation in methods.values():
            named = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path)), path


def test_the_openapi_document_says_how_many_passages_a_request_may_hold():
    with running(LengthReranker(), max_passages=600) as url:
        schemas = httpx.get(url + "/openapi.json").json()["components"]["schemas"]
    fields = {"CohereBody": "documents", "VllmBody": "documents", "TeiBody": "texts", "RankingBody": "passages"}
    found = [schemas[body]["properties"][field]["maxItems"] for body, field in fields.items()]
    assert found == [600, 600, 600, 512]


def test_strict_refuses_fields_that_the_contract_lacks():
    with running(LengthReranker(), strict=True) as url:
        assert httpx.post(url + "/v1/ranking", json=NVIDIA).status_code == 200
        reply = httpx.post(url + "/v1/ranking", json=NVIDIA | {"secret": 1})
    assert reply.status_code == 400
    assert "secret" not in reply.text


def test_origins_that_are_named_may_call_from_a_page():
    with running(LengthReranker(), cors_origins="https://app.example") as url:
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        allowed = httpx.options(url + "/v1/ranking", headers=asked)
        other = httpx.options(url + "/v1/ranking", headers=asked | {"Origin": "https://other.example"})
    assert allowed.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "Access-Control-Allow-Origin" not in other.headers
