"""Every route in the words of its protocol, errors included, over a real connection."""

import math
import re

import httpx
import pytest
from server.running import replicated, running
from support import FailingReranker, LengthReranker

from mistral_rerank import (
    CheckpointError,
    InputTooLongError,
    MissingDependencyError,
    RemoteReranker,
    ScoringError,
    SettingsError,
)
from mistral_rerank.errors import (
    AuthenticationError,
    DeadlineExceededError,
    EndpointUnreachableError,
    RateLimitError,
    RemoteInputTooLongError,
    RequestTooLargeError,
    ServerError,
)

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
    scores = {"logit": 3.0, "probability": pytest.approx(BEST), "score": 3.0}
    assert raw[0] == {"index": 1, **scores, "text": "bbb"}


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
        ("/v1/score", {"text_1": " ", "text_2": ["", "secret"]}, 422, "question of pair 0 is empty"),
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
        (CheckpointError("/secret/model/config.json: vocab_size"), 500, "the server's log says why"),
        (SettingsError("/secret/model is a whole model"), 500, "the server's log says why"),
        (MissingDependencyError("secret is not installed"), 500, "the server's log says why"),
        (ServerError("http://secret:8000/v1 answered 500"), 502, "no usable answer"),
        (EndpointUnreachableError("http://secret:8000/v1"), 502, "no usable answer"),
        (AuthenticationError("http://secret:8000/v1 answered 401"), 502, "no usable answer"),
        (RateLimitError("http://secret:8000/v1 answered 429"), 429, "too many requests"),
        (DeadlineExceededError("http://secret:8000/v1"), 504, "in time"),
        (RemoteInputTooLongError("http://secret:8000/v1 answered 422"), 422, "exceeds the maximum allowed length"),
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


def test_the_retry_after_of_an_endpoint_is_passed_on():
    with running(FailingReranker(RateLimitError("answered 429", status=429, retry_after=6.5))) as url:
        reply = httpx.post(url + "/v1/ranking", json=NVIDIA)
    assert (reply.status_code, reply.headers["Retry-After"]) == (429, "7")


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


def test_strict_refuses_fields_that_the_protocol_lacks():
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


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
@pytest.mark.parametrize(
    ("texts", "scores"),
    [
        ({"text_1": "q", "text_2": "bbb"}, [3.0]),
        ({"text_1": "q", "text_2": ["a", "bbb", "cc"]}, [1.0, 3.0, 2.0]),
        ({"text_1": ["q", "r"], "text_2": ["bbb", "a"]}, [3.0, 1.0]),
    ],
)
def test_vllms_score_api_gives_scores_in_the_requests_order(client: httpx.Client, path: str, texts: dict, scores: list):
    reply = client.post(path, json=texts | {"use_activation": False}).json()
    assert reply["data"] == [{"index": at, "object": "score", "score": score} for at, score in enumerate(scores)]
    assert (reply["object"], reply["model"]) == ("list", "length")
    found = [entry["score"] for entry in client.post(path, json=texts).json()["data"]]
    assert found == pytest.approx([1 / (1 + math.exp(-score)) for score in scores])


def test_the_score_api_refuses_texts_that_make_no_pairs(client: httpx.Client):
    reply = client.post("/score", json={"text_1": ["q", "r"], "text_2": ["a", "b", "c"]})
    assert (reply.status_code, "text_1 holds 2 texts and text_2 3" in reply.json()["message"]) == (422, True)
    assert client.post("/score", json={"text_1": "q", "text_2": ["a"] * 1001}).status_code == 422
    assert client.post("/score", json={"text_1": "q", "text_2": "a", "model": "gpt-4"}).status_code == 404


@pytest.mark.parametrize("path", ["/reranking", "/v1/reranking"])
def test_llama_cpps_paths_answer_as_jinas(client: httpx.Client, path: str):
    reply = client.post(path, json=COHERE | {"top_n": 2}).json()
    assert [place["index"] for place in reply["results"]] == [1, 2]


@pytest.mark.parametrize("name", ["length", "rerank-v3.5", "nvidia/rerank-qa-mistral-4b"])
def test_the_model_is_found_by_each_of_its_names(client: httpx.Client, name: str):
    assert client.get(f"/v1/models/{name}").json()["id"] == "length"


def test_another_models_description_is_a_404(client: httpx.Client):
    assert client.get("/v1/models/gpt-4").status_code == 404


def test_teis_info_names_the_model_and_the_limits(client: httpx.Client):
    info = client.get("/info").json()
    assert (info["model_id"], info["max_client_batch_size"], info["max_concurrent_requests"]) == ("length", 1000, 256)
    assert "reranker" in info["model_type"]


@pytest.mark.parametrize("path", ["/", "/health", "/v1/health/live", "/v1/health/ready", "/metrics"])
def test_head_answers_like_get_without_a_body(client: httpx.Client, path: str):
    reply = client.head(path)
    assert (reply.status_code, reply.content) == (200, b"")


def test_null_in_anothers_mark_leaves_the_protocol(client: httpx.Client):
    reply = client.post("/rerank", json=COHERE | {"texts": None, "top_k": None, "use_activation": None, "top_n": 1})
    assert [place["index"] for place in reply.json()["results"]] == [1]


@pytest.mark.parametrize(
    "error",
    [
        ServerError("https://up.example/v1/ranking answered 500: secret (nvapi-secret)", status=500),
        RateLimitError("https://up.example/v1/ranking answered 429: secret", status=429),
        RemoteInputTooLongError("https://up.example answered 422: secret exceeds", status=422),
        RequestTooLargeError("https://up.example answered 413: secret", status=413),
        DeadlineExceededError("no answer from up.example within 3 s; secret"),
        CheckpointError("/srv/secret/up.example holds no usable model"),
        SettingsError("base_url https://up.example secret"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_no_address_path_or_upstream_word_reaches_a_client(error: Exception):
    with running(FailingReranker(error)) as url:
        replies = [httpx.post(url + "/v1/ranking", json=NVIDIA), httpx.post(url + "/rerank", json=TEI)]
    for reply in replies:
        assert reply.status_code in (422, 429, 500, 502, 504)
        assert "up.example" not in reply.text
        assert "secret" not in reply.text


def test_a_gateways_model_has_no_address_in_its_name():
    with RemoteReranker(base_url="http://127.0.0.1:9", retries=0) as remote, running(remote) as url:
        found = httpx.get(url + "/v1/models").text + httpx.get(url + "/v1/metadata").text
        assert "127.0.0.1" not in found


def test_a_local_models_folder_is_told_by_its_last_name_alone(tmp_path):
    class Foldered(LengthReranker):
        @property
        def model_name(self) -> str:
            return str(tmp_path)

    with running(Foldered()) as url:
        assert httpx.get(url + "/v1/models").json()["data"][0]["id"] == tmp_path.name


MANY = b",".join([b"1"] * 300_000)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", b'{"query": "q", "texts": [' + MANY + b"]}"),
        ("/v1/rerank", b'{"query": "q", "documents": [' + MANY + b"]}"),
        ("/v1/ranking", b'{"query": {"text": "q"}, "passages": [' + MANY + b"]}"),
        ("/score", b'{"text_1": "q", "text_2": [' + MANY + b"]}"),
        ("/rerank", b'{"query": "q", "texts": ["a"], "metadata": [' + MANY + b"]}"),
    ],
)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(client: httpx.Client, path: str, body: bytes):
    reply = client.post(path, content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, len(reply.content) < 2000) == (413, True)
    assert "more than 100000 JSON values" in reply.json()["message"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v1/ranking", "/score"])
def test_an_error_of_a_thousand_faults_is_short(client: httpx.Client, path: str):
    body = {"query": "q", "texts": [1] * 1000} if path == "/rerank" else {"query": "q", "documents": [1] * 1000}
    body |= {"passages": [1] * 500, "text_1": [1] * 1000, "text_2": [1] * 1000}
    reply = client.post(path, json=body)
    assert (reply.status_code, len(reply.content) < 2000) == (422, True)


def test_commas_and_brackets_inside_texts_are_no_values(client: httpx.Client):
    text = 'a, [b], {"c": "d"}\\ "' * 20_000
    reply = client.post("/rerank", json={"query": "q", "texts": [text, "b"]})
    assert [place["index"] for place in reply.json()] == [0, 1]
