"""The key goes to its endpoint, and nowhere else."""

import asyncio
import copy
import json
import logging
import pickle
import traceback

import pytest
from langchain_core.load import dumpd, dumps
from remote.endpoint import Endpoint, gives, speaks

from langchain_mistral_rerank import MistralRerank as LangChainRerank
from llama_index_mistral_rerank import MistralRerank as LlamaIndexRerank
from mistral_rerank import RemoteReranker, RerankError, RerankSettings, open_reranker

KEY = "nvapi-hunter2-0123456789"


@pytest.fixture(autouse=True)
def no_key_of_this_machine(monkeypatch):
    for name in ("MISTRAL_RERANK_API_KEY", "NVIDIA_API_KEY", "CO_API_KEY", "COHERE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def authorization(**settings):
    with Endpoint(speaks(settings.get("protocol", "nvidia"))) as endpoint:
        with open_reranker("m", backend="remote", base_url=endpoint.url, **settings) as reranker:
            reranker.rank("q", ["one"])
    return endpoint.requests[0].headers.get("authorization")


def test_the_key_comes_from_the_argument_then_our_variable_then_the_vendors(monkeypatch):
    assert authorization() is None
    monkeypatch.setenv("NVIDIA_API_KEY", "vendor")
    assert authorization() == "Bearer vendor"
    monkeypatch.setenv("MISTRAL_RERANK_API_KEY", "ours")
    assert authorization() == "Bearer ours"
    assert authorization(api_key=KEY) == f"Bearer {KEY}"


def test_a_vendors_key_goes_to_no_other_contract(monkeypatch):
    monkeypatch.setenv("NVIDIA_API_KEY", "vendor")
    assert authorization(protocol="tei") is None
    assert authorization(protocol="cohere") is None


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


def test_a_redirect_to_another_host_is_not_followed():
    with Endpoint(speaks("nvidia")) as other, Endpoint(gives(307, b"", {"Location": other.url})) as endpoint:
        with RemoteReranker("m", base_url=endpoint.url, protocol="nvidia", api_key=KEY) as reranker:
            with pytest.raises(RerankError, match="redirects"):
                reranker.rank("q", ["one"])
    assert other.requests == []


def test_a_misspelled_setting_does_not_show_its_value():
    for make in (open_reranker, RerankSettings, LangChainRerank, LlamaIndexRerank):
        with pytest.raises(ValueError, match="api_kye") as raised:
            make(api_kye=KEY)
        assert "hunter2" not in str(raised.value)
