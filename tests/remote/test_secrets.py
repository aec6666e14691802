"""The key goes to its endpoint, and nowhere else."""

import asyncio
import copy
import json
import logging
import pickle
import traceback

import httpx
import pytest
from langchain_core.documents import Document
from langchain_core.load import dumpd, dumps
from remote.endpoint import Endpoint, gives, speaks

from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import RemoteReranker, RerankError, RerankSettings, SettingsError, open_reranker
from mistral_rerank.errors import RequestRefusedError
from mistral_rerank.protocols import PROTOCOLS

KEY = "nvapi-hunter2-0123456789"
VENDORS = {"nvidia": "NVIDIA_API_KEY", "cohere": "CO_API_KEY", "jina": "JINA_API_KEY", "voyage": "VOYAGE_API_KEY"}
PROTOCOLS = ["auto", *PROTOCOLS]


@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch):
    for name in ("MISTRAL_RERANK_API_KEY", "MISTRAL_RERANK_HEADERS", *VENDORS.values(), "COHERE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def authorization(**settings):
    protocol = settings.get("protocol", "nvidia")
    with Endpoint(speaks("nvidia" if protocol == "auto" else protocol)) as endpoint:
        with open_reranker("m", backend="remote", base_url=endpoint.url, **settings) as reranker:
            reranker.rank("q", ["one"])
    return endpoint.requests[0].headers.get("authorization")


def sent_to(url, **settings):
    """Give the requests to whatever host, by a transport that stands for the network."""
    requests = []

    def response(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        if request.url.path.startswith("/status") or "/pexec/" in request.url.path:
            return httpx.Response(200, json=[{"index": 0, "logit": 1.0, "probability": 0.7}])
        if request.url.host == "ai.api.nvidia.com":
            return httpx.Response(202, headers={"NVCF-REQID": "abc"})
        return httpx.Response(200, json=[{"index": 0, "logit": 1.0, "probability": 0.7}])

    with RemoteReranker("m", base_url=url, transport=httpx.MockTransport(response), **settings) as reranker:
        reranker.rank("q", ["one"])
    return requests


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_key_that_is_given_goes_to_base_url_before_our_variable(protocol, monkeypatch):
    assert authorization(protocol=protocol) is None
    monkeypatch.setenv("MISTRAL_RERANK_API_KEY", "ours")
    assert authorization(protocol=protocol) == "Bearer ours"
    assert authorization(protocol=protocol, api_key=KEY) == f"Bearer {KEY}"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "url",
    ["http://h:8000", "https://gateway.example/v1", "http://integrate.api.nvidia.com", "https://evilnvidia.com"],
)
def test_a_vendors_variable_is_sent_to_no_other_host(protocol, url, monkeypatch):
    for variable in VENDORS.values():
        monkeypatch.setenv(variable, KEY)
    for request in sent_to(url, protocol=protocol):
        assert "hunter2" not in repr(request.headers.raw)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("url", "vendor"),
    [
        ("https://ai.api.nvidia.com/v1/ranking", "nvidia"),
        ("https://integrate.api.nvidia.com/v1", "nvidia"),
        ("https://api.cohere.com", "cohere"),
        ("https://api.jina.ai/v1", "jina"),
        ("https://api.voyageai.com/v1", "voyage"),
    ],
)
def test_a_vendors_hosts_get_that_vendors_variable_in_every_protocol(protocol, url, vendor, monkeypatch):
    for name, variable in VENDORS.items():
        monkeypatch.setenv(variable, f"{name}s-key")
    for request in sent_to(url, protocol=protocol):
        assert request.headers["authorization"] == f"Bearer {vendor}s-key"


def test_the_key_and_the_headers_go_to_nvidias_status_url():
    headers = {"api-key": "second-hunter2"}
    first, second = sent_to("https://ai.api.nvidia.com", protocol="nvidia", api_key=KEY, headers=headers)
    assert second.url.host == "api.nvcf.nvidia.com"
    for request in (first, second):
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["api-key"] == "second-hunter2"
    assert second.headers["x-request-id"] == first.headers["x-request-id"]


def test_headers_are_sent_once_whatever_their_case_and_may_replace_the_bearer_token():
    (request,) = sent_to("http://h", protocol="tei", api_key="k", headers={"API-Key": KEY, "AUTHORIZATION": "Basic x"})
    assert request.headers.get_list("api-key") == [KEY]
    assert request.headers.get_list("authorization") == ["Basic x"]


@pytest.mark.parametrize(
    "headers",
    [
        {"api key": "x"},
        {"a\nb": "x"},
        {"x": "hunter2\nhunter2"},
        {"x": "hunter2é"},
        {"Host": "x"},
        {"Content-Length": "1"},
        "x: y",
        5,
    ],
)
def test_headers_that_do_not_fit_are_refused_without_their_value(headers):
    with pytest.raises(SettingsError, match="headers") as raised:
        open_reranker("m", backend="remote", base_url="http://h", headers=headers)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("make", [RerankSettings, LangChainRerank, LlamaIndexRerank])
def test_headers_are_a_setting_and_no_representation_holds_their_values(make, monkeypatch):
    settings = make(backend="remote", base_url="http://h", headers={"api-key": KEY})
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())]
    shown.append(pickle.dumps(settings).decode("latin-1"))
    if make is LangChainRerank:
        shown += [dumps(settings), json.dumps(dumpd(settings))]
    if make is LlamaIndexRerank:
        shown += [repr(settings.to_dict()), settings.to_json()]
    with settings.open() as reranker:
        shown += [repr(reranker), pickle.dumps(reranker).decode("latin-1")]
    assert [text for text in shown if "hunter2" in text] == []
    hash(settings.headers)
    monkeypatch.setenv("MISTRAL_RERANK_HEADERS", json.dumps({"api-key": KEY}))
    assert make(backend="remote").headers == settings.headers


@pytest.mark.parametrize("how", ["adapter", "setting"])
def test_headers_of_the_settings_reach_the_endpoint(how):
    with Endpoint(speaks("nvidia")) as endpoint:
        settings = {"model": "m", "backend": "remote", "base_url": endpoint.url, "headers": {"api-key": KEY}}
        if how == "adapter":
            LangChainRerank(**settings).compress_documents([Document(page_content="one")], "q")
        else:
            with open_reranker(**settings) as reranker:
                reranker.rank("q", ["one"])
    assert endpoint.requests[0].headers["api-key"] == KEY


@pytest.mark.parametrize("make", [RerankSettings, LangChainRerank, LlamaIndexRerank])
def test_no_representation_of_settings_or_adapters_holds_it(make):
    settings = make(backend="remote", base_url="http://h", api_key=KEY)
    shown = [repr(settings), str(settings), settings.model_dump_json(), repr(settings.model_dump())]
    shown.append(pickle.dumps(settings).decode("latin-1"))
    if make is LangChainRerank:
        shown += [dumps(settings), json.dumps(dumpd(settings))]
    if make is LlamaIndexRerank:
        shown += [repr(settings.to_dict()), settings.to_json()]
    assert [text for text in shown if "hunter2" in text] == []
    assert copy.deepcopy(settings).api_key.get_secret_value() == KEY


def test_langchain_restores_the_key_from_the_environment(monkeypatch):
    made = LangChainRerank(backend="remote", base_url="http://h", api_key=KEY)
    kept = dumpd(made)["kwargs"]["api_key"]
    assert (kept["type"], kept["id"]) == ("secret", ["MISTRAL_RERANK_API_KEY"])


def test_no_representation_of_a_reranker_holds_it():
    with open_reranker("m", backend="remote", base_url="http://h", api_key=KEY) as reranker:
        shown = [repr(reranker), str(reranker), pickle.dumps(reranker).decode("latin-1"), reranker.model_name]
    assert [text for text in shown if "hunter2" in text] == []


def ask(reranker, query, passage, how):
    return reranker.rank(query, [passage]) if how == "sync" else asyncio.run(reranker.arank(query, [passage]))


@pytest.mark.parametrize("how", ["sync", "async"])
def test_no_error_and_no_log_holds_it_nor_a_text_even_when_the_endpoint_says_them(how, caplog):
    caplog.set_level(logging.DEBUG)
    query, passage = "a private question", "a private passage " * 40
    said = {"detail": f"Incorrect API key provided: {KEY}; query={query}; passages={passage}"}
    for status in (401, 422, 500):
        with Endpoint(gives(status, said)) as endpoint:
            options = {"base_url": endpoint.url, "protocol": "nvidia", "api_key": KEY, "retries": 0}
            with RemoteReranker("m", **options) as reranker, pytest.raises(RerankError) as raised:
                ask(reranker, query, passage, how)
        text = "".join(traceback.format_exception(raised.value)) + repr(vars(raised.value))
        assert "Incorrect API key" in text
        assert "hunter2" not in text
        assert "private passage" not in text
        assert f"query={query}" not in text
    assert "hunter2" not in caplog.text
    assert "private" not in caplog.text


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_redirect_to_another_host_is_not_followed(protocol, status):
    with Endpoint(speaks("nvidia")) as other, Endpoint(gives(status, b"", {"Location": other.url})) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol=protocol, api_key=KEY) as reranker:
            with pytest.raises(RerankError, match="redirects"):
                reranker.rank("q", ["one"])
    assert other.requests == []


QUOTES = {
    "cut short": lambda text: f"could not read input '{text[:60]}...'",
    "as JSON": lambda text: f"bad input {json.dumps(text)}",
    "as JSON in ASCII, cut": lambda text: f"bad input {json.dumps(text)[:50]}",
    "as a list of Python": lambda text: f"bad input {[text]!r}",
    "with other spaces": lambda text: "  \n".join(text.split()),
}


@pytest.mark.parametrize("quote", QUOTES.values(), ids=QUOTES)
@pytest.mark.parametrize("where", ["detail", "location", "200"])
def test_a_part_of_a_text_in_what_an_endpoint_says_is_hidden(quote, where):
    text = 'Äpfel: a "private" sentence\nof the patient Jane Roe, born in 1970'
    said = quote(text)
    behave = {
        "detail": gives(422, {"detail": said}),
        "location": gives(
            307, b"", {"Location": f"http://h/{said.encode('ascii', 'ignore').decode()}".replace("\n", " ")}
        ),
        "200": gives(200, {"error": {"message": f"{said} {KEY}"}}),
    }[where]
    with Endpoint(behave) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", api_key=KEY) as reranker:
            with pytest.raises(RerankError) as raised:
                reranker.rank("what?", [text, "another"])
    for part in ("sentence", "patient", "Jane", "hunter2"):
        assert part not in str(raised.value)


def test_what_an_endpoint_says_is_clipped_and_has_no_control_characters():
    said = "\x1b[31mred\x07 " + "x" * 5000
    with Endpoint(gives(400, {"detail": said}, {"X-Request-Id": "y" * 5000})) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia") as reranker:
            with pytest.raises(RerankError, match="red") as raised:
                reranker.rank("q", ["one"])
    assert len(str(raised.value)) < 500
    assert len(raised.value.request_id) <= 300
    assert str(raised.value).isprintable()


def test_a_deeply_nested_error_is_an_error_of_ours():
    body = b'{"detail":' * 400 + b'"deep"' + b"}" * 400
    with Endpoint(gives(400, body)) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia") as reranker:
            with pytest.raises(RequestRefusedError):
                reranker.rank("q", ["one"])


def test_a_misspelled_setting_does_not_show_its_value():
    for make in (open_reranker, RerankSettings, LangChainRerank, LlamaIndexRerank):
        with pytest.raises(ValueError, match="api_kye") as raised:
            make(api_kye=KEY)
        assert "hunter2" not in str(raised.value)
